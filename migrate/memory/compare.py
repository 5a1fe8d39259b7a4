"""The tracker `compare`: digests of what was last sent, against memory as it is. For participants that cannot track.

Lives in the coordinator, needs nothing of the participants, sees every change whoever made it, and costs one pass over all
data in memory a round, the last of them while the machine is stopped (some 1.4 GB/s a thread).

The digest that is kept is of the very bytes that were sent: the sender copies a block, records the copy, sends the copy.
A digest of memory itself, taken before or after sending, would lose a block that went A, B (sent), A.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import RLock
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from migrate.errors import TrackerError
from migrate.memory import content
from migrate.memory.addresses import PAGE_SHIFT, GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.mapping import Region
from migrate.memory.region import GuestMemory
from migrate.memory.runs import PageRuns
from migrate.memory.tracker import Attachment

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: What one digest stands for. Blocks start at a region's start; a region's last may be shorter.
BLOCK_SIZE = 64 << 10
BLOCK_PAGES = BLOCK_SIZE >> PAGE_SHIFT
_DIGEST_SIZE = 16
#: Blocks that a thread does in one go.
_STRETCH = 64


class CompareTracker:
    """Compares blocks of BLOCK_SIZE with what record() says the destination has; at first it has zeros.

    So start() makes dirty all that is not zero, which is what the first round must send.
    """

    name: ClassVar[str] = "compare"
    needs_marks: ClassVar[bool] = False

    def __init__(self, threads: int = 2) -> None:
        self.lock = RLock()
        self._attachment = Attachment(self.name)
        self._threads = threads
        # Random, so that no guest can prepare two pages with one digest.
        self._key = os.urandom(32)
        # A row a block, in order of regions: digest of what the destination has, and whether that is known.
        self._digests: NDArray[np.uint8] = np.empty((0, _DIGEST_SIZE), dtype=np.uint8)
        self._known: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self._first_rows: list[int] = []

    def attach(self, memory: GuestMemory) -> None:
        self._attachment.attach(memory)

    def start(self) -> None:
        if self._attachment.started:
            return
        rows, self._first_rows = 0, []
        for region in self._attachment.begin():
            self._first_rows.append(rows)
            rows += _blocks(region)
        self._digests = np.empty((rows, _DIGEST_SIZE), dtype=np.uint8)
        self._known = np.ones(rows, dtype=np.bool_)
        for region, first in zip(self._attachment.memory.regions, self._first_rows, strict=True):
            last = _blocks(region) - 1
            self._digests[first : first + last] = self._zeros(BLOCK_SIZE)
            self._digests[first + last] = self._zeros(region.size - last * BLOCK_SIZE)

    def collect(self, into: DirtyBitmap) -> None:
        """Mark every page of every block that differs from what was recorded. Changes nothing: no record, still dirty."""
        regions = self._attachment.check(into)
        for region, first_row in zip(regions, self._first_rows, strict=True):
            rows = slice(first_row, first_row + _blocks(region))
            now = self._digest_region(region)
            differ = ~self._known[rows] | (now != self._digests[rows]).any(axis=1)
            first = np.flatnonzero(differ) * BLOCK_PAGES
            pairs = np.column_stack((first, np.minimum(first + BLOCK_PAGES, region.page_count) - first))
            into.set_runs(PageRuns.merged(pairs + np.array([region.first_page, 0])))

    def record(self, first_page: int, data: Buffer) -> None:
        """Remember that the destination now has exactly `data` from `first_page` on.

        `data` is the copy that was sent (or judged zero and sent as such), of whole blocks.

        :raise TrackerError: not whole blocks of one region.
        """
        view = memoryview(data).cast("B")
        for row, low, high in self._rows(first_page, len(view)):
            self._digests[row] = np.frombuffer(self._digest(view[low:high]), dtype=np.uint8)
            self._known[row] = True

    def forget(self, runs: PageRuns) -> None:
        """Say that nobody knows what the destination has there: dirty until recorded again."""
        for region, local in self._attachment.memory.by_region(runs):
            first_row = self._first_rows[self._attachment.memory.regions.index(region)]
            self._known[first_row + _touched(region, local)] = False

    def blocks(self, dirty: DirtyBitmap) -> Iterator[tuple[int, int]]:
        """(first page, pages) of every block with a dirty page: what to copy, record and send as one."""
        for region, local in self._attachment.memory.by_region(dirty.runs()):
            for block in _touched(region, local).tolist():
                first = block * BLOCK_PAGES
                yield region.first_page + first, min(BLOCK_PAGES, region.page_count - first)

    def mark(self, gpa: GuestAddress, length: int) -> None:
        """Nothing to do: a change is seen whoever made it."""

    def mark_runs(self, runs: PageRuns) -> None:
        """Nothing to do: a change is seen whoever made it."""

    def stop(self) -> None:
        self._attachment.end()
        self._digests, self._known = self._digests[:0], self._known[:0]

    def close(self) -> None:
        self.stop()
        self._attachment.detach()

    def _rows(self, first_page: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(row, low, high): the digest's row and the range of the data for each block."""
        memory = self._attachment.memory
        region, page = memory.locate(first_page)
        start = page << PAGE_SHIFT
        end = start + length
        whole = end <= region.size and (end % BLOCK_SIZE == 0 or end == region.size)
        if not self._attachment.started or start % BLOCK_SIZE or not whole:
            raise TrackerError(
                f"{length} bytes from page {first_page} are not whole blocks of one region",
                remedy="report this",
            )
        first_row = self._first_rows[memory.regions.index(region)]
        for low in range(start, end, BLOCK_SIZE):
            yield first_row + low // BLOCK_SIZE, low - start, min(low + BLOCK_SIZE, end) - start

    def _digest(self, data: Buffer) -> bytes:
        return hashlib.blake2b(data, digest_size=_DIGEST_SIZE, key=self._key).digest()

    def _zeros(self, length: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._digest(bytes(length)), dtype=np.uint8)

    def _digest_region(self, region: Region) -> NDArray[np.uint8]:
        """Digests of all blocks as memory is now; holes are not read."""
        blocks = _blocks(region)
        tail = region.size - (blocks - 1) * BLOCK_SIZE
        now = np.empty((blocks, _DIGEST_SIZE), dtype=np.uint8)
        now[:] = self._zeros(BLOCK_SIZE)
        now[-1] = self._zeros(tail)
        busy = np.flatnonzero(content.blocks_with_data(region.fd, region.offset, region.size, BLOCK_SIZE))

        def work(indices: NDArray[np.intp]) -> None:
            scratch = memoryview(bytearray(BLOCK_SIZE))
            for index in indices.tolist():
                part = scratch[: tail if index == blocks - 1 else BLOCK_SIZE]
                content.read_exactly(region.fd, part, region.offset + index * BLOCK_SIZE)
                now[index] = np.frombuffer(self._digest(part), dtype=np.uint8)

        with ThreadPoolExecutor(self._threads, thread_name_prefix="compare") as pool:
            # list(): so that a failure in a thread is raised here.
            list(pool.map(work, (busy[low : low + _STRETCH] for low in range(0, len(busy), _STRETCH))))
        return now


def _blocks(region: Region) -> int:
    return -(-region.size // BLOCK_SIZE)


def _touched(region: Region, runs: PageRuns) -> NDArray[np.intp]:
    """Numbers of the region's blocks that have a page in `runs`."""
    # +1 where a run enters its first block, -1 after its last: blocks with a positive running sum are touched.
    edges = np.zeros(_blocks(region) + 1, dtype=np.int32)
    np.add.at(edges, runs.array[:, 0] // BLOCK_PAGES, 1)
    np.add.at(edges, (runs.array.sum(axis=1) - 1) // BLOCK_PAGES + 1, -1)
    return np.flatnonzero(np.cumsum(edges))
