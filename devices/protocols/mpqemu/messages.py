"""What is on the wire of multi-process QEMU: raw C structures of a 64-bit host, in its byte order. No I/O.

Facts from QEMU 7.2 (hw/remote/mpqemu-link.c, include/hw/remote/mpqemu-link.h), tried against its `x-pci-proxy-dev`. A size is
checked before anything of that size is read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from migrate.errors import Phase, RemoteProtocolError

#: int cmd, 4 bytes of padding, size_t size of what follows.
HEADER: Final = struct.Struct("=i4xQ")
#: REMOTE_MAX_FDS: regions in one SYNC_SYSMEM; QEMU itself sends 7 at most.
MAX_REGIONS: Final = 8
_SYNC: Final = struct.Struct("=8Q8Q8q")
_CONFIG: Final = struct.Struct("=IIi")
_BAR: Final = struct.Struct("=QQI?3x")
_RET: Final = struct.Struct("=Q")
#: What a read of nothing gives, and how a refusal is said.
REFUSED: Final = 0xFFFF_FFFF_FFFF_FFFF


class Command(IntEnum):
    SYNC_SYSMEM = 0
    RET = 1
    PCI_CFGWRITE = 2
    PCI_CFGREAD = 3
    BAR_WRITE = 4
    BAR_READ = 5
    SET_IRQFD = 6
    DEVICE_RESET = 7


#: Of what a peer may send: bytes after the header, and how many descriptors at least and at most.
SHAPES: Final = {
    Command.SYNC_SYSMEM: (_SYNC.size, 0, MAX_REGIONS),
    Command.PCI_CFGWRITE: (_CONFIG.size, 0, 0),
    Command.PCI_CFGREAD: (_CONFIG.size, 0, 0),
    Command.BAR_WRITE: (_BAR.size, 0, 0),
    Command.BAR_READ: (_BAR.size, 0, 0),
    Command.SET_IRQFD: (0, 2, 2),
    Command.DEVICE_RESET: (0, 0, 0),
}

#: QEMU does not wait for an answer to these.
UNANSWERED: Final = frozenset({Command.SYNC_SYSMEM, Command.SET_IRQFD})


class BadMessage(RemoteProtocolError):
    """What came cannot be a message: where the next one begins is unknown, or QEMU waits for an answer that cannot be given."""

    code = "MpqemuMessage"


def bad(reason: str) -> BadMessage:
    return BadMessage(reason, phase=Phase.RUNNING, remedy="look at the other side of this socket: QEMU 7.2?")


class Sysmem(NamedTuple):
    """A region of guest RAM: `size` bytes at guest physical address `gpa` are those of a descriptor from `offset` on."""

    gpa: int
    size: int
    offset: int


class ConfigAccess(NamedTuple):
    offset: int
    value: int
    size: int


class BarAccess(NamedTuple):
    """`address` is not counted from the BAR: it is where the guest sees it, in memory or among the ports."""

    address: int
    value: int
    size: int
    memory: bool


def header_of(data: bytes | memoryview) -> tuple[Command, int]:
    """Command and how many bytes follow. :raise BadMessage: nobody sends such a thing."""
    number, size = HEADER.unpack_from(data)
    try:
        command = Command(number)
        expected, _, _ = SHAPES[command]
    except (ValueError, KeyError):
        raise bad(f"command {number}, which is none that a device gets") from None
    if size != expected:
        raise bad(f"{command.name} of {size} bytes; it has {expected}")
    return command, expected


def decode_sysmem(payload: memoryview, count: int) -> list[Sysmem]:
    """:param count: as many regions as descriptors came. :raise BadMessage: regions that cannot be, or overlap."""
    fields = _SYNC.unpack(payload)
    regions = [Sysmem(fields[i], fields[8 + i], fields[16 + i]) for i in range(count)]
    end = 0
    for region in sorted(regions):
        if not region.size or region.offset < 0 or region.gpa + region.size > 1 << 64:
            raise bad(f"a region of {region.size} bytes at {region.gpa:#x} from offset {region.offset}")
        if region.gpa < end:
            raise bad(f"the region at {region.gpa:#x} overlaps the one before it")
        end = region.gpa + region.size
    return regions


def decode_config(payload: memoryview) -> ConfigAccess:
    """:raise BadMessage: not 1, 2 or 4 bytes of the 256 that a conventional function has."""
    offset, value, size = _CONFIG.unpack(payload)
    if size not in (1, 2, 4) or offset + size > 256:
        raise bad(f"an access of {size} bytes at {offset:#x} of the configuration space")
    return ConfigAccess(offset, value & (1 << 8 * size) - 1, size)


def decode_bar(payload: memoryview) -> BarAccess:
    """:raise BadMessage: not 1, 2, 4 or 8 bytes."""
    address, value, size, memory = _BAR.unpack(payload)
    if size not in (1, 2, 4, 8):
        raise bad(f"an access of {size} bytes at {address:#x}")
    return BarAccess(address, value & (1 << 8 * size) - 1, size, memory)


def encode_ret(value: int | None) -> bytes:
    """:param value: None for the answer that has no value (to DEVICE_RESET)."""
    if value is None:
        return HEADER.pack(Command.RET, 0)
    return HEADER.pack(Command.RET, _RET.size) + _RET.pack(value)


# -- a VMM's side ----------------------------------------------------------------------------------------------------------------


def ret_size(header: bytes) -> int:
    """How many bytes follow the header of an answer: none, or a value's. :raise BadMessage: it is no answer."""
    number, size = HEADER.unpack(header)
    if number != Command.RET or size not in (0, _RET.size):
        raise bad(f"command {number} of {size} bytes where an answer belongs")
    return int(size)


def decode_ret(payload: bytes) -> int | None:
    """None for an answer without a value."""
    return int(_RET.unpack(payload)[0]) if payload else None


def encode(command: Command, payload: bytes = b"") -> bytes:
    return HEADER.pack(command, len(payload)) + payload


def encode_sysmem(regions: Sequence[Sysmem]) -> bytes:
    """:raise BadMessage: more regions than a message has room for."""
    if len(regions) > MAX_REGIONS:
        raise bad(f"{len(regions)} regions of memory; a message has room for {MAX_REGIONS}")
    columns = [[region[i] for region in regions] + [0] * (MAX_REGIONS - len(regions)) for i in range(3)]
    return encode(Command.SYNC_SYSMEM, _SYNC.pack(*columns[0], *columns[1], *columns[2]))


def encode_config(command: Command, access: ConfigAccess) -> bytes:
    return encode(command, _CONFIG.pack(*access))


def encode_bar(command: Command, access: BarAccess) -> bytes:
    return encode(command, _BAR.pack(*access))
