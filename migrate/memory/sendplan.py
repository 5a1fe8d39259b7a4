"""What of the dirty pages must cross: the sender's rule of DESIGN 2.1. Decides; sends nothing, punches nothing.

dirty page        sent before       never sent
has bytes         data              data
zero, or a hole   zero run          nothing: the destination has zeros there already
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from migrate.memory import holes
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.mapping import Pages, Region
from migrate.memory.region import GuestMemory
from migrate.memory.runs import PageRuns

#: Pages looked at in one go: what bounds the memory that a plan takes.
_BATCH = 4096
#: Pages that look zero are copied to be read whole, so many at a time (1 MiB stays in the cache).
_SUSPECTS = 256
#: Words looked at first. Nearly every page that is not zero shows it here, at one to four cache lines a page instead of 64.
_SAMPLES = (0, 511, 170, 341)


class SendPlan:
    """Turns dirty pages into what to send, and remembers in `sent` which pages of the destination are not zero.

    The caller collects first and plans after: a page that changes between the two is dirty again. The plan counts as
    carried out, so give up the migration where sending fails.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.sent = DirtyBitmap(memory.page_count)

    def plan(self, dirty: DirtyBitmap) -> tuple[PageRuns, PageRuns]:
        """(runs to send with their bytes, runs to send as ZERO). Reads the dirty pages, but no hole.

        :raise MemoryFault: `dirty` is of another size.
        """
        data = nonzero(self._memory, dirty)
        zero = dirty.copy()
        zero -= data
        zero &= self.sent
        self.sent |= data
        self.sent -= zero
        return data.runs(), zero.runs()

    def plan_copy(self, first_page: int, copy: Pages) -> tuple[PageRuns, PageRuns]:
        """The same for pages from `first_page` on that are sent from a copy, which alone is judged."""
        numbers = np.arange(len(copy), dtype=np.int64)
        has_bytes = _has_bytes(copy, numbers)
        pages = numbers + first_page
        data, zero = pages[has_bytes], pages[~has_bytes & self.sent.contains_pages(pages)]
        self.sent.set_pages(data)
        self.sent.clear_pages(zero)
        return PageRuns.from_pages(data), PageRuns.from_pages(zero)


def nonzero(memory: GuestMemory, asked: DirtyBitmap) -> DirtyBitmap:
    """Those of the pages asked for that have a byte other than zero."""
    found = DirtyBitmap(memory.page_count)
    for region, local in memory.by_region(holes.with_data(memory, asked).runs()):
        for part in local.split(_BATCH):
            found.set_pages(_nonzero(region, part) + region.first_page)
    return found


def _nonzero(region: Region, runs: PageRuns) -> NDArray[np.int64]:
    pages = runs.pages_array()
    return pages[_has_bytes(region.pages, pages)]


def _has_bytes(memory: Pages, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
    answer: NDArray[np.bool_] = memory[pages, _SAMPLES[0]] != 0
    for word in _SAMPLES[1:]:
        left = np.flatnonzero(~answer)
        answer[left] = memory[pages[left], word] != 0
    suspects = np.flatnonzero(~answer)
    for low in range(0, len(suspects), _SUSPECTS):
        part = suspects[low : low + _SUSPECTS]
        answer[part] = np.bitwise_or.reduce(memory[pages[part]], axis=1) != 0
    return answer
