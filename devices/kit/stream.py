"""State of any size: pages of a device's own that are sent while the machine runs, and again where they were written since.

A session begins when the device enters PRE_COPY (or STOP_COPY from STOP) and ends when it leaves the three states that
share it. It begins with every page that holds data; each chunk takes pages off that set, and what the device writes puts
them back. Pages are taken (get and clear) before they are read, so a page that is written meanwhile goes again.

A chunk, all integers little-endian:

| offset     | bytes    | what                                                                          |
|------------|----------|-------------------------------------------------------------------------------|
| 0          | 8        | magic: "VMFSTRM1"                                                             |
| 8          | 4        | R, number of runs                                                             |
| 12         | 4        | number of the chunk in its session; 0 begins one: all pages are zero before it |
| 16         | 8        | size of the whole memory in bytes                                             |
| 24         | 8        | D, number of pages with data in this chunk                                    |
| 32         | 16 × R   | runs: first page (8), pages (4), 0 data or 1 zeros (4); rising, not overlapping |
| 32 + 16 R  | 4096 × D | the pages of the data runs, in order                                          |
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from migrate.errors import DeviceRefused, Phase
from migrate.memory.addresses import PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS, GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.log import LogTracker
from migrate.memory.region import GuestMemory, Pages, RegionSpec
from migrate.memory.runs import PageRuns

_MAGIC: Final = b"VMFSTRM1"
_HEADER: Final = struct.Struct("<8sIIQQ")
_RUN: Final = np.dtype([("first", "<u8"), ("pages", "<u4"), ("zero", "<u4")])
#: What a page can cost in a chunk: itself and a run of its own.
_PAGE_COST: Final = PAGE_SIZE + _RUN.itemsize
#: The smallest chunk that can be asked for, and the largest that is made or taken.
MIN_CHUNK: Final = _HEADER.size + _PAGE_COST
MAX_CHUNK: Final = 16 << 20

_START: Final = GuestAddress(0)


class Streamed(Protocol):
    """State beside the blob, as the kit moves it: a session that is read chunk by chunk, and chunks that are taken in."""

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def read_chunk(self, max_bytes: int) -> tuple[bytes, int]:
        """Some of it (empty: nothing now), and an estimate of the bytes left; 0 once there is nothing more to wait for."""

    def left(self) -> tuple[int, int]:
        """Bytes of the first pass, and written since."""

    def clear(self) -> None: ...
    def write_chunk(self, chunk: bytes) -> None: ...
    def digests(self) -> bytes:
        """Of all of it, for a fingerprint."""


class StreamedMemory:
    """Whole pages of a device's own in a memfd, with a log of what was written to them. Made by Device.stream."""

    def __init__(self, size: int, name: str) -> None:
        """:raise MemoryFault: `size` is not a positive multiple of the page."""
        self._memory = GuestMemory.create([RegionSpec(_START, size)], name)
        self._log = LogTracker()
        self._log.attach(self._memory)
        self._session: _Session | None = None
        self._expected = 0
        self.size = size

    @property
    def view(self) -> memoryview:
        """All bytes, writable, format "B". A store through it needs `mark`, or it is lost in a migration."""
        return self._memory.regions[0].view

    @property
    def pages(self) -> Pages:
        """The same as 64-bit words, shape (pages, 512)."""
        return self._memory.regions[0].pages

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store, then mark."""
        if offset < 0 or offset + len(data) > self.size:
            raise ValueError(f"{len(data)} bytes at {offset} do not fit into {self.size}")
        with self._log.lock:
            self.view[offset : offset + len(data)] = data
            self.mark(offset, len(data))

    def mark(self, offset: int, length: int) -> None:
        """`length` bytes from `offset` on were just stored, through `view` or `pages`."""
        if length:
            self._log.mark(GuestAddress(offset), length)

    def digests(self) -> bytes:
        """SHA-256 of each MiB, one after the other."""
        return b"".join(self._memory.digest_blocks())

    # -- out, one session at a time ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A session begins; one that was open is forgotten."""
        self._log.start()
        self._session = _Session(self._memory, self._log)

    def end(self) -> None:
        self._session = None
        self._log.stop()

    @property
    def open(self) -> bool:
        return self._session is not None

    def read_chunk(self, max_bytes: int) -> tuple[bytes, int]:
        """Some of what is to be sent (empty if there is nothing right now), and how many bytes are left.

        The participant's lock is not needed: the log has its own. Sessions and chunks must be of one thread.

        :raise DeviceRefused: no session is open, or not one page fits into `max_bytes`.
        """
        session = self._open_session()
        if max_bytes < MIN_CHUNK:
            raise _refused(
                f"a chunk of {max_bytes} bytes holds no page",
                f"ask for {MIN_CHUNK} bytes or more",
                Phase.SAVE,
            )
        return session.read(min(max_bytes, MAX_CHUNK))

    def left(self) -> tuple[int, int]:
        """Bytes of pages that are still to be read: of those with data when the session began, and written since they were.

        :raise DeviceRefused: no session is open.
        """
        return self._open_session().left()

    def _open_session(self) -> _Session:
        if self._session is None:
            raise _refused(
                "no session of streamed state is open",
                "move the device to PRE_COPY or STOP_COPY first",
                Phase.SAVE,
            )
        return self._session

    # -- in -----------------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """All zero, without a byte of memory."""
        self._memory.punch(self._memory.data_extents())
        self._expected = 0

    def write_chunk(self, chunk: bytes) -> None:
        """Take over what another device's read_chunk gave. All of it is checked before any of it is stored.

        :raise DeviceRefused: it is no such chunk, is for a memory of another size, or one before it is missing.
        """
        number, runs, data = _parse(chunk, self.size, self._expected)
        if number == 0:
            self.clear()
        zero = runs["zero"] == 1
        self._memory.punch(_page_runs(runs[zero]))
        self._memory.scatter(_page_runs(runs[~zero]), data)
        self._expected = number + 1

    def close(self) -> None:
        self.end()
        self._log.close()
        self._memory.close()


