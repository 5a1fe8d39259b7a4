"""What a guest finds in its memory at a cold start: the program, and a page of boot information at 0x1000.

    offset  bytes
    0x000   8      magic "VMFERRY1"
    0x008   8      bytes of RAM from address 0
    0x010   4      number of devices
    0x014   4      address of the platform page (platform_page.py has its registers)
    0x020   40 n   one entry a device: type (24 bytes, NUL-padded), gpa (8), irq (4), lines from irq on (4)
    0x800   2048   command line, NUL-terminated: words key=value

Little-endian. A machine that comes in from another host brings this page with its memory; nothing is written there.
"""

from __future__ import annotations

import struct
from typing import Final

from devices.vcpu import platform_page
from devices.vcpu.platform_file import BUILT_IN_GUEST, DeviceEntry, PlatformFile
from migrate.errors import Phase, UsageError

GPA: Final = 0x1000
_SIZE: Final = 0x1000
_MAGIC: Final = b"VMFERRY1"
_HEADER: Final = struct.Struct("<8sQII8x")
_ENTRY: Final = struct.Struct("<24sQII")
_CMDLINE: Final = 0x800
MAX_DEVICES: Final = (_CMDLINE - _HEADER.size) // _ENTRY.size
MAX_TYPE: Final = 23
MAX_CMDLINE: Final = _SIZE - _CMDLINE - 1


def information(platform: PlatformFile, ram_size: int) -> bytes:
    """The page. :raise UsageError: something does not fit."""
    cmdline = platform.cmdline.encode("utf-8", "surrogateescape")
    if len(cmdline) > MAX_CMDLINE or b"\0" in cmdline:
        raise _too_much(f"a command line of {len(cmdline)} bytes; it takes {MAX_CMDLINE}")
    if len(platform.devices) > MAX_DEVICES:
        raise _too_much(f"{len(platform.devices)} devices; it takes {MAX_DEVICES}")
    header = _HEADER.pack(_MAGIC, ram_size, len(platform.devices), platform_page.GPA)
    table = b"".join(_entry(device) for device in platform.devices)
    return (header + table).ljust(_CMDLINE, b"\0") + cmdline.ljust(_SIZE - _CMDLINE, b"\0")


def _entry(device: DeviceEntry) -> bytes:
    name = device.type.encode()
    if len(name) > MAX_TYPE:
        raise _too_much(f"the device type {device.type!r}; it takes {MAX_TYPE} bytes")
    return _ENTRY.pack(name, device.gpa, device.irq, device.vectors)


def program(platform: PlatformFile) -> bytes:
    """The guest's bytes. :raise UsageError: there is no such file."""
    path = platform.guest or BUILT_IN_GUEST
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the guest {path} cannot be read: {error.strerror}",
            remedy='give a flat binary as guest = "…" in machine.toml, or leave it out for the built-in one',
            phase=Phase.SETUP,
        ) from None


def write(view: memoryview, platform: PlatformFile) -> None:
    """Put both into the region of memory at address 0. :raise UsageError: something does not fit."""
    code = program(platform)
    end = platform.entry_gpa + len(code)
    if platform.entry_gpa < GPA + _SIZE or end > len(view):
        raise _too_much(
            f"a guest of {len(code)} bytes at {platform.entry_gpa:#x}, with {len(view)} bytes of memory"
        )
    view[GPA : GPA + _SIZE] = information(platform, len(view))
    view[platform.entry_gpa : end] = code


def _too_much(what: str) -> UsageError:
    return UsageError(
        f"the boot information does not hold {what}", remedy="change machine.toml", phase=Phase.SETUP
    )
