"""What is on the wire of vfio-user about regions, beside plain access: memory to map, descriptors to signal, many writes. No I/O.

Source of the layouts: QEMU's docs/interop/vfio-user.rst, <linux/vfio.h>, and libvfio-user's include/vfio-user.h where the two
differ: its entry of GET_REGION_IO_FDS has 48 bytes, the specification's 40. A reader takes an entry's size from argsz and count,
as the specification demands; what is written here has both the former's length and, at the latter's place, its datamatch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from devices.protocols.vfio_user.messages import MAX_DATA, PAGE_SIZE, Buffer, RegionFlags, RegionInfo, invalid

# -- memory of the device's own that a client may map (VFIO_USER_DEVICE_GET_REGION_INFO) -----------------------------------

_INFO = struct.Struct("=IIIIQQ")
_CAP = struct.Struct("=HHI")
_SPARSE = struct.Struct("=II")
_AREA = struct.Struct("=QQ")
_CAP_SPARSE_MMAP = 1
#: Most areas that one region may have, and room for them in a reply.
MAX_AREAS = 64
REGION_INFO_ROOM = _INFO.size + _CAP.size + _SPARSE.size + MAX_AREAS * _AREA.size


@dataclass(frozen=True, slots=True)
class RegionMemory:
    """What a client may map of a region: `areas` (offset and size, within the region) of `fd` from `offset` on; none: all of it."""

    fd: int
    offset: int = 0
    areas: Sequence[tuple[int, int]] = ()


def encode_region(info: RegionInfo, memory: RegionMemory | None, argsz: int) -> tuple[bytes, bool]:
    """The reply for a client with room for `argsz` bytes, and whether the descriptor goes with it.

    Without room for the capability only the fixed part is sent, and its argsz says what is needed (vfio-user.rst, Message
    sizes); the descriptor waits for the whole reply, as with libvfio-user, so that a client that asks twice gets it once.
    """
    flags, cap_offset, caps = info.flags, 0, b""
    if memory is not None:
        flags |= RegionFlags.MMAP
        if memory.areas:
            caps = _CAP.pack(_CAP_SPARSE_MMAP, 1, 0) + _SPARSE.pack(len(memory.areas), 0)
            caps += b"".join(_AREA.pack(*area) for area in memory.areas)
    needed = _INFO.size + len(caps)
    whole = argsz >= needed
    if caps and whole:
        flags, cap_offset = flags | RegionFlags.CAPS, _INFO.size
    offset = memory.offset if memory is not None else info.offset
    fixed = _INFO.pack(needed, flags, info.index, cap_offset, info.size, offset)
    return fixed + (caps if whole else b""), whole and memory is not None


def requested_room(payload: Buffer) -> int:
    """argsz of a request that begins with it and was checked."""
    room: int = struct.unpack_from("=I", payload)[0]
    return room


def decode_region(payload: Buffer) -> tuple[RegionInfo, tuple[tuple[int, int], ...]]:
    """A region and the areas of it that may be mapped, from a server's reply. Unknown capabilities are skipped.

    :raise RequestError: the chain of capabilities leaves the reply or goes in circles, or an area leaves the region.
    """
    if len(payload) < _INFO.size:
        raise invalid(f"a region info of {len(payload)} bytes")
    _, flags, index, cap_offset, size, offset = _INFO.unpack_from(payload)
    areas: tuple[tuple[int, int], ...] = ()
    at, after = (cap_offset, _INFO.size) if flags & RegionFlags.CAPS else (0, 0)
    while at:
        if at < after or at + _CAP.size > len(payload):
            raise invalid(f"a capability at {at} of a region info of {len(payload)} bytes")
        kind, _, following = _CAP.unpack_from(payload, at)
        after = at + _CAP.size
        if kind == _CAP_SPARSE_MMAP:
            areas = _decode_areas(payload, after, size)
        at = following
    return RegionInfo(index, flags, cap_offset, size, offset), areas


def _decode_areas(payload: Buffer, at: int, size: int) -> tuple[tuple[int, int], ...]:
    if at + _SPARSE.size > len(payload):
        raise invalid("a list of areas that is not all there")
    (count, _), at = _SPARSE.unpack_from(payload, at), at + _SPARSE.size
    if count > MAX_AREAS or at + count * _AREA.size > len(payload):
        raise invalid(f"a list of {count} areas that is not all there")
    areas = tuple(_AREA.unpack_from(payload, at + number * _AREA.size) for number in range(count))
    for offset, length in areas:
        if (offset | length) % PAGE_SIZE or offset + length > size:
            raise invalid(f"an area of {length} bytes at {offset:#x} of a region of {size}")
    return areas


# -- descriptors that are signalled by a write (VFIO_USER_DEVICE_GET_REGION_IO_FDS) -----------------------------------------

_IO_FDS = struct.Struct("=IIII")
_IO_FD = struct.Struct("=QQIIIIQQ")
_IO_FD_IN_SPECIFICATION = struct.Struct("=QQIIIIQ")
_IOEVENTFD = 0
#: KVM_IOEVENTFD_FLAG_DATAMATCH (<linux/kvm.h>): only a write of this value signals.
DATAMATCH = 1
#: Most of one region, and room for them in a reply.
MAX_IO_FDS = 64
IO_FDS_ROOM = _IO_FDS.size + MAX_IO_FDS * _IO_FD.size


@dataclass(frozen=True, slots=True)
class IoEventfd:
    """A write of `size` bytes (0: of any size) at `offset` of the region may be replaced by a signal to `fd`."""

    fd: int
    offset: int
    size: int
    flags: int = 0
    datamatch: int = 0


def encode_io_fds_request(index: int, room: int = IO_FDS_ROOM) -> bytes:
    return _IO_FDS.pack(room, 0, index, 0)


def decode_io_fds_request(payload: Buffer) -> tuple[int, int]:
    """The region, and how many bytes of reply the client takes."""
    if len(payload) != _IO_FDS.size:
        raise invalid(f"a GET_REGION_IO_FDS of {len(payload)} bytes")
    argsz, flags, index, count = _IO_FDS.unpack(payload)
    if flags or count or not _IO_FDS.size <= argsz <= MAX_DATA:
        raise invalid(f"a GET_REGION_IO_FDS with argsz {argsz}, flags {flags:#x}, count {count}")
    return index, argsz


def encode_io_fds(index: int, found: Sequence[IoEventfd], room: int) -> tuple[bytes, list[int]]:
    """The reply and the descriptors beside it, each once. Without room for all it says only how many and how much there is."""
    needed = _IO_FDS.size + len(found) * _IO_FD.size
    head = _IO_FDS.pack(needed, 0, index, len(found))
    if room < needed:
        return head, []
    fds: list[int] = []
    entries = []
    for one in found:
        if one.fd not in fds:
            fds.append(one.fd)
        at = fds.index(one.fd)
        entries.append(
            _IO_FD.pack(one.offset, one.size, at, _IOEVENTFD, one.flags, 0, one.datamatch, one.datamatch)
        )
    return head + b"".join(entries), fds


def decode_io_fds(payload: Buffer, fds: Sequence[int], size: int) -> list[IoEventfd]:
    """A server's reply about a region of `size` bytes. Entries of other kinds than ioeventfd are skipped.

    :raise RequestError: it does not fit itself, the region or the descriptors.
    """
    if len(payload) < _IO_FDS.size:
        raise invalid(f"a list of descriptors of {len(payload)} bytes")
    argsz, _, _, count = _IO_FDS.unpack_from(payload)
    if count == 0:
        return []
    if count > MAX_IO_FDS or argsz != len(payload):
        raise invalid(f"a list of {count} descriptors, {argsz} bytes, comes in {len(payload)}")
    stride = (argsz - _IO_FDS.size) // count
    if stride < _IO_FD_IN_SPECIFICATION.size or stride * count != argsz - _IO_FDS.size:
        raise invalid(f"{count} descriptors are described in {argsz - _IO_FDS.size} bytes")
    found = []
    for at in range(_IO_FDS.size, argsz, stride):
        offset, length, number, kind, flags, _, match = _IO_FD_IN_SPECIFICATION.unpack_from(payload, at)
        if stride >= _IO_FD.size:
            match = _IO_FD.unpack_from(payload, at)[7]
        if number >= len(fds) or offset + length > size:
            raise invalid(f"descriptor {number} of {len(fds)} for {length} bytes at {offset:#x}")
        if kind == _IOEVENTFD:
            found.append(IoEventfd(fds[number], offset, length, flags, match))
    return found


# -- many small writes in one message (VFIO_USER_REGION_WRITE_MULTI) ---------------------------------------------------------

WRITES = struct.Struct("=Q")
_WRITE = struct.Struct("=QII8s")


class Write(NamedTuple):
    region: int
    offset: int
    data: bytes


def encode_writes(writes: Sequence[Write]) -> bytes:
    """:raise RequestError: one is empty or longer than 8 bytes."""
    for write in writes:
        if not 1 <= len(write.data) <= 8:
            raise invalid(f"a write of {len(write.data)} bytes among many: 1 to 8 are possible")
    return WRITES.pack(len(writes)) + b"".join(
        _WRITE.pack(offset, region, len(data), data) for region, offset, data in writes
    )


def decode_writes(payload: Buffer) -> list[Write]:
    if len(payload) < WRITES.size:
        raise invalid(f"a REGION_WRITE_MULTI of {len(payload)} bytes")
    (count,) = WRITES.unpack_from(payload)
    if len(payload) - WRITES.size != count * _WRITE.size:
        raise invalid(f"{count} writes in {len(payload)} bytes")
    writes = []
    for offset, region, size, data in _WRITE.iter_unpack(payload[WRITES.size :]):
        if not 1 <= size <= 8:
            raise invalid(f"a write of {size} bytes among many: 1 to 8 are possible")
        writes.append(Write(region, offset, data[:size]))
    return writes