class _Session:
    """What is still to be sent. The log runs already: a page written before it was read is in its mark, in `_dirty`, or both."""

    def __init__(self, memory: GuestMemory, log: LogTracker) -> None:
        self._memory = memory
        self._log = log
        self._dirty = DirtyBitmap.from_runs(memory.data_extents(), memory.page_count)
        #: Those of the first pass that have not been read yet; a part of `_dirty`.
        self._first = self._dirty.copy()
        self._number = 0
        #: The next chunk begins here and goes round, so that pages written again and again do not keep the others waiting.
        self._cursor = 0

    def read(self, max_bytes: int) -> tuple[bytes, int]:
        self._log.collect(self._dirty)
        waiting = self._dirty.pages_array()
        if not waiting.size:
            return b"", 0
        most = (max_bytes - _HEADER.size) // _PAGE_COST
        taken = np.roll(waiting, -int(np.searchsorted(waiting, self._cursor)))[:most]
        self._cursor = int(taken[-1]) + 1
        taken = np.sort(taken)
        runs = PageRuns.from_pages(taken)
        self._dirty.clear_runs(runs)
        self._first.clear_runs(runs)
        data = np.empty((len(taken), PAGE_WORDS), np.uint64)
        self._memory.gather(runs, data)
        chunk = _build(self._number, self._memory.size, taken, data)
        self._number += 1
        return chunk, (waiting.size - len(taken)) << PAGE_SHIFT

    def left(self) -> tuple[int, int]:
        self._log.collect(self._dirty)
        first = self._first.count()
        return first << PAGE_SHIFT, (self._dirty.count() - first) << PAGE_SHIFT


def _build(number: int, size: int, pages: NDArray[np.int64], data: Pages) -> bytes:
    zero: NDArray[np.bool_] = np.logical_not(data.any(axis=1))
    begins = np.flatnonzero((np.diff(pages, prepend=pages[0] - 2) != 1) | np.diff(zero, prepend=~zero[:1]))
    table = np.empty(len(begins), _RUN)
    table["first"] = pages[begins]
    table["pages"] = np.diff(begins, append=len(pages))
    table["zero"] = zero[begins]
    kept = data if not zero.any() else data[~zero]
    return b"".join((_HEADER.pack(_MAGIC, len(table), number, size, len(kept)), table.tobytes(), kept.data))


def _parse(chunk: bytes, size: int, expected: int) -> tuple[int, NDArray[np.void], Pages]:
    """Number, run table and pages of a chunk for a memory of `size` bytes. Every length is checked before it is used."""
    if not _HEADER.size <= len(chunk) <= MAX_CHUNK or not chunk.startswith(_MAGIC):
        raise _bad(f"{len(chunk)} bytes that do not begin as one")
    _, rows, number, total, pages = _HEADER.unpack_from(chunk)
    if total != size:
        raise _refused(
            f"streamed state of {total} bytes is for a device of that size, this one has {size}",
            "start it with the same options as on the source",
        )
    if number not in (0, expected):
        raise _bad(f"number {number} came where {expected} is next")
    if len(chunk) != _HEADER.size + rows * _RUN.itemsize + pages * PAGE_SIZE:
        raise _bad(f"{len(chunk)} bytes do not hold {rows} runs and {pages} pages")
    table = np.frombuffer(chunk, _RUN, rows, _HEADER.size)
    first, count = table["first"], table["pages"].astype(np.uint64)
    last = np.uint64(size >> PAGE_SHIFT)
    # Nothing can wrap: first <= last, and count has 32 bits.
    if (
        np.any(table["zero"] > 1)
        or np.any(count == 0)
        or np.any(first > last)
        or np.any(first + count > last)
    ):
        raise _bad("a run is empty, of no known kind or past the end")
    if np.any(first[1:] < first[:-1] + count[:-1]):
        raise _bad("its runs overlap or do not rise")
    if int(count[table["zero"] == 0].sum()) != pages:
        raise _bad(f"its runs do not add up to its {pages} pages")
    data = np.frombuffer(chunk, np.uint64, pages * PAGE_WORDS, _HEADER.size + rows * _RUN.itemsize)
    return number, table, data.reshape(-1, PAGE_WORDS)


def _page_runs(table: NDArray[np.void]) -> PageRuns:
    return PageRuns.merged(
        np.column_stack((table["first"].astype(np.int64), table["pages"].astype(np.int64)))
    )


def fingerprint(payload: bytes, streamed: Streamed | None) -> bytes:
    """SHA-256 over a state's canonical bytes and the digests of what is streamed beside them."""
    digest = hashlib.sha256(payload)
    if streamed is not None:
        digest.update(streamed.digests())
    return digest.digest()


def _bad(what: str) -> DeviceRefused:
    return _refused(
        f"this is no chunk of streamed state: {what}", "it was damaged or lost on the way; see both logs"
    )


def _refused(reason: str, remedy: str, phase: Phase = Phase.LOAD) -> DeviceRefused:
    return DeviceRefused(reason, remedy=remedy, phase=phase)
