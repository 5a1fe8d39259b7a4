"""Which pages of a memfd have bytes behind them. Looking does not allocate; reading a hole through a mapping would."""

from __future__ import annotations

import errno
import os
from array import array
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migrate.memory import syscalls
from migrate.memory.addresses import PAGE_SHIFT
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.runs import PageRuns

if TYPE_CHECKING:
    from migrate.memory.region import GuestMemory, Region

#: SEEK_HOLE walks every page of data (8 ms a GiB); when fewer than one page in so many is asked for, asking for each
#: is cheaper.
_SPARSE = 16
#: Pages asked for in one go, and the gap between two beyond which they are asked for separately.
_BATCH = 4096
_GAP = 256


def extents(fd: int, offset: int, size: int) -> NDArray[np.int64]:
    """Runs of data in `size` bytes from `offset`, as pages from `offset` on; shape (n, 2), sorted."""
    edges = array("q")
    position, end = offset, offset + size
    while position < end:
        start = _seek_data(fd, position, end)
        if start >= end:
            break
        position = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        edges.append(start)
        edges.append(position - start)
    pairs = np.array(edges, dtype=np.int64).reshape(-1, 2)
    pairs[:, 0] -= offset
    return pairs >> PAGE_SHIFT


def with_data(memory: GuestMemory, asked: DirtyBitmap) -> DirtyBitmap:
    """Those of the pages asked for that are not holes."""
    wanted = asked.count()
    if wanted * _SPARSE > memory.page_count:
        found = DirtyBitmap.from_runs(memory.data_extents(), memory.page_count)
        found &= asked
        return found
    found = DirtyBitmap(memory.page_count)
    for region, local in memory.by_region(asked.runs()):
        for part in local.split(_BATCH):
            found.set_pages(_with_data(region, part) + region.first_page)
    return found


def _with_data(region: Region, runs: PageRuns) -> NDArray[np.int64]:
    """The same for at most _BATCH pages of one region, numbered from its start."""
    pages = runs.pages_array()
    cached = np.empty(len(pages), dtype=np.bool_)
    # Neighbours share one call; the gaps within a group cost little and are dropped again.
    group_ends = np.flatnonzero(np.diff(pages, append=pages[-1] + _GAP + 1) > _GAP) + 1
    begin = 0
    for stop in group_ends.tolist():
        low, high = int(pages[begin]), int(pages[stop - 1]) + 1
        vector = np.empty(high - low, dtype=np.uint8)
        syscalls.mincore(region.address + (low << PAGE_SHIFT), (high - low) << PAGE_SHIFT, vector.ctypes.data)
        cached[begin:stop] = vector[pages[begin:stop] - low] & 1
        begin = stop
    # What is not in the page cache is a hole, or swapped out; only SEEK_DATA tells, and it leaps over whole holes.
    doubtful = np.flatnonzero(~cached)
    index, end = 0, region.offset + region.size
    while index < len(doubtful):
        at = region.offset + (int(pages[doubtful[index]]) << PAGE_SHIFT)
        data = _seek_data(region.fd, at, end)
        if data == at:
            cached[doubtful[index]] = True
            index += 1
        else:
            index = int(np.searchsorted(pages[doubtful], (data - region.offset) >> PAGE_SHIFT))
    return pages[cached]


def _seek_data(fd: int, position: int, end: int) -> int:
    try:
        return min(os.lseek(fd, position, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end
