"""The block core: a chain of a virtqueue in, a request to an image out, and its answer. Virtio 1.2 §5.2.

Knows no transport and no rings, only chains: a vhost-user back end drives it as virtio-pci does. A request has two parts
under the device's lock (`begin`, `finish`) and one without it (`run`): see runner.py.

A driver may cut its buffers where it likes (§2.7.4.2), so a request is two streams of bytes: what the device may read begins
with a header of 16 bytes; what it may write ends with the status, one byte.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final, Protocol

from devices.virtio.ring import Chain, DriverFault, Memory, Segment
from migrate.errors import MemoryFault

log = logging.getLogger(__name__)

SECTOR: Final = 512
#: Bytes that one request may move; it bounds how long the last one before a stop can take.
MAX_DATA: Final = 16 << 20
#: Data segments of one request, and the bytes of each, that we ask drivers to keep to.
SEG_MAX: Final = 126
SIZE_MAX: Final = 64 << 10
#: Sectors of one range to discard or to zero, and ranges in one request. Zeroing may cost as much as writing.
MAX_DISCARD: Final = 1 << 21
MAX_ZEROES: Final = MAX_DATA // SECTOR
MAX_RANGES: Final = 16
ID_BYTES: Final = 20

#: Device type (§5) and feature bits (§5.2.3).
DEVICE_TYPE: Final = 2
F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_MQ, F_DISCARD, F_WRITE_ZEROES = (
    1 << bit for bit in (1, 2, 5, 6, 9, 12, 13, 14)
)

_HEADER: Final = struct.Struct("<IIQ")
_RANGE: Final = struct.Struct("<QII")
#: §5.2.4: capacity, size_max, seg_max, geometry, blk_size, topology, writeback, num_queues, discard, write zeroes.
_CONFIG: Final = struct.Struct("<QII4xI8xBxHIIIIIB3x")
_UNMAP: Final = 1


class Kind(IntEnum):
    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(IntEnum):
    OK = 0
    IOERR = 1
    UNSUPP = 2


class Backing(Protocol):
    """Where the sectors are. Called from several threads; all raise OSError."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of the sector."""

    @property
    def read_only(self) -> bool: ...
    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """All of it, or OSError."""

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """All of it, or OSError. Readers see it when this returns; `flush` makes it last."""

    def zero(self, offset: int, length: int, *, punch: bool) -> None:
        """Reads as zeros from now on; with `punch` the space is given back."""

    def flush(self) -> None:
        """What was written before this call outlives a loss of power when it returns."""


