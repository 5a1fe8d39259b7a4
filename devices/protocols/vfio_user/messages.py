"""What is on the wire of vfio-user: the header, the payloads, their limits. No I/O. (VERSION is in version.py.)

Every `decode` checks lengths before it uses or allocates anything, and raises RequestError with the errno that the
reply to the peer carries. Integers are in the host's byte order, as the specification says. Source of the layouts:
QEMU's docs/interop/vfio-user.rst and <linux/vfio.h>. (Regions beside their registers are in region_messages.py, features and
migration in feature_messages.py.)
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, Self

from migrate.errors import Phase, RemoteProtocolError

Buffer = bytes | bytearray | memoryview

#: Most bytes of data in one region access: the specification's default, offered in negotiation.
MAX_DATA = 1 << 20
#: Most descriptors in one message that we accept.
MAX_FDS = 8
#: Most DMA windows at a time. The specification's default is 65535; no VMM here has more than a few.
MAX_DMA_MAPS = 1024
PAGE_SIZE = 4096


class Command(IntEnum):
    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


TYPE_MASK = 0xF
REPLY = 0x1
NO_REPLY = 0x10
ERROR = 0x20


class DmaFlags(IntFlag):
    READ = 1
    WRITE = 2
    #: libvfio-user's: reach it by mmap, or by pread and pwrite. Both want a descriptor, which is always mapped here.
    MMAP = 4
    FILE_IO = 8


_BY_DESCRIPTOR = DmaFlags.MMAP | DmaFlags.FILE_IO
_DMA_FLAGS = int(DmaFlags.READ | DmaFlags.WRITE | _BY_DESCRIPTOR)
UNMAP_ALL = 2


class DeviceFlags(IntFlag):
    RESET = 1
    PCI = 2


class RegionFlags(IntFlag):
    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class IrqFlags(IntFlag):
    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class SetIrqs(IntFlag):
    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    MASK = 8
    UNMASK = 16
    TRIGGER = 32


DATA_TYPES = SetIrqs.DATA_NONE | SetIrqs.DATA_BOOL | SetIrqs.DATA_EVENTFD
ACTIONS = SetIrqs.MASK | SetIrqs.UNMASK | SetIrqs.TRIGGER
# A plain int: the complement of an IntFlag knows only the bits that have names.
_SET_IRQS_FLAGS = int(DATA_TYPES | ACTIONS)


_REMEDY = "look at the other side of this vfio-user socket"


class RequestError(RemoteProtocolError):
    """A request that cannot be granted; `errno` is what the reply carries."""

    code = "VfioUserRequest"

    def __init__(self, reason: str, *, number: int = errno.EINVAL, **fields: Any) -> None:
        super().__init__(reason, **fields)
        self.errno = number


def invalid(reason: str) -> RequestError:
    return RequestError(reason, remedy=_REMEDY, phase=Phase.RUNNING)


def refused(number: int, reason: str) -> RequestError:
    return RequestError(reason, number=number, remedy=_REMEDY, phase=Phase.RUNNING)


class Header(NamedTuple):
    """The 16 bytes before every payload. `size` counts them in."""

    id: int
    command: int
    size: int
    flags: int
    error: int

    def encode(self) -> bytes:
        return HEADER.pack(*self)


HEADER = struct.Struct("=HHIII")
HEADER_SIZE = HEADER.size
ACCESS = struct.Struct("=QII")
#: The most that comes before the data in any payload: a report of dirty pages has that much.
MAX_PREFIX = 32
#: The largest message that either side accepts.
MAX_MESSAGE = HEADER_SIZE + MAX_PREFIX + MAX_DATA


def message(message_id: int, command: int, payload: Buffer = b"", flags: int = 0) -> bytes:
    """A command, or with `flags` REPLY a reply."""
    return HEADER.pack(message_id, command, HEADER_SIZE + len(payload), flags, 0) + payload


def error_reply(message_id: int, command: int, number: int) -> bytes:
    """A reply that says no: only a header."""
    return HEADER.pack(message_id, command, HEADER_SIZE, REPLY | ERROR, number)


def _fields(layout: struct.Struct, payload: Buffer, what: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise invalid(f"{what} of {len(payload)} bytes instead of {layout.size}")
    return layout.unpack(payload)


# -- DMA -----------------------------------------------------------------------------------------------------------------

_DMA_MAP = struct.Struct("=IIQQQ")
_DMA_UNMAP = struct.Struct("=IIQQ")


def _check_window(address: int, size: int) -> None:
    if size == 0 or (address | size) % PAGE_SIZE or address + size > 1 << 64:
        raise invalid(f"a DMA window of {size} bytes at {address:#x} is not made of whole pages")


class DmaMap(NamedTuple):
    flags: int
    offset: int
    address: int
    size: int

    @property
    def wants_descriptor(self) -> bool:
        return bool(self.flags & _BY_DESCRIPTOR)

    def encode(self) -> bytes:
        return _DMA_MAP.pack(_DMA_MAP.size, *self)

    @classmethod
    def decode(cls, payload: Buffer) -> Self:
        argsz, flags, offset, address, size = _fields(_DMA_MAP, payload, "a DMA_MAP")
        if argsz < _DMA_MAP.size:
            raise invalid(f"a DMA_MAP with argsz {argsz}")
        if not flags & (DmaFlags.READ | DmaFlags.WRITE) or flags & ~_DMA_FLAGS:
            raise invalid(
                f"a DMA window with flags {flags:#x}: readable, writable or both, and nothing unknown"
            )
        _check_window(address, size)
        if offset % PAGE_SIZE or offset + size > 1 << 63:
            raise invalid(f"a DMA window at offset {offset:#x} of its file")
        return cls(flags, offset, address, size)


class DmaUnmap(NamedTuple):
    flags: int
    address: int
    size: int

    def encode(self) -> bytes:
        return _DMA_UNMAP.pack(_DMA_UNMAP.size, *self)

    @classmethod
    def decode(cls, payload: Buffer) -> Self:
        argsz, flags, address, size = _fields(_DMA_UNMAP, payload, "a DMA_UNMAP")
        if argsz < _DMA_UNMAP.size:
            raise invalid(f"a DMA_UNMAP with argsz {argsz}")
        if flags & ~UNMAP_ALL:
            # Bit 0 once asked for the bitmap of dirty pages (VFIO's first migration protocol): not served in silence.
            raise invalid(f"a DMA_UNMAP with flags {flags:#x}")
        if flags & UNMAP_ALL:
            if address or size:
                raise invalid("a DMA_UNMAP of everything that names a window")
        else:
            _check_window(address, size)
        return cls(flags, address, size)


# -- what a device has -----------------------------------------------------------------------------------------------------

_DEVICE_INFO = struct.Struct("=IIII")
_REGION_INFO = struct.Struct("=IIIIQQ")
_IRQ_INFO = struct.Struct("=IIII")


class DeviceInfo(NamedTuple):
    """Asked with zeros, answered in full."""

    flags: int = 0
    regions: int = 0
    irqs: int = 0

    def encode(self) -> bytes:
        return _DEVICE_INFO.pack(_DEVICE_INFO.size, *self)

    @classmethod
    def decode(cls, payload: Buffer) -> Self:
        argsz, *rest = _fields(_DEVICE_INFO, payload, "a DEVICE_GET_INFO")
        if argsz < _DEVICE_INFO.size:
            raise invalid(f"a DEVICE_GET_INFO with argsz {argsz}")
        return cls(*rest)


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """Asked with the index alone."""

    index: int
    flags: int = 0
    cap_offset: int = 0
    size: int = 0
    offset: int = 0

    def encode(self, argsz: int = _REGION_INFO.size) -> bytes:
        """:param argsz: bytes of reply that are taken."""
        return _REGION_INFO.pack(argsz, self.flags, self.index, self.cap_offset, self.size, self.offset)

    @classmethod
    def decode(cls, payload: Buffer) -> Self:
        argsz, flags, index, cap_offset, size, offset = _fields(_REGION_INFO, payload, "a GET_REGION_INFO")
        if argsz < _REGION_INFO.size:
            raise invalid(f"a GET_REGION_INFO with argsz {argsz}")
        return cls(index, flags, cap_offset, size, offset)


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """Asked with the index alone."""

    index: int
    flags: int = 0
    count: int = 0

    def encode(self) -> bytes:
        return _IRQ_INFO.pack(_IRQ_INFO.size, self.flags, self.index, self.count)

    @classmethod
    def decode(cls, payload: Buffer) -> Self:
        argsz, flags, index, count = _fields(_IRQ_INFO, payload, "a GET_IRQ_INFO")
        if argsz < _IRQ_INFO.size:
            raise invalid(f"a GET_IRQ_INFO with argsz {argsz}")
        return cls(index, flags, count)


_SET_IRQS = struct.Struct("=IIIII")
#: Interrupts of one index that one message may name: far more than any device has.
MAX_IRQS = 1024


@dataclass(frozen=True, slots=True)
class IrqSet:
    """SET_IRQS. `data` is one byte an interrupt for DATA_BOOL, else empty; eventfds travel beside the message."""

    flags: int
    index: int
    start: int
    count: int
    data: bytes = b""

    def encode(self) -> bytes:
        argsz = _SET_IRQS.size + len(self.data)
        return _SET_IRQS.pack(argsz, self.flags, self.index, self.start, self.count) + self.data

    @classmethod
    def decode(cls, payload: Buffer) -> Self:
        if not _SET_IRQS.size <= len(payload) <= _SET_IRQS.size + MAX_IRQS:
            raise invalid(f"a SET_IRQS of {len(payload)} bytes")
        argsz, flags, index, start, count = _SET_IRQS.unpack_from(payload)
        if argsz < _SET_IRQS.size:
            raise invalid(f"a SET_IRQS with argsz {argsz}")
        kind, action = flags & DATA_TYPES, flags & ACTIONS
        if flags & ~_SET_IRQS_FLAGS or kind.bit_count() != 1 or action.bit_count() != 1:
            raise invalid(f"a SET_IRQS with flags {flags:#x}: one kind of data and one action are wanted")
        if count > MAX_IRQS or start > MAX_IRQS:
            raise invalid(f"a SET_IRQS of {count} interrupts from {start}")
        if count == 0 and (flags != SetIrqs.DATA_NONE | SetIrqs.TRIGGER or start):
            raise invalid("a SET_IRQS of no interrupts that is not the one that disables all")
        data = bytes(payload[_SET_IRQS.size :])
        if len(data) != (count if kind == SetIrqs.DATA_BOOL else 0):
            raise invalid(f"a SET_IRQS of {count} interrupts with {len(data)} bytes of data")
        return cls(flags, index, start, count, data)


# -- memory that is reached by messages --------------------------------------------------------------------------------------

#: DMA_READ and DMA_WRITE: address and count, then the data.
DMA = struct.Struct("=QQ")


def decode_dma(payload: Buffer, *, data: bool) -> tuple[int, int, memoryview]:
    """address, count and, where `data` is to come (a DMA_WRITE, the reply to a DMA_READ), as many bytes."""
    if len(payload) < DMA.size:
        raise invalid(f"a DMA access of {len(payload)} bytes")
    address, count = DMA.unpack_from(payload)
    rest = memoryview(payload)[DMA.size :]
    if len(rest) != (count if data else 0):
        raise invalid(f"a DMA access that claims {count} bytes of data and has {len(rest)}")
    if count > MAX_DATA or address + count > 1 << 64:
        raise invalid(f"a DMA access of {count} bytes at {address:#x}")
    return address, count, rest


# -- region access -----------------------------------------------------------------------------------------------------------


def decode_read(payload: Buffer) -> tuple[int, int, int]:
    """offset, region, count of a REGION_READ."""
    if len(payload) != ACCESS.size:
        raise invalid(f"a REGION_READ of {len(payload)} bytes")
    access: tuple[int, int, int] = ACCESS.unpack(payload)
    if access[2] > MAX_DATA:
        raise invalid(f"a REGION_READ of {access[2]} bytes of data")
    return access


def decode_data(payload: Buffer) -> tuple[int, int, bytes]:
    """offset, region, data of a REGION_WRITE, or of the reply to a REGION_READ."""
    if len(payload) < ACCESS.size:
        raise invalid(f"a region access of {len(payload)} bytes")
    offset, region, count = ACCESS.unpack_from(payload)
    if count != len(payload) - ACCESS.size:
        raise invalid(
            f"a region access that claims {count} bytes of data and has {len(payload) - ACCESS.size}"
        )
    return offset, region, bytes(payload[ACCESS.size :])
