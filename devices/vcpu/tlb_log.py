"""The vCPU's own dirty tracker `log`: the emulated processor's TLB says which pages the guest is about to write.

For kernels without `scan`. A page is marked before the store that dirties it, and a store that was marked is complete when
the slice that it is in has ended; marks are collected between slices only. So a page that is read after `collect` returned
is either as it was collected, or will be in the next collect.
"""

from __future__ import annotations

from threading import RLock
from typing import ClassVar

import numpy as np

from devices.vcpu.engine import Engine
from devices.vcpu.runner import Runner
from migrate.errors import MemoryFault, TrackerError
from migrate.memory.addresses import PAGE_SHIFT, PAGE_SIZE, GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.log import LogTracker
from migrate.memory.region import GuestMemory, RegionSpec
from migrate.memory.runs import PageRuns
from migrate.memory.tracker import Attachment

_CR0_PAGING = 1 << 31


class TlbLog:
    """A migrate.memory.tracker.Tracker."""

    name: ClassVar[str] = "log"
    needs_marks: ClassVar[bool] = False

    def __init__(self, engine: Engine, runner: Runner) -> None:
        self._engine = engine
        self._runner = runner
        self._attachment = Attachment(self.name)
        # For what the processor does not do: holes that are punched.
        self._marks = LogTracker()
        #: For each region one byte a page, in the order of the regions.
        self._written: list[bytearray] = []

    @property
    def lock(self) -> RLock:
        return self._marks.lock

    def attach(self, memory: GuestMemory) -> None:
        self._attachment.attach(memory)
        self._marks.attach(memory)

    def start(self) -> None:
        if self._attachment.started:
            return
        with self._runner.hold():
            if self._engine.registers()["cr0"] & _CR0_PAGING:
                raise TrackerError(
                    "the guest has switched paging on, which the vCPU's tracker log does not follow",
                    remedy="use the tracker scan",
                )
            regions = self._attachment.begin()
            self._written = [bytearray(region.page_count) for region in regions]
            first_pages = [region.gpa >> PAGE_SHIFT for region in regions]
            self._engine.log_writes(list(zip(first_pages, self._written, strict=True)))
            self._marks.start()

    def collect(self, into: DirtyBitmap) -> None:
        regions = self._attachment.check(into)
        self._marks.collect(into)
        with self._runner.hold():
            taken = [bytes(pages) for pages in self._written]
            for pages in self._written:
                pages[:] = bytes(len(pages))
            self._engine.flush_tlb()
        for region, written in zip(regions, taken, strict=True):
            into.set_pages(np.flatnonzero(np.frombuffer(written, dtype=np.uint8)) + region.first_page)

    def mark(self, gpa: GuestAddress, length: int) -> None:
        self._marks.mark(gpa, length)

    def mark_runs(self, runs: PageRuns) -> None:
        self._marks.mark_runs(runs)

    def stop(self) -> None:
        if self._attachment.started:
            with self._runner.hold():
                self._engine.stop_logging()
        self._attachment.end()
        self._marks.stop()
        self._written = []

    def close(self) -> None:
        self.stop()
        self._marks.close()
        self._attachment.detach()


#: Reads page 16; reads, then writes page 17; adds to page 18; writes across the end of page 19; then waits at an unmapped page.
_PROOF = bytes.fromhex(
    "8b042500000100"  # mov eax, [0x10000]
    "8b042500100100"  # mov eax, [0x11000]
    "ff042500100100"  # inc dword [0x11000]
    "83042500200100"
    "01"  # add dword [0x12000], 1
    "48890425fc3f0100"  # mov [0x13ffc], rax
    "ebfe"  # jmp $
)
_PROOF_AT = 0x8000


def prove() -> None:
    """Try it on a scratch processor; some milliseconds. :raise TrackerError: this Unicorn does not do what it must."""
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), 32 * PAGE_SIZE)], "prove")
    engine = Engine()
    region = memory.regions[0]
    engine.map_ram(0, region.size, region.address)
    runner = Runner(engine, lambda: None, lambda failure: None)
    tracker = TlbLog(engine, runner)
    try:
        region.view[_PROOF_AT : _PROOF_AT + len(_PROOF)] = _PROOF
        tracker.attach(memory)
        tracker.start()
        for _ in range(2):  # the second time everything is translated and was in the TLB
            engine.reset(_PROOF_AT)
            engine.stop_requested = False
            engine.run_slice(100)
            found = DirtyBitmap(memory.page_count)
            tracker.collect(found)
            if found.pages_array().tolist() != [17, 18, 19, 20]:
                raise TrackerError(
                    f"the vCPU's tracker log reported pages {found.pages_array().tolist()} where 17 to 20 were written",
                    remedy="this version of Unicorn does not track writes: use the tracker scan, or Unicorn 2.1.4",
                )
    except MemoryFault as error:
        raise TrackerError(error.reason, remedy=error.remedy) from error
    finally:
        tracker.close()
        del engine
        memory.close()
