"""Writes as a participant does: the store, then the mark where its tracker needs one."""

from __future__ import annotations

import os

from migrate.memory import (
    PAGE_SIZE,
    CompareTracker,
    DirtyBitmap,
    GuestAddress,
    GuestMemory,
    PageRuns,
    Tracker,
    sealed_bytes,
)


class Writer:
    def __init__(self, memory: GuestMemory, tracker: Tracker) -> None:
        self.memory = memory
        self.tracker = tracker

    def store(self, page: int, data: bytes, offset: int = 0) -> None:
        """By loads and stores of this process."""
        gpa = self._gpa(page, offset)
        with self.tracker.lock:
            self.memory.find(gpa, len(data))[:] = data
            self._mark(gpa, len(data))

    def read_into(self, page: int, data: bytes, offset: int = 0) -> None:
        """By a system call that copies into this process's mapping."""
        gpa = self._gpa(page, offset)
        fd = sealed_bytes(data)
        try:
            with self.tracker.lock:
                assert os.preadv(fd, [self.memory.find(gpa, len(data))], 0) == len(data)
                self._mark(gpa, len(data))
        finally:
            os.close(fd)

    def fill(self, page: int, value: int) -> None:
        self.store(page, bytes([value]) * PAGE_SIZE)

    def dirty(self) -> DirtyBitmap:
        found = DirtyBitmap(self.memory.page_count)
        self.tracker.collect(found)
        return found

    def dirty_pages(self) -> list[int]:
        return [int(page) for page in self.dirty().pages_array()]

    def settle(self) -> None:
        """Have everything counted as sent."""
        found = self.dirty()
        if isinstance(self.tracker, CompareTracker):
            for first, count in self.tracker.blocks(found):
                self.tracker.record(first, b"".join(self.memory.views(PageRuns([(first, count)]))))

    def _mark(self, gpa: GuestAddress, length: int) -> None:
        if self.tracker.needs_marks:
            self.tracker.mark(gpa, length)

    def _gpa(self, page: int, offset: int) -> GuestAddress:
        region, number = self.memory.locate(page)
        return GuestAddress(region.gpa + number * PAGE_SIZE + offset)
