from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from two_regions import LAYOUT, PAGES

from migrate.errors import MemoryFault
from migrate.memory import (
    PAGE_SIZE,
    PAGE_WORDS,
    DirtyBitmap,
    GuestAddress,
    GuestMemory,
    PageRuns,
    RegionSpec,
    SendPlan,
)
from migrate.memory.sendplan import nonzero

EVERYTHING = DirtyBitmap.full(PAGES)


def store(memory: GuestMemory, *pages: int, value: int = 1) -> None:
    for page in pages:
        region, number = memory.locate(page)
        region.pages[number] = value


def test_the_first_round_sends_what_has_bytes_and_nothing_for_zeros_and_holes(memory: GuestMemory) -> None:
    store(memory, 2, 3, 20, 21)
    store(memory, 5, 50, value=0)
    plan = SendPlan(memory)
    assert plan.plan(EVERYTHING) == (PageRuns([(2, 2), (20, 2)]), PageRuns())
    assert plan.sent.pages_array().tolist() == [2, 3, 20, 21]


def test_a_page_that_was_sent_and_is_now_zero_or_a_hole_is_sent_as_zero_once(memory: GuestMemory) -> None:
    store(memory, 2, 3, 4)
    plan = SendPlan(memory)
    plan.plan(EVERYTHING)
    store(memory, 2, 30, value=0)
    memory.punch(PageRuns([(4, 1)]))
    assert plan.plan(EVERYTHING) == (PageRuns([(3, 1)]), PageRuns([(2, 1), (4, 1)]))
    assert plan.plan(EVERYTHING) == (PageRuns([(3, 1)]), PageRuns())
    store(memory, 4)
    assert plan.plan(EVERYTHING) == (PageRuns([(3, 2)]), PageRuns())


def test_only_dirty_pages_are_looked_at(memory: GuestMemory) -> None:
    store(memory, 2, 3)
    plan = SendPlan(memory)
    dirty = DirtyBitmap(PAGES)
    dirty.set_range(3, 1)
    assert plan.plan(dirty) == (PageRuns([(3, 1)]), PageRuns())
    assert plan.sent.pages_array().tolist() == [3]


@pytest.mark.parametrize("word", [0, 1, 169, 170, 171, 255, 341, 510, 511])
def test_one_byte_anywhere_makes_a_page_worth_sending(memory: GuestMemory, word: int) -> None:
    store(memory, 30, 31, value=0)
    memory.find(GuestAddress((1 << 32) + 9 * PAGE_SIZE + word * 8 + 7), 1)[:] = b"\x80"
    assert SendPlan(memory).plan(EVERYTHING) == (PageRuns([(30, 1)]), PageRuns())


def test_planning_allocates_nothing(memory: GuestMemory) -> None:
    store(memory, 1, 40)
    plan = SendPlan(memory)
    plan.plan(EVERYTHING)
    memory.punch(PageRuns([(40, 1)]))
    plan.plan(EVERYTHING)
    assert sum(os.fstat(region.fd).st_blocks * 512 for region in memory.regions) == PAGE_SIZE


def test_a_bitmap_of_another_machine_is_refused(memory: GuestMemory) -> None:
    for pages in (PAGES - 1, PAGES + 1):
        with pytest.raises(MemoryFault):
            SendPlan(memory).plan(DirtyBitmap.full(pages))


@given(st.data())
def test_a_plan_of_a_copy_is_the_plan_of_memory_with_that_content(data: st.DataObject) -> None:
    memory = GuestMemory.create(LAYOUT)
    by_memory, by_copy = SendPlan(memory), SendPlan(memory)
    for _ in range(3):
        pages = data.draw(st.sets(st.integers(0, PAGES - 1)))
        store(memory, *range(PAGES), value=0)
        store(memory, *pages, value=data.draw(st.integers(1, 9)))
        first = data.draw(st.integers(0, PAGES - 1))
        count = data.draw(st.integers(1, PAGES - first))
        copy = np.empty((count, PAGE_WORDS), dtype=np.uint64)
        memory.gather(PageRuns([(first, count)]), copy)
        dirty = DirtyBitmap(PAGES)
        dirty.set_range(first, count)
        expected = by_memory.plan(dirty)
        store(memory, *range(PAGES), value=7)  # the copy alone counts
        assert by_copy.plan_copy(first, copy) == expected
        assert by_copy.sent == by_memory.sent
    memory.close()


def test_batches_do_not_show() -> None:
    """Memory of several batches, with zero pages at their edges."""
    pages = 10000
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), pages * PAGE_SIZE)])
    words = memory.regions[0].pages
    words[:, 13] = np.arange(pages) % 3
    found = nonzero(memory, DirtyBitmap.full(pages))
    assert found.pages_array().tolist() == [page for page in range(pages) if page % 3]
    del words
    memory.close()
