"""The dirty tracker `log` of a device behind a bridge: the server's DMA logging, asked for each window that the VMM has mapped.

The server marks a page after it has written it and before it shows that it has (vfio-user's DMA_LOGGING_REPORT gets and clears), so
the order that loses nothing holds: collected, then read. No other tracker can see what that process writes.
"""

from __future__ import annotations

from threading import RLock
from typing import ClassVar

import numpy as np

from devices.bridges.vfio_user.upstream import Upstream
from devices.kit.access import MemoryAccess, Window
from migrate.errors import TrackerError
from migrate.memory.addresses import PAGE_SHIFT, PAGE_SIZE, GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.log import LogTracker
from migrate.memory.region import GuestMemory
from migrate.memory.runs import PageRuns
from migrate.memory.tracker import Attachment


class DmaLogTracker:
    """A migrate.memory.tracker.Tracker. Called with the participant's lock held, as the windows change under it."""

    name: ClassVar[str] = "log"
    needs_marks: ClassVar[bool] = False

    def __init__(self, upstream: Upstream, access: MemoryAccess) -> None:
        self._upstream = upstream
        self._access = access
        self._attachment = Attachment(self.name)
        #: What windows had that are gone, and holes that are punched.
        self._marks = LogTracker()
        self._page = PAGE_SIZE

    @property
    def lock(self) -> RLock:
        return self._marks.lock

    def attach(self, memory: GuestMemory) -> None:
        self._attachment.attach(memory)
        self._marks.attach(memory)

    def start(self) -> None:
        if self._attachment.started:
            return
        ranges = [(window.address, window.size) for window in self._windows()]
        page = self._upstream.migration.start_logging(PAGE_SIZE, ranges)
        if page <= 0 or page & page - 1:
            raise TrackerError(
                f"its vfio-user server logs writes by pages of {page} bytes", remedy="use the tracker compare"
            )
        # Never finer than the log itself: libvfio-user does not come back from that.
        self._page = max(page, PAGE_SIZE)
        self._attachment.begin()
        self._marks.start()

    def collect(self, into: DirtyBitmap) -> None:
        self._attachment.check(into)
        self._marks.collect(into)
        for window in self._windows():
            self._report(window, into)

    def _windows(self) -> list[Window]:
        return [window for window in self._access.windows if window.writable and not window.private]

    def _report(self, window: Window, into: DirtyBitmap) -> None:
        bits = self._upstream.migration.dirty(window.address, window.size, self._page)
        written = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"))
        each, pages = self._page >> PAGE_SHIFT, window.size >> PAGE_SHIFT
        found = (written[:, None] * each + np.arange(each)).ravel()
        first = window.region.first_page + (window.offset >> PAGE_SHIFT)
        into.set_pages(first + found[found < pages])

    def mark(self, gpa: GuestAddress, length: int) -> None:
        self._marks.mark(gpa, length)

    def mark_runs(self, runs: PageRuns) -> None:
        self._marks.mark_runs(runs)

    def stop(self) -> None:
        if self._attachment.started:
            self._attachment.end()
            self._upstream.migration.stop_logging()
        self._marks.stop()

    def close(self) -> None:
        self.stop()
        self._marks.close()
        self._attachment.detach()
