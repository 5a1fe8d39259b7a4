"""Which trackers there are, and whether one works here: tried on scratch memory of the same kind, not assumed.

(Soft-dirty tracking, for one, "works" without an error on kernels that were built without it, and never reports a page.)
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from migrate.errors import TrackerError
from migrate.memory.addresses import PAGE_SIZE, GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.compare import CompareTracker
from migrate.memory.log import LogTracker
from migrate.memory.memfd import sealed_bytes
from migrate.memory.region import GuestMemory, RegionSpec
from migrate.memory.scan import ScanTracker
from migrate.memory.tracker import NoTracker, Tracker

_TRACKERS: dict[str, Callable[[], Tracker]] = {
    "scan": ScanTracker,
    "log": LogTracker,
    "compare": CompareTracker,
    "none": NoTracker,
}
#: In order of preference; the others are by explicit wish only.
_AUTOMATIC = ("scan", "log")
_SCRATCH_PAGES = 64


def make(name: str) -> Tracker:
    """A new tracker. :raise TrackerError: there is none of that name."""
    if name not in _TRACKERS:
        raise TrackerError(f"there is no tracker {name!r}", remedy=f"use one of {', '.join(_TRACKERS)}")
    return _TRACKERS[name]()


def prove(name: str) -> None:
    """Try a tracker on scratch memory; a millisecond. :raise TrackerError: it does not work here, with the reason."""
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), _SCRATCH_PAGES * PAGE_SIZE)], "prove")
    tracker = make(name)
    try:
        tracker.attach(memory)
        if name != "none":
            _try(tracker, memory)
    finally:
        tracker.close()
        memory.close()


def choose(wanted: str | None) -> str:
    """The tracker to use: the one wanted, or the best that proves itself.

    :raise TrackerError: the one wanted does not work here, or none does.
    """
    if wanted is not None:
        prove(wanted)
        return wanted
    failures = []
    for name in _AUTOMATIC:
        try:
            prove(name)
        except TrackerError as error:
            failures.append(error.reason)
        else:
            return name
    raise TrackerError(
        f"no dirty tracker works here: {'; '.join(failures)}", remedy="use the tracker compare"
    )


def _try(tracker: Tracker, memory: GuestMemory) -> None:
    tracker.start()
    _expect(tracker, memory, [])
    pages = memory.regions[0].pages
    # Never touched; neighbours; through a system call; a page that was collected already.
    for page in (3, 40, 41):
        pages[page, 7] = page
        _mark(tracker, page)
    fd = sealed_bytes(b"written by the kernel")
    try:
        os.preadv(fd, [memory.find(GuestAddress(20 * PAGE_SIZE), 21)], 0)
    finally:
        os.close(fd)
    _mark(tracker, 20)
    _expect(tracker, memory, [3, 20, 40, 41])
    if not isinstance(tracker, CompareTracker):  # which goes on until a page is recorded as sent
        _expect(tracker, memory, [])
        pages[40, 7] = 0
        _mark(tracker, 40)
        _expect(tracker, memory, [40])


def _mark(tracker: Tracker, page: int) -> None:
    if tracker.needs_marks:
        tracker.mark(GuestAddress(page * PAGE_SIZE), PAGE_SIZE)


def _expect(tracker: Tracker, memory: GuestMemory, pages: list[int]) -> None:
    found = DirtyBitmap(memory.page_count)
    tracker.collect(found)
    expected = DirtyBitmap(memory.page_count)
    expected.set_pages(np.array(pages, dtype=np.int64))
    if isinstance(tracker, CompareTracker):
        for first, count in tracker.blocks(expected):
            expected.set_range(first, count)
    if found != expected:
        raise TrackerError(
            f"tracker {tracker.name} does not work on this kernel: wrote pages {expected.pages_array().tolist()}, "
            f"it reported {found.pages_array().tolist()}",
            remedy="use the tracker log" if tracker.name == "scan" else "report this",
        )
