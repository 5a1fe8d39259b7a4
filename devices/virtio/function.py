"""The PCI function that virtio-pci lives in: configuration space with its capabilities. PCI Local Bus 3.0 §6; virtio 1.2 §4.1.

256 bytes, little-endian. What a guest may write is in the mask beside them; all else reads as it was made. One BAR, number 0,
32-bit and not prefetchable, in which everything lies (LAYOUT). There is no INTx: interrupts are MSI-X.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

from devices.virtio.msix import ENABLE, FUNCTION_MASK, Msix

SIZE: Final = 256
VENDOR: Final = 0x1AF4
#: Modern devices are 0x1040 plus the virtio device type (§4.1.2).
_DEVICE: Final = 0x1040
_SUBSYSTEM: Final = 0x1100

COMMAND, STATUS, _CLASS, BAR0, _CAPABILITIES, INTERRUPT_LINE = 0x04, 0x06, 0x08, 0x10, 0x34, 0x3C
MEMORY_SPACE, BUS_MASTER, _INTX_OFF = 0x0002, 0x0004, 0x0400
_STATUS_CAPABILITIES: Final = 0x0010

_CAP_MSIX, _CAP_VENDOR = 0x11, 0x09
#: Where the capabilities lie in configuration space. MSI-X first; then the five of virtio, one after the other.
MSIX_AT: Final = 0x40
_VIRTIO_AT: Final = 0x50


class Area(NamedTuple):
    """Part of BAR 0."""

    offset: int
    size: int


BAR_SIZE: Final = 0x8000
#: One page each, so that a VMM may map or trap them apart.
COMMON: Final = Area(0x0000, 0x38)
ISR: Final = Area(0x1000, 0x04)
DEVICE: Final = Area(0x2000, 0x1000)
NOTIFY: Final = Area(0x3000, 0x1000)
MSIX_TABLE: Final = Area(0x4000, 0x1000)
MSIX_PENDING: Final = Area(0x5000, 0x1000)
#: Bytes from one queue's notification register to the next's.
NOTIFY_STEP: Final = 4

_VIRTIO_CAP: Final = struct.Struct("<BBBBBBxxII")
_CFG_COMMON, _CFG_NOTIFY, _CFG_ISR, _CFG_DEVICE, _CFG_PCI = 1, 2, 3, 4, 5


class Bar(Protocol):
    """BAR 0, for the capability that reaches it through configuration space (§4.1.4.9)."""

    def bar_read(self, offset: int, size: int) -> int: ...
    def bar_write(self, offset: int, size: int, value: int) -> None: ...
    def command_changed(self) -> None: ...


class ConfigSpace:
    """`read` and `write` as a VMM does them: 1, 2, 4 or 8 bytes, aligned."""

    def __init__(self, device_type: int, class_code: int, msix: Msix, bar: Bar, device_config: int) -> None:
        """:param class_code: class, subclass and interface, 24 bits. :param device_config: bytes of the device's configuration."""
        self._msix = msix
        self._bar = bar
        self._bytes = bytearray(SIZE)
        self._writable = bytearray(SIZE)
        put = self._put
        put(0x00, 2, VENDOR)
        put(0x02, 2, _DEVICE + device_type)
        put(COMMAND, 2, 0, writable=MEMORY_SPACE | BUS_MASTER | _INTX_OFF)
        put(STATUS, 2, _STATUS_CAPABILITIES)
        put(_CLASS, 4, class_code << 8 | 1)  # revision 1: not a transitional device
        put(BAR0, 4, 0, writable=~(BAR_SIZE - 1) & 0xFFFF_FFFF)
        put(0x2C, 2, VENDOR)
        put(0x2E, 2, _SUBSYSTEM)
        put(INTERRUPT_LINE, 1, 0, writable=0xFF)
        self._put_capabilities(device_config)
        self._initial = bytes(self._bytes)

    def _put(self, offset: int, size: int, value: int, *, writable: int = 0) -> None:
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")
        self._writable[offset : offset + size] = writable.to_bytes(size, "little")

    def _put_capabilities(self, device_config: int) -> None:
        self._put(_CAPABILITIES, 1, MSIX_AT)
        self._put(MSIX_AT, 2, _VIRTIO_AT << 8 | _CAP_MSIX)
        self._put(MSIX_AT + 2, 2, self._msix.control, writable=ENABLE | FUNCTION_MASK)
        self._put(MSIX_AT + 4, 4, MSIX_TABLE.offset)
        self._put(MSIX_AT + 8, 4, MSIX_PENDING.offset)
        at = _VIRTIO_AT
        for kind, area, extra in (
            (_CFG_COMMON, COMMON, b""),
            (_CFG_NOTIFY, NOTIFY, NOTIFY_STEP.to_bytes(4, "little")),
            (_CFG_ISR, ISR, b""),
            (_CFG_DEVICE, Area(DEVICE.offset, device_config), b""),
            (_CFG_PCI, Area(0, 0), bytes(4)),
        ):
            length = _VIRTIO_CAP.size + len(extra)
            following = 0 if kind == _CFG_PCI else at + length
            cap = _VIRTIO_CAP.pack(_CAP_VENDOR, following, length, kind, 0, 0, *area) + extra
            self._bytes[at : at + length] = cap
            if kind == _CFG_PCI:
                self._window = at
                self._writable[at + 4] = 0xFF
                self._writable[at + 8 : at + 16] = b"\xff" * 8
            at += length

    def reset(self) -> None:
        self._bytes[:] = self._initial
        self._msix.reset()

    @property
    def bus_master(self) -> bool:
        """Whether it may touch guest memory and send messages."""
        return bool(self._bytes[COMMAND] & BUS_MASTER)

    # -- accesses -------------------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == self._data and (reached := self._reached()) is not None:
            return self._bar.bar_read(*reached) & (1 << 8 * size) - 1
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        given = value.to_bytes(size, "little")
        for at, byte in enumerate(given, offset):
            writable = self._writable[at]
            self._bytes[at] = self._bytes[at] & ~writable | byte & writable
        if offset == self._data:
            if (reached := self._reached()) is not None:
                self._bar.bar_write(*reached, value & (1 << 8 * reached[1]) - 1)
        elif offset < MSIX_AT + 4 and offset + size > MSIX_AT + 2:
            self._msix.control = int.from_bytes(self._bytes[MSIX_AT + 2 : MSIX_AT + 4], "little")
        elif offset < COMMAND + 2 and offset + size > COMMAND:
            self._bar.command_changed()

    @property
    def _data(self) -> int:
        return self._window + _VIRTIO_CAP.size

    def _reached(self) -> tuple[int, int] | None:
        """Offset and size that the window onto BAR 0 is set to; None if that is no access."""
        bar = self._bytes[self._window + 4]
        offset, size = struct.unpack_from("<II", self._bytes, self._window + 8)
        possible = bar == 0 and size in (1, 2, 4) and offset % size == 0 and offset + size <= BAR_SIZE
        return (offset, size) if possible else None

    # -- state ----------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        command, _, _, bar0 = struct.unpack_from("<HHQI", self._bytes, COMMAND)
        offset, size = struct.unpack_from("<II", self._bytes, self._window + 8)
        return {
            "command": command,
            "bar0": bar0,
            "interrupt_line": self._bytes[INTERRUPT_LINE],
            "msix_enabled": self._msix.enabled,
            "msix_masked": self._msix.masked,
            "window_bar": self._bytes[self._window + 4],
            "window_offset": offset,
            "window_size": size,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.reset()
        for offset, size, value in (
            (COMMAND, 2, state["command"]),
            (BAR0, 4, state["bar0"]),
            (INTERRUPT_LINE, 1, state["interrupt_line"]),
            (MSIX_AT + 2, 2, state["msix_enabled"] * ENABLE | state["msix_masked"] * FUNCTION_MASK),
            (self._window + 4, 1, state["window_bar"]),
            (self._window + 8, 4, state["window_offset"]),
            (self._window + 12, 4, state["window_size"]),
        ):
            # Not by `write`, which would tell the others: they have states of their own to load.
            for at, byte in enumerate(value.to_bytes(size, "little"), offset):
                writable = self._writable[at]
                self._bytes[at] = self._bytes[at] & ~writable | byte & writable
