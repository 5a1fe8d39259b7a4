"""The vCPU's tracker `log` against a full compare of memory, and beside the tracker `scan`."""

from __future__ import annotations

import numpy as np
import pytest
import vcpu_programs as programs
from hypothesis import given, settings
from hypothesis import strategies as st
from vcpu_box import MEMORY, MIB, Box

from devices.vcpu import tlb_log
from devices.vcpu.tlb_log import TlbLog
from migrate.errors import TrackerError
from migrate.memory import prove
from migrate.memory.addresses import GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.region import GuestMemory, RegionSpec
from migrate.memory.runs import PageRuns
from migrate.memory.tracker import Tracker

PAGES = MEMORY >> 12


@pytest.fixture(params=["scan", "log"])
def tracker_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "scan":
        try:
            prove.prove("scan")
        except TrackerError as error:
            pytest.skip(str(error))
    return name


def track(box: Box, name: str) -> Tracker:
    tracker = TlbLog(box.engine, box.runner) if name == "log" else prove.make(name)
    tracker.attach(box.memory)
    tracker.start()
    return tracker


def collect(tracker: Tracker) -> DirtyBitmap:
    found = DirtyBitmap(PAGES)
    tracker.collect(found)
    return found


class Copy:
    """What a destination has: the pages that were collected, as they were right after that."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.memory = GuestMemory.create([RegionSpec(GuestAddress(0), MEMORY)], "copy")
        self.memory.regions[0].pages[:] = box.region.pages

    def take(self, dirty: DirtyBitmap) -> int:
        pages = dirty.pages_array()
        self.memory.regions[0].pages[pages] = self.box.region.pages[pages]
        return len(pages)


@pytest.mark.parametrize("name", programs.WRITERS)
def test_pages_collected_while_the_guest_runs_make_a_whole_copy_after_it_has_stopped(
    name: str, tracker_name: str
) -> None:
    with Box(programs.WRITERS[name], 12345) as box:
        tracker, copy = track(box, tracker_name), Copy(box)
        box.runner.run()
        for _ in range(20):
            copy.take(collect(tracker))
        box.runner.rest()
        copy.take(collect(tracker))
        assert copy.memory.equal_to(box.memory)
        assert not collect(tracker).any()
        tracker.close()
        copy.memory.close()


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(sorted(programs.WRITERS)),
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(["step", "collect", "punch", "restart"]), min_size=4, max_size=25),
)
def test_whatever_happens_between_the_copy_is_whole_after_the_last_collect(
    name: str, eax: int, events: list[str]
) -> None:
    with Box(programs.WRITERS[name], eax) as box:
        tracker, copy = track(box, "log"), Copy(box)
        for number, event in enumerate(events):
            match event:
                case "step":
                    box.step(100 + 300 * number)
                case "collect":
                    copy.take(collect(tracker))
                case "punch":
                    box.memory.punch(PageRuns.merged(np.array([[0x200 + number, 3]], dtype=np.int64)))
                case "restart":
                    copy.take(collect(tracker))
                    tracker.stop()
                    tracker.start()
        copy.take(collect(tracker))
        assert copy.memory.equal_to(box.memory)
        tracker.close()
        copy.memory.close()


def test_nothing_is_dirty_at_the_start_and_nothing_after_it_was_collected() -> None:
    with Box(programs.STORES, 1) as box:
        box.step(1000)
        tracker = track(box, "log")
        assert not collect(tracker).any()
        box.step(1000)
        assert collect(tracker).any()
        assert not collect(tracker).any()
        tracker.close()


def test_it_reports_about_as_much_as_scan_does() -> None:
    """It may mark a page whose store came to nothing; it may not mark the world."""
    with Box(programs.READS_THEN_WRITES, 1) as box:
        tracker = track(box, "log")
        before = box.region.pages.copy()
        box.step(20_000)
        changed = int((before != box.region.pages).any(axis=1).sum())
        assert changed <= collect(tracker).count() <= changed + 5
        tracker.close()


def test_regions_are_numbered_as_the_machine_numbers_them() -> None:
    """Pages after a hole in the addresses: the number of a page is not its address."""
    with Box(programs.STORES, 1) as box:
        box.memory.close()
        box.memory = GuestMemory.create(
            [RegionSpec(GuestAddress(start), size) for start, size in ((0, MIB), (MIB, MIB), (8 * MIB, MIB))],
            "holes",
        )
        engine = type(box.engine)()
        for region in box.memory.regions:
            engine.map_ram(region.gpa, region.size, region.address)
        # mov [0x1ff000], rax; mov [0x800000], rax; jmp $
        code = bytes.fromhex("4889042500f01f004889042500008000ebfe")
        box.memory.regions[1].view[: len(code)] = code
        engine.reset(MIB)
        box.runner._engine = box.engine = engine
        tracker = TlbLog(engine, box.runner)
        tracker.attach(box.memory)
        tracker.start()
        box.step(100)
        found = DirtyBitmap(box.memory.page_count)
        tracker.collect(found)
        assert found.pages_array().tolist() == [256 + 255, 512]
        tracker.close()


def test_it_proves_itself_and_is_refused_where_the_processor_marks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tlb_log.prove()
    monkeypatch.setattr("devices.vcpu.engine.Engine.log_writes", lambda engine, marks: None)
    with pytest.raises(TrackerError, match="reported pages"):
        tlb_log.prove()


def test_a_guest_with_paging_is_refused() -> None:
    with Box(programs.COUNT) as box:
        box.engine.registers = lambda: {"cr0": 0x8000_0011}  # type: ignore[method-assign]
        tracker = TlbLog(box.engine, box.runner)
        tracker.attach(box.memory)
        with pytest.raises(TrackerError, match="paging"):
            tracker.start()
