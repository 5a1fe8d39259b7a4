from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from two_regions import LAYOUT, PAGES
from writer import Writer

from migrate.errors import TrackerError
from migrate.memory import PAGE_SIZE, PAGE_WORDS, CompareTracker, DirtyBitmap, GuestMemory, PageRuns


@pytest.fixture
def compare(memory: GuestMemory) -> Iterator[CompareTracker]:
    tracker = CompareTracker()
    tracker.attach(memory)
    tracker.start()
    yield tracker
    tracker.close()


def test_what_holds_bytes_at_the_start_is_dirty_because_the_destination_has_zeros(
    memory: GuestMemory,
) -> None:
    memory.regions[0].pages[3] = 1
    memory.regions[1].pages[40] = 1
    tracker = CompareTracker()
    tracker.attach(memory)
    tracker.start()
    assert Writer(memory, tracker).dirty_pages() == [*range(16), *range(21 + 32, 64)]
    tracker.close()


def test_a_block_that_went_a_b_sent_a_is_dirty(memory: GuestMemory, compare: CompareTracker) -> None:
    writer = Writer(memory, compare)
    writer.fill(0, 0xA)
    writer.settle()
    writer.fill(0, 0xB)
    assert writer.dirty_pages() == [*range(16)]
    copy = bytes(memory.regions[0].view[: 16 * PAGE_SIZE])  # B: what is sent
    writer.fill(0, 0xA)  # and memory is as it was at the last collect but one
    compare.record(0, copy)
    assert writer.dirty_pages() == [*range(16)]


@given(st.lists(st.sampled_from(["A", "B", "zero", "copy", "record", "collect"]), max_size=40))
def test_a_block_is_dirty_exactly_when_it_is_not_what_was_sent(steps: list[str]) -> None:
    memory = GuestMemory.create(LAYOUT)
    tracker = CompareTracker(threads=1)
    tracker.attach(memory)
    tracker.start()
    writer = Writer(memory, tracker)
    # The short block at the end of the first region: pages 16 to 20.
    view = memory.regions[0].view[16 * PAGE_SIZE :]
    destination = copy = bytes(len(view))
    for step in steps:
        if step == "copy":
            copy = bytes(view)
        elif step == "record":
            tracker.record(16, copy)
            destination = copy
        elif step == "collect":
            assert writer.dirty_pages() == ([] if view == destination else [*range(16, 21)])
        else:
            writer.fill(18, {"A": 1, "B": 2, "zero": 0}[step])
    assert writer.dirty_pages() == ([] if view == destination else [*range(16, 21)])
    del view
    tracker.close()
    memory.close()


def test_what_was_forgotten_is_dirty_even_if_it_is_the_same(
    memory: GuestMemory, compare: CompareTracker
) -> None:
    writer = Writer(memory, compare)
    compare.forget(PageRuns([(15, 2), (63, 1)]))
    assert writer.dirty_pages() == [*range(21), *range(21 + 32, 64)]
    writer.settle()
    assert writer.dirty_pages() == []


def test_blocks_are_whole_and_within_their_region(compare: CompareTracker) -> None:
    dirty = DirtyBitmap(PAGES)
    dirty.set_pages(np.array([0, 15, 20, 21, 63]))
    assert list(compare.blocks(dirty)) == [(0, 16), (16, 5), (21, 16), (53, 11)]
    dirty.clear()
    dirty.set_range(15, 23)
    assert list(compare.blocks(dirty)) == [(0, 16), (16, 5), (21, 16), (37, 16)]


@pytest.mark.parametrize(
    ("first", "pages"), [(1, 16), (0, 15), (0, 17), (16, 6), (16, 4), (53, 12), (64, 16)]
)
def test_only_whole_blocks_are_recorded(compare: CompareTracker, first: int, pages: int) -> None:
    with pytest.raises(Exception) as caught:
        compare.record(first, bytes(pages * PAGE_SIZE))
    assert isinstance(caught.value, TrackerError) or "not among the 64" in str(caught.value)


def test_several_blocks_are_recorded_at_once(memory: GuestMemory, compare: CompareTracker) -> None:
    data = np.arange(43 * PAGE_WORDS, dtype=np.uint64).reshape(43, PAGE_WORDS)
    compare.record(21, data.data)
    assert Writer(memory, compare).dirty_pages() == [*range(21, 64)]
    memory.scatter(PageRuns([(21, 43)]), data)
    assert Writer(memory, compare).dirty_pages() == []


def test_each_instance_has_a_key_of_its_own(compare: CompareTracker) -> None:
    assert CompareTracker()._digest(b"page") != compare._digest(b"page")