class BlockCore:
    """One block device. `begin` is called with the device's lock held; what it returns carries the rest."""

    def __init__(self, backing: Backing, memory: Memory, serial: bytes, queues: int) -> None:
        """:param serial: what GET_ID answers, at most ID_BYTES."""
        self.backing = backing
        self.memory = memory
        self.serial = serial
        self._queues = queues
        self._complained = 0
        self.features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
        if queues > 1:
            self.features |= F_MQ
        self.features |= F_RO if backing.read_only else F_DISCARD | F_WRITE_ZEROES
        #: What the driver accepted of them.
        self.negotiated = 0

    @property
    def capacity(self) -> int:
        """Sectors."""
        return self.backing.size // SECTOR

    def config(self) -> bytes:
        """The device's configuration, as a driver reads it."""
        writable = not self.backing.read_only
        return _CONFIG.pack(
            self.capacity,
            SIZE_MAX,
            SEG_MAX,
            SECTOR,
            1,  # writeback: a write lasts only after a flush
            self._queues,
            MAX_DISCARD if writable else 0,
            MAX_RANGES if writable else 0,
            1,  # discard_sector_alignment
            MAX_ZEROES if writable else 0,
            MAX_RANGES if writable else 0,
            1,  # write_zeroes_may_unmap
        )

    def begin(self, chain: Chain) -> Request:
        """:raise DriverFault: there is no header to read or no status to write, so it cannot be answered."""
        readable, writable = list(chain.readable), list(chain.writable)
        header = self._cut(readable, _HEADER.size)
        if not sum(segment.length for segment in writable):
            raise DriverFault(f"the request of descriptor {chain.head} has no room for its status")
        while not writable[-1].length:
            writable.pop()
        last = writable.pop()
        status = last.address + last.length - 1
        try:
            # Now, while it can still be refused in the right way.
            self.memory.view(status, 1, write=True)
        except MemoryFault as error:
            raise DriverFault(error.reason) from error
        if last.length > 1:
            writable.append(Segment(last.address, last.length - 1))
        kind, _, sector = _HEADER.unpack(header)
        request = Request(self, status, sum(segment.length for segment in writable))
        try:
            prepare = _PREPARE.get(kind)
            if prepare is None:
                raise Refused(Status.UNSUPP)
            request.work = prepare(self, request, sector, readable, writable)
        except Refused as refused:
            request.status = refused.status
        return request

    def complain(self, error: Exception) -> None:
        """An image that fails fails often: the first times and each power of two, so that the log is not the next to fill."""
        self._complained += 1
        if self._complained <= 3 or self._complained.bit_count() == 1:
            log.error("event=image-failed times=%d error=%r", self._complained, str(error))

    # -- the kinds -----------------------------------------------------------------------------------------------------------

    def _read(
        self, request: Request, sector: int, readable: list[Segment], writable: list[Segment]
    ) -> Callable[[], None]:
        offset, views = self._data(sector, writable, write=True)
        request.stores, request.filled = tuple(writable), request.room
        return lambda: self.backing.read(offset, views)

    def _write(
        self, request: Request, sector: int, readable: list[Segment], writable: list[Segment]
    ) -> Callable[[], None]:
        self._require_writable()
        offset, views = self._data(sector, readable, write=False)
        return self._lasting(lambda: self.backing.write(offset, views))

    def _flush(
        self, request: Request, sector: int, readable: list[Segment], writable: list[Segment]
    ) -> Callable[[], None]:
        return self.backing.flush

    def _get_id(
        self, request: Request, sector: int, readable: list[Segment], writable: list[Segment]
    ) -> Callable[[], None]:
        if sum(segment.length for segment in writable) < ID_BYTES:
            raise Refused(Status.IOERR)
        views = self._views(writable, write=True)
        request.stores, request.filled = tuple(writable), ID_BYTES

        def answer() -> None:
            left = self.serial.ljust(ID_BYTES, b"\0")
            for view in views:
                view[: len(left)] = left[: len(view)]
                left = left[len(view) :]

        return answer

    def _discard(
        self, request: Request, sector: int, readable: list[Segment], writable: list[Segment]
    ) -> Callable[[], None]:
        return self._zero(F_DISCARD, MAX_DISCARD, readable, flags=0)

    def _write_zeroes(
        self, request: Request, sector: int, readable: list[Segment], writable: list[Segment]
    ) -> Callable[[], None]:
        return self._zero(F_WRITE_ZEROES, MAX_ZEROES, readable, flags=_UNMAP)

    def _zero(self, feature: int, most: int, readable: list[Segment], flags: int) -> Callable[[], None]:
        """:param flags: those that may be set; without any, what was discarded is given back."""
        if not self.negotiated & feature:
            raise Refused(Status.UNSUPP)
        size = sum(segment.length for segment in readable)
        if not 0 < size <= MAX_RANGES * _RANGE.size or size % _RANGE.size:
            raise Refused(Status.IOERR)
        ranges = list(_RANGE.iter_unpack(self._cut(readable, size)))
        for first, count, given in ranges:
            if given & ~flags:
                raise Refused(Status.UNSUPP)
            if count > most or first + count > self.capacity:
                raise Refused(Status.IOERR)

        def carry_out() -> None:
            for first, count, given in ranges:
                if count:
                    punch = not flags or bool(given & _UNMAP)
                    self.backing.zero(first * SECTOR, count * SECTOR, punch=punch)

        return self._lasting(carry_out)

    # -- what they have in common --------------------------------------------------------------------------------------------

    def _require_writable(self) -> None:
        if self.backing.read_only:
            raise Refused(Status.IOERR)

    def _lasting(self, change: Callable[[], None]) -> Callable[[], None]:
        """A driver that did not take FLUSH has no other way to make its writes last (§5.2.6.2)."""
        if self.negotiated & F_FLUSH:
            return change

        def change_and_flush() -> None:
            change()
            self.backing.flush()

        return change_and_flush

    def _data(self, sector: int, segments: list[Segment], *, write: bool) -> tuple[int, Sequence[memoryview]]:
        """Where in the image, and the buffers: whole sectors, within the image and within memory."""
        size = sum(segment.length for segment in segments)
        if size % SECTOR or size > MAX_DATA or sector * SECTOR + size > self.backing.size:
            raise Refused(Status.IOERR)
        return sector * SECTOR, self._views(segments, write=write)

    def _views(self, segments: list[Segment], *, write: bool) -> Sequence[memoryview]:
        try:
            return [self.memory.view(*segment, write=write) for segment in segments if segment.length]
        except MemoryFault as error:
            raise Refused(Status.IOERR) from error

    def _cut(self, segments: list[Segment], size: int) -> bytes:
        """The first `size` bytes, cut off the segments. :raise DriverFault: they are not there."""
        found = b""
        while len(found) < size:
            if not segments:
                raise DriverFault(f"a request of {len(found)} bytes where {size} are read")
            address, length = segments.pop(0)
            taken = min(length, size - len(found))
            try:
                found += self.memory.read(address, taken)
            except MemoryFault as error:
                raise DriverFault(error.reason) from error
            if taken < length:
                segments.insert(0, Segment(address + taken, length - taken))
        return found


