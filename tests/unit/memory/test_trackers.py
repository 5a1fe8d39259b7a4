"""One suite for every tracker. `compare` sees whole blocks and goes on until they are recorded; else they are alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from two_regions import HIGH, LAYOUT, PAGES
from writer import Writer

from migrate.errors import MemoryFault, TrackerError
from migrate.memory import (
    PAGE_SIZE,
    CompareTracker,
    DirtyBitmap,
    GuestAddress,
    GuestMemory,
    PageRuns,
    RegionSpec,
    Tracker,
    create_memfd,
    prove,
)

#: For tests of what `compare` does differently; see test_tracker_compare.py.
WITHOUT_COMPARE = pytest.mark.parametrize("tracker", ["scan", "log"], indirect=True)


@pytest.fixture(params=["scan", "log", "compare"])
def tracker(request: pytest.FixtureRequest) -> Iterator[Tracker]:
    try:
        prove.prove(request.param)
    except TrackerError as error:
        pytest.skip(str(error))
    tracker = prove.make(request.param)
    yield tracker
    tracker.close()


@pytest.fixture
def writer(memory: GuestMemory, tracker: Tracker) -> Writer:
    tracker.attach(memory)
    return Writer(memory, tracker)


def seen(tracker: Tracker, *pages: int) -> list[int]:
    """What a tracker reports of writes to `pages`."""
    if not isinstance(tracker, CompareTracker):
        return sorted(pages)
    found = set()
    for page in pages:
        first, end = (0, 21) if page < 21 else (21, 64)
        block = first + (page - first) // 16 * 16
        found |= set(range(block, min(block + 16, end)))
    return sorted(found)


def test_nothing_is_dirty_right_after_the_start_and_what_is_written_then_is(writer: Writer) -> None:
    writer.tracker.start()
    assert writer.dirty_pages() == []
    writer.fill(5, 1)
    writer.store(63, b"last byte", offset=PAGE_SIZE - 9)
    writer.store(21, b"first of the second region")
    assert writer.dirty_pages() == seen(writer.tracker, 5, 21, 63)


@WITHOUT_COMPARE
def test_what_was_written_before_the_start_is_not_dirty(writer: Writer) -> None:
    for page in range(0, PAGES, 2):
        writer.fill(page, 1)
    writer.tracker.start()
    assert writer.dirty_pages() == []
    writer.fill(4, 2)
    writer.fill(7, 2)
    assert writer.dirty_pages() == [4, 7]


def test_starting_twice_forgets_nothing(writer: Writer) -> None:
    writer.tracker.start()
    writer.fill(9, 1)
    writer.tracker.start()
    assert writer.dirty_pages() == seen(writer.tracker, 9)


def test_what_was_collected_is_clean_until_it_is_written_again(writer: Writer) -> None:
    writer.tracker.start()
    for value in range(1, 5):
        writer.fill(12, value)
        writer.fill(40, value)
        assert writer.dirty_pages() == seen(writer.tracker, 12, 40)
        writer.settle()
        assert writer.dirty_pages() == []


def test_what_a_system_call_writes_through_the_mapping_is_seen(writer: Writer) -> None:
    writer.tracker.start()
    writer.read_into(17, bytes([3]) * (PAGE_SIZE + 1), offset=1)
    assert writer.dirty_pages() == seen(writer.tracker, 17, 18)
    writer.settle()
    writer.read_into(17, b"again")
    assert writer.dirty_pages() == seen(writer.tracker, 17)


def test_reading_dirties_nothing(writer: Writer) -> None:
    writer.fill(3, 1)
    writer.tracker.start()
    writer.settle()
    assert [sum(region.view) for region in writer.memory.regions] == [PAGE_SIZE, 0]
    assert writer.dirty_pages() == []


def test_a_punched_page_is_dirty_and_seen_again_when_it_is_written_after_that(writer: Writer) -> None:
    for page in range(PAGES):
        writer.fill(page, 1)
    writer.tracker.start()
    writer.settle()
    writer.memory.punch(PageRuns([(19, 5), (50, 1)]))
    assert writer.dirty_pages() == seen(writer.tracker, 19, 20, 21, 22, 23, 50)
    writer.settle()
    assert writer.dirty_pages() == []
    writer.fill(20, 2)
    writer.fill(50, 2)
    assert writer.dirty_pages() == seen(writer.tracker, 20, 50)


def test_a_mark_is_collected_like_a_write(writer: Writer) -> None:
    writer.tracker.start()
    writer.tracker.mark(GuestAddress(HIGH + PAGE_SIZE - 1), 2)
    writer.tracker.mark_runs(PageRuns([(0, 1), (20, 2)]))
    expected = [] if isinstance(writer.tracker, CompareTracker) else [0, 20, 21, 22]
    assert writer.dirty_pages() == expected
    assert writer.dirty_pages() == []


def test_collecting_ors_into_what_is_there(writer: Writer) -> None:
    writer.tracker.start()
    writer.fill(30, 1)
    found = DirtyBitmap(PAGES)
    found.set_range(1, 1)
    writer.tracker.collect(found)
    assert found.pages_array().tolist() == sorted({1, *seen(writer.tracker, 30)})


def test_a_stopped_tracker_refuses_to_collect_and_starts_afresh(writer: Writer) -> None:
    writer.tracker.start()
    writer.fill(2, 1)
    writer.tracker.stop()
    writer.tracker.stop()
    with pytest.raises(TrackerError, match="is not started"):
        writer.dirty()
    writer.fill(2, 0)
    writer.tracker.start()
    assert writer.dirty_pages() == []


def test_marks_cost_nothing_and_mean_nothing_while_stopped(writer: Writer) -> None:
    writer.tracker.mark(GuestAddress(0), 1)
    writer.tracker.mark_runs(PageRuns([(3, 1)]))
    writer.memory.punch(PageRuns([(4, 1)]))
    writer.tracker.start()
    assert writer.dirty_pages() == []


def test_a_tracker_without_memory_says_so(tracker: Tracker) -> None:
    with pytest.raises(TrackerError, match="has no memory"):
        tracker.start()


def test_a_region_that_was_attached_while_tracking_is_an_error_not_a_clean_page(writer: Writer) -> None:
    writer.tracker.start()
    fd = create_memfd("late", PAGE_SIZE)
    writer.memory.attach(GuestAddress(1 << 40), PAGE_SIZE, fd)
    with pytest.raises(TrackerError, match="regions changed"):
        writer.tracker.collect(DirtyBitmap(PAGES + 1))


def test_a_region_that_was_closed_while_tracking_is_an_error_not_a_clean_page(writer: Writer) -> None:
    writer.tracker.start()
    writer.memory.regions[1].close()
    with pytest.raises(TrackerError, match="regions changed"):
        writer.dirty()


def test_a_bitmap_of_another_machine_is_refused_and_nothing_is_lost(writer: Writer) -> None:
    writer.tracker.start()
    writer.fill(8, 1)
    with pytest.raises(TrackerError, match="bitmap of 63 pages for memory of 64"):
        writer.tracker.collect(DirtyBitmap(PAGES - 1))
    assert writer.dirty_pages() == seen(writer.tracker, 8)


def test_memory_cannot_be_exchanged_while_tracking(writer: Writer) -> None:
    writer.tracker.start()
    other = GuestMemory.create(LAYOUT)
    with pytest.raises(TrackerError, match="stop it first"):
        writer.tracker.attach(other)
    writer.tracker.stop()
    writer.tracker.attach(other)
    writer.tracker.start()
    writer.memory.punch(PageRuns([(1, 1)]))
    assert Writer(other, writer.tracker).dirty_pages() == []
    writer.tracker.close()
    other.close()


def test_a_closed_tracker_holds_nothing(tracker: Tracker, no_leaks: None) -> None:
    for _ in range(2):
        memory = GuestMemory.create(LAYOUT)
        tracker.attach(memory)
        tracker.start()
        Writer(memory, tracker).fill(3, 1)
        Writer(memory, tracker).dirty()
        tracker.close()
        memory.punch(PageRuns([(3, 1)]))
        memory.close()


@WITHOUT_COMPARE
def test_alternate_pages_of_a_large_memory_are_told_apart(tracker: Tracker) -> None:
    memory = GuestMemory.create(
        [RegionSpec(GuestAddress(0), 10000 * PAGE_SIZE), RegionSpec(HIGH, 9000 * PAGE_SIZE)]
    )
    tracker.attach(memory)
    tracker.start()
    writer = Writer(memory, tracker)
    expected = []
    for page in [*range(1, 19000, 2), *range(3000, 7000)]:
        writer.store(page, b"x")
        expected.append(page)
    # More ranges than one call of the kernel answers with.
    assert writer.dirty_pages() == sorted(set(expected))
    assert writer.dirty_pages() == []
    tracker.close()
    memory.close()


def test_no_write_is_lost_to_a_collect_that_runs_beside_it(writer: Writer) -> None:
    """A writer counts in every page in turn; a page that was copied after collect has what was last written, in the end."""
    writer.tracker.start()
    copy = GuestMemory.create(LAYOUT)
    enough = threading.Event()

    def write() -> None:
        count = 0
        while not enough.is_set() or count < 3000:
            count += 1
            writer.store(count * 7 % PAGES, count.to_bytes(8, "little"), offset=count % 500 * 8)

    def transfer() -> None:
        dirty = writer.dirty()
        if isinstance(writer.tracker, CompareTracker):
            for first, pages in writer.tracker.blocks(dirty):
                runs = PageRuns([(first, pages)])
                staging = np.empty((pages, 512), dtype=np.uint64)
                writer.memory.gather(runs, staging)
                writer.tracker.record(first, staging.data)
                copy.scatter(runs, staging)
        else:
            runs = dirty.runs()
            staging = np.empty((runs.pages, 512), dtype=np.uint64)
            writer.memory.gather(runs, staging)
            copy.scatter(runs, staging)

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(100):
        transfer()
    enough.set()
    thread.join()
    transfer()
    assert writer.memory.difference(copy).pages_array().tolist() == []
    copy.close()


def test_a_participant_that_said_it_writes_nothing_and_writes_is_told(memory: GuestMemory) -> None:
    tracker = prove.make("none")
    tracker.attach(memory)
    tracker.start()
    assert Writer(memory, tracker).dirty_pages() == []
    with pytest.raises(TrackerError, match="writes no guest memory"):
        Writer(memory, tracker).fill(0, 1)
    tracker.close()


def test_a_mark_outside_memory_is_refused(memory: GuestMemory) -> None:
    tracker = prove.make("log")
    tracker.attach(memory)
    tracker.start()
    with pytest.raises(MemoryFault, match="not inside one memory region"):
        tracker.mark(GuestAddress(21 * PAGE_SIZE), 1)
    tracker.close()
