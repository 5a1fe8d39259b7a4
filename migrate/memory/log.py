"""The tracker `log`: a bitmap that this process's own writes mark. Works on every kernel; sees nothing by itself."""

from __future__ import annotations

from threading import Lock, RLock
from typing import ClassVar

from migrate.memory.addresses import GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.region import GuestMemory
from migrate.memory.runs import PageRuns
from migrate.memory.tracker import Attachment


class LogTracker:
    """Two bitmaps: writers mark one under `lock`, collect swaps them under it and empties the other at leisure.

    A mark therefore never lands in a bitmap that is being collected, and a writer that stores and marks within one
    `with tracker.lock` is collected before both or after both. One that marks without holding it across the store, and is
    collected in between, shows up at the next collect: the page is sent once more, not lost, as long as the last collect
    comes after the writer has stopped.
    """

    name: ClassVar[str] = "log"
    needs_marks: ClassVar[bool] = True

    def __init__(self) -> None:
        self.lock = RLock()
        self._attachment = Attachment(self.name)
        self._collecting = Lock()
        self._active = DirtyBitmap(0)
        self._spare = DirtyBitmap(0)

    def attach(self, memory: GuestMemory) -> None:
        self._attachment.attach(memory, self.mark_runs)

    def start(self) -> None:
        with self.lock:
            if not self._attachment.started:
                pages = self._attachment.memory.page_count
                self._active, self._spare = DirtyBitmap(pages), DirtyBitmap(pages)
                self._attachment.begin()

    def collect(self, into: DirtyBitmap) -> None:
        with self._collecting:
            self._attachment.check(into)
            with self.lock:
                full, self._active = self._active, self._spare
            into |= full
            full.clear()
            self._spare = full

    def mark(self, gpa: GuestAddress, length: int) -> None:
        if self._attachment.started:
            self.mark_pages(*self._attachment.memory.page_span(gpa, length))

    def mark_pages(self, first: int, count: int) -> None:
        """Mark pages by index. Nothing when not started. :raise MemoryFault: past the end of memory."""
        with self.lock:
            if self._attachment.started:
                self._active.set_range(first, count)

    def mark_runs(self, runs: PageRuns) -> None:
        with self.lock:
            if self._attachment.started:
                self._active.set_runs(runs)

    def stop(self) -> None:
        with self._collecting, self.lock:
            self._attachment.end()
            self._active, self._spare = DirtyBitmap(0), DirtyBitmap(0)

    def close(self) -> None:
        self.stop()
        self._attachment.detach()