class Refused(Exception):
    """A request that is answered with this status and nothing else."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


_Prepare = Callable[[BlockCore, "Request", int, list[Segment], list[Segment]], Callable[[], None]]
_PREPARE: Final[dict[int, _Prepare]] = {
    Kind.IN: BlockCore._read,
    Kind.OUT: BlockCore._write,
    Kind.FLUSH: BlockCore._flush,
    Kind.GET_ID: BlockCore._get_id,
    Kind.DISCARD: BlockCore._discard,
    Kind.WRITE_ZEROES: BlockCore._write_zeroes,
}


class Request:
    """One request: a runner.Work."""

    __slots__ = ("_core", "_status_at", "filled", "room", "status", "stores", "work")

    def __init__(self, core: BlockCore, status_at: int, room: int) -> None:
        self._core = core
        self._status_at = status_at
        #: Bytes that may be written before the status.
        self.room = room
        #: How many of them `work` writes, from the first on.
        self.filled = 0
        self.status = Status.OK
        #: What is to be done. None: nothing, it was refused.
        self.work: Callable[[], None] | None = None
        #: Guest memory that `work` stores into.
        self.stores: tuple[Segment, ...] = ()

    def run(self) -> None:
        if self.work is None:
            return
        try:
            self.work()
        except OSError as error:
            self.status = Status.IOERR
            self._core.complain(error)
        except Exception:
            self.status = Status.IOERR
            log.exception("event=request-failed")

    def finish(self) -> int:
        """Data is marked before the status is there to be seen. Bytes written, counted from the buffers' beginning."""
        # Also what failed: some of it may have been stored.
        for address, length in self.stores:
            self._core.memory.wrote(address, length)
        self.work = None  # and with it the views
        self._core.memory.write(self._status_at, bytes((self.status,)))
        filled = self.filled if self.status is Status.OK else 0
        return filled + 1 if filled == self.room else filled
