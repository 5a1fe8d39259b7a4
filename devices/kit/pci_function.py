"""A device's registers as BARs of a PCI function: for a VMM that knows PCI functions only. PCI Local Bus 3.0 §6.

What is a PCI function by itself (virtio-blk) has its own configuration space; for the others there is one here, of 256 bytes: an
identity, one BAR a region, INTx. None of it is in the device's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

_COMMAND, _CLASS, _BARS, _SUBSYSTEM, _LINE, _PIN = 0x04, 0x08, 0x10, 0x2C, 0x3C, 0x3D
_IO_SPACE, _MEMORY_SPACE, _BUS_MASTER, _INTX_OFF = 0x0001, 0x0002, 0x0004, 0x0400
_SIZE: Final = 256
_MAX_BARS: Final = 6
#: Least size of a BAR: QEMU 7.2's proxy takes whatever is smaller for 16 bytes, of ports too, and maps that.
_LEAST: Final = 16


class Window(Protocol):
    """A region as the device describes it."""

    @property
    def size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PciIdentity:
    """Who a guest takes the device for. `class_code`: class, subclass and interface, 24 bits."""

    vendor: int
    device: int
    class_code: int
    ports: bool = False  #: its BARs are I/O ports, and not memory


class PlainFunction:
    """The configuration space of a device that has none."""

    def __init__(self, identity: PciIdentity, regions: Sequence[Window], *, interrupts: bool) -> None:
        self._bytes = bytearray(_SIZE)
        self._writable = bytearray(_SIZE)
        self._put(0x00, 2, identity.vendor)
        self._put(0x02, 2, identity.device)
        self._put(_COMMAND, 2, 0, _IO_SPACE | _MEMORY_SPACE | _BUS_MASTER | _INTX_OFF)
        self._put(_CLASS, 4, identity.class_code << 8)
        self._put(_SUBSYSTEM, 2, identity.vendor)
        self._put(_SUBSYSTEM + 2, 2, identity.device)
        for number, region in enumerate(regions[:_MAX_BARS]):
            if region.size:
                size = max(_LEAST, 1 << (region.size - 1).bit_length())
                self._put(_BARS + 4 * number, 4, int(identity.ports), -size & 0xFFFF_FFFF)
        self._put(_LINE, 1, 0, 0xFF)
        self._put(_PIN, 1, int(interrupts))
        self._initial = bytes(self._bytes)

    def _put(self, offset: int, size: int, value: int, writable: int = 0) -> None:
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")
        self._writable[offset : offset + size] = writable.to_bytes(size, "little")

    def reset(self) -> None:
        self._bytes[:] = self._initial

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            writable = self._writable[at]
            self._bytes[at] = self._bytes[at] & ~writable | byte & writable


class ConfigReader(Protocol):
    def __call__(self, offset: int, size: int) -> int: ...


def find(
    read: ConfigReader, regions: Sequence[Window], address: int, size: int, *, memory: bool
) -> tuple[int, int] | None:
    """Region and offset of what the guest sees at `address`; None: no BAR is there, or it is not decoded now.

    :param read: a function's configuration space. BARs of 64 bits are looked at by their low half: none of ours is one.
    """
    if not read(_COMMAND, 2) & (_MEMORY_SPACE if memory else _IO_SPACE):
        return None
    for number, region in enumerate(regions[:_MAX_BARS]):
        bar = read(_BARS + 4 * number, 4)
        if not region.size or bool(bar & 1) == memory:
            continue
        offset = address - (bar & (0xFFFF_FFF0 if memory else 0xFFFF_FFFC))
        if offset >= 0 and offset + size <= region.size:
            return number, offset
    return None
