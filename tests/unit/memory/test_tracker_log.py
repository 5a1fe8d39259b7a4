"""Store, then mark, then show completion: what a collect in between does, made to happen by events."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from two_regions import PAGES
from writer import Writer

from migrate.memory import PAGE_SIZE, DirtyBitmap, GuestAddress, GuestMemory, LogTracker, PageRuns

PAGE = 11
GPA = GuestAddress(PAGE * PAGE_SIZE)


@pytest.fixture
def log(memory: GuestMemory) -> Iterator[LogTracker]:
    tracker = LogTracker()
    tracker.attach(memory)
    tracker.start()
    yield tracker
    tracker.close()


def copy_page(memory: GuestMemory) -> bytes:
    return bytes(memory.find(GPA, PAGE_SIZE))


def test_a_writer_paused_between_store_and_mark_is_collected_when_it_has_marked(
    memory: GuestMemory, log: LogTracker
) -> None:
    stored, collected = threading.Event(), threading.Event()

    def write() -> None:
        memory.find(GPA, 3)[:] = b"new"
        stored.set()
        assert collected.wait(30)
        log.mark(GPA, 3)

    thread = threading.Thread(target=write)
    thread.start()
    assert stored.wait(30)
    assert Writer(memory, log).dirty_pages() == []
    collected.set()
    thread.join()
    # The bitmap that was active when the writer stored has been collected and put away; the mark is not in it.
    assert Writer(memory, log).dirty_pages() == [PAGE]
    assert copy_page(memory)[:3] == b"new"


def test_a_writer_that_marks_before_it_stores_loses_the_store(memory: GuestMemory, log: LogTracker) -> None:
    """Why the order is what it is: the page is collected and read before the store, and never dirty again."""
    log.mark(GPA, 3)
    assert Writer(memory, log).dirty_pages() == [PAGE]
    sent = copy_page(memory)
    memory.find(GPA, 3)[:] = b"new"
    assert Writer(memory, log).dirty_pages() == []
    assert sent != copy_page(memory)


def test_collect_waits_for_a_writer_that_holds_the_lock_over_store_and_mark(
    memory: GuestMemory, log: LogTracker
) -> None:
    stored, go_on, collected = threading.Event(), threading.Event(), threading.Event()
    found = DirtyBitmap(PAGES)

    def write() -> None:
        with log.lock:
            memory.find(GPA, 3)[:] = b"new"
            stored.set()
            assert go_on.wait(30)
            log.mark(GPA, 3)

    def collect() -> None:
        log.collect(found)
        collected.set()

    writing, collecting = threading.Thread(target=write), threading.Thread(target=collect)
    writing.start()
    assert stored.wait(30)
    collecting.start()
    # Can only fail, never pass by being slow, when collect does not respect the lock.
    assert not collected.wait(0.1)
    go_on.set()
    writing.join()
    collecting.join()
    assert found.pages_array().tolist() == [PAGE]


def test_a_mark_made_while_the_retired_bitmap_is_emptied_is_kept_for_the_next_collect(
    memory: GuestMemory, log: LogTracker
) -> None:
    """The other half of double buffering: collect lets writers go on while it copies."""

    class Meanwhile(DirtyBitmap):
        def __ior__(self, other: DirtyBitmap) -> DirtyBitmap:
            thread = threading.Thread(target=log.mark, args=(GPA, 1))
            thread.start()
            thread.join(30)
            assert not thread.is_alive(), "writers wait for collect"
            return super().__ior__(other)

    log.mark_pages(3, 1)
    found = Meanwhile(PAGES)
    log.collect(found)
    assert found.pages_array().tolist() == [3]
    assert Writer(memory, log).dirty_pages() == [PAGE]
    assert Writer(memory, log).dirty_pages() == []


def test_marks_wait_for_one_another_so_that_none_undoes_its_neighbour_in_the_byte(log: LogTracker) -> None:
    marked = [threading.Event() for _ in range(3)]
    marks = [
        lambda: log.mark(GPA, 1),
        lambda: log.mark_pages(PAGE + 1, 1),
        lambda: log.mark_runs(PageRuns([(PAGE + 2, 1)])),
    ]

    def run(number: int) -> None:
        marks[number]()
        marked[number].set()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    with log.lock:
        for thread in threads:
            thread.start()
        # Can only fail, never pass by being slow, when a mark does not respect the lock.
        assert not any(event.wait(0.05) for event in marked)
    for thread in threads:
        thread.join()
    found = DirtyBitmap(PAGES)
    log.collect(found)
    assert found.runs() == PageRuns([(PAGE, 3)])


def test_the_lock_may_be_held_around_collect(memory: GuestMemory, log: LogTracker) -> None:
    """As a processor does that empties its translations in the same breath."""
    log.mark_runs(PageRuns([(1, 2)]))
    found = DirtyBitmap(PAGES)
    with log.lock:
        log.collect(found)
    assert np.array_equal(found.pages_array(), [1, 2])
