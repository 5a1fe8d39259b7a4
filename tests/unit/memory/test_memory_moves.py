"""The whole way of memory, as one machine of states: writers, a tracker, the plan, the destination.

Whatever happened, after one last round with the writers at rest both memories are the same: a full compare is the oracle.
Contents come from a small alphabet, so write–send–zero–send, write–send–punch–send and A–B–A happen all the time; and there is
a step that writes between collect and copy.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from two_regions import LAYOUT, PAGES
from writer import Writer

from migrate.errors import TrackerError
from migrate.memory import (
    PAGE_SIZE,
    PAGE_WORDS,
    CompareTracker,
    DirtyBitmap,
    GuestMemory,
    PageRuns,
    SendPlan,
    prove,
)

PAGE = st.integers(0, PAGES - 1)
VALUE = st.integers(0, 3)  # 0 is a page of zeros
RUN = st.tuples(PAGE, st.integers(1, 20)).map(lambda run: PageRuns([(run[0], min(run[1], PAGES - run[0]))]))


class Migration(RuleBasedStateMachine):
    tracker_name: str

    @initialize(before=st.lists(st.tuples(PAGE, VALUE), max_size=10))
    def start(self, before: list[tuple[int, int]]) -> None:
        self.source, self.destination = GuestMemory.create(LAYOUT), GuestMemory.create(LAYOUT)
        self.tracker = prove.make(self.tracker_name)
        self.tracker.attach(self.source)
        self.writer = Writer(self.source, self.tracker)
        self.plan = SendPlan(self.source)
        for page, value in before:
            self.writer.fill(page, value)
        self.tracker.start()
        self.unsent = DirtyBitmap.full(PAGES)

    @rule(page=PAGE, value=VALUE)
    def fill(self, page: int, value: int) -> None:
        self.writer.fill(page, value)

    @rule(page=PAGE, offset=st.integers(0, PAGE_SIZE - 1), value=VALUE)
    def poke(self, page: int, offset: int, value: int) -> None:
        self.writer.store(page, bytes([value]), offset)

    @rule(page=PAGE, value=VALUE)
    def read_into(self, page: int, value: int) -> None:
        self.writer.read_into(page, bytes([value]) * PAGE_SIZE)

    @rule(runs=RUN)
    def punch(self, runs: PageRuns) -> None:
        self.source.punch(runs)

    @rule(page=PAGE)
    def look(self, page: int) -> None:
        """Allocates, where there was a hole; that is no write."""
        region, number = self.source.locate(page)
        assert region.pages[number, 0] >= 0

    @rule()
    def round(self) -> None:
        self._round([])

    @rule(writes=st.lists(st.tuples(PAGE, VALUE), min_size=1, max_size=5))
    def round_with_writes_between_collect_and_copy(self, writes: list[tuple[int, int]]) -> None:
        self._round(writes)

    def _round(self, writes: list[tuple[int, int]]) -> None:
        dirty = self.unsent.take()
        self.tracker.collect(dirty)
        if isinstance(self.tracker, CompareTracker):
            self._send_blocks(self.tracker, dirty, writes)
            return
        allocated = self.source.data_extents()
        data, zero = self.plan.plan(dirty)
        assert self.source.data_extents() == allocated
        for page, value in writes:
            self.writer.fill(page, value)
        pages = np.empty((data.pages, PAGE_WORDS), dtype=np.uint64)
        self.source.gather(data, pages)
        self.destination.scatter(data, pages)
        self.destination.punch(zero)

    def _send_blocks(
        self, tracker: CompareTracker, dirty: DirtyBitmap, writes: list[tuple[int, int]]
    ) -> None:
        for first, count in tracker.blocks(dirty):
            block = PageRuns([(first, count)])
            copy = np.empty((count, PAGE_WORDS), dtype=np.uint64)
            self.source.gather(block, copy)
            for page, value in writes:
                self.writer.fill(page, value)
            data, zero = self.plan.plan_copy(first, copy)
            tracker.record(first, copy.data)
            self.destination.scatter(data, copy[data.pages_array() - first])
            self.destination.punch(zero)

    @invariant()
    def the_destination_holds_no_page_that_is_zero_for_the_plan(self) -> None:
        if hasattr(self, "plan"):
            held = DirtyBitmap.from_runs(self.destination.data_extents(), PAGES)
            assert held == self.plan.sent

    def teardown(self) -> None:
        if hasattr(self, "plan"):
            self._round([])
            differing = self.source.difference(self.destination).pages_array().tolist()
            self.tracker.close()
            self.source.close()
            self.destination.close()
            assert differing == []


@pytest.mark.parametrize("name", ["scan", "log", "compare"])
def test_after_the_last_round_both_memories_are_the_same(name: str, no_leaks: None) -> None:
    try:
        prove.prove(name)
    except TrackerError as error:
        pytest.skip(str(error))

    class ByTracker(Migration):
        tracker_name = name

    run_state_machine_as_test(
        ByTracker, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


@pytest.mark.parametrize("vanish", ["zero", "punch"])
@pytest.mark.parametrize("name", ["scan", "log", "compare"])
def test_a_page_that_was_sent_and_vanished_is_gone_on_the_other_side_too(name: str, vanish: str) -> None:
    """The classic, by hand: write, send, zero or punch, send; and what it costs in pages."""
    try:
        prove.prove(name)
    except TrackerError as error:
        pytest.skip(str(error))
    migration = Migration()
    migration.tracker_name = name
    migration.start([])
    migration.fill(33, 3)
    migration.round()
    assert migration.destination.data_extents() == PageRuns([(33, 1)])
    if vanish == "zero":
        migration.fill(33, 0)
    else:
        migration.punch(PageRuns([(33, 1)]))
    migration.round()
    assert migration.destination.data_extents() == PageRuns()
    migration.teardown()
