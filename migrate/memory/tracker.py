"""What every dirty tracker is: the interface, the part all of them share, and the tracker of those who write nothing.

A tracker sees the writes of *one process through one mapping*; the coordinator ORs the bitmaps of all of them
(DESIGN 2.2). The order that loses nothing: writers store, then mark (where the tracker needs it), then show completion;
the coordinator collects, then reads the page.

    name      sees by itself                                             needs marks for
    scan      stores and read(2) through the attached mapping            pwrite(2), O_DIRECT, registered buffers
    log       nothing                                                    every write
    compare   every change, by whoever (in the coordinator, at a cost)   nothing
    none      nothing; its participant writes no guest memory            refuses marks

GuestMemory.punch marks by itself, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from threading import RLock
from typing import ClassVar, Protocol

from migrate.errors import TrackerError
from migrate.memory.addresses import GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.mapping import Region
from migrate.memory.region import GuestMemory
from migrate.memory.runs import PageRuns


class Tracker(Protocol):
    """Remembers which pages were written. `lock` and `mark*` may be used from any thread, the rest from one at a time."""

    name: ClassVar[str]
    #: True when a writer must mark() what it stored: `with tracker.lock: store; tracker.mark(…)`.
    needs_marks: ClassVar[bool]

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """The writers' lock, re-entrant. Nothing is collected while it is held."""

    def attach(self, memory: GuestMemory) -> None:
        """Say which memory to track, before start(). Regions may be added to it until then."""

    def start(self) -> None:
        """From now on writes are remembered; nothing is dirty yet. Does nothing when started.

        :raise TrackerError: it does not work here.
        """

    def collect(self, into: DirtyBitmap) -> None:
        """Move what was written since the last collect into `into` (machine page numbering, ORed).

        :raise TrackerError: not started, or the layout of memory changed; what was written is then unknown.
        """

    def mark(self, gpa: GuestAddress, length: int) -> None:
        """Remember a write that the tracker does not see by itself, after it was made. Nothing when not started.

        :raise MemoryFault: not within one region.
        """

    def mark_runs(self, runs: PageRuns) -> None:
        """The same for page runs."""

    def stop(self) -> None:
        """Forget everything and cost nothing. Does nothing when stopped."""

    def close(self) -> None:
        """stop(), and let go of the memory, before whoever owns it closes it."""


class Attachment:
    """The memory that a tracker follows, and the layout it had when tracking started."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._memory: GuestMemory | None = None
        self._layout: Sequence[Region] | None = None
        self._unsubscribe: Callable[[], None] | None = None

    @property
    def started(self) -> bool:
        return self._layout is not None

    @property
    def memory(self) -> GuestMemory:
        if self._memory is None:
            raise TrackerError(
                f"tracker {self._name} has no memory", remedy="attach memory before starting it"
            )
        return self._memory

    def attach(self, memory: GuestMemory, on_punch: Callable[[PageRuns], None] | None = None) -> None:
        if self.started:
            raise TrackerError(
                f"tracker {self._name} was given other memory while it was tracking", remedy="stop it first"
            )
        self.detach()
        self._memory = memory
        if on_punch is not None:
            self._unsubscribe = memory.on_punch(on_punch)

    def begin(self) -> Sequence[Region]:
        self._layout = self.memory.regions
        return self._layout

    def end(self) -> Sequence[Region]:
        """Stop; what was being followed."""
        layout, self._layout = self._layout, None
        return layout or ()

    def detach(self) -> None:
        self.end()
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._memory = self._unsubscribe = None

    def check(self, into: DirtyBitmap) -> Sequence[Region]:
        """The regions to collect from. :raise TrackerError: there is no telling what was written."""
        if self._layout is None:
            raise TrackerError(
                f"tracker {self._name} is not started",
                remedy="start tracking before the first pass over memory",
            )
        if self.memory.regions is not self._layout or any(region.closed for region in self._layout):
            raise TrackerError(
                f"memory regions changed while tracker {self._name} was tracking", remedy="migrate again"
            )
        if into.pages != self.memory.page_count:
            raise TrackerError(
                f"a bitmap of {into.pages} pages for memory of {self.memory.page_count}",
                remedy="see that every participant was given the same memory regions",
            )
        return self._layout


class NoTracker:
    """For a participant that writes no guest memory: never dirty, and says so if the participant does write."""

    name: ClassVar[str] = "none"
    needs_marks: ClassVar[bool] = True

    def __init__(self) -> None:
        self.lock = RLock()
        self._attachment = Attachment(self.name)

    def attach(self, memory: GuestMemory) -> None:
        self._attachment.attach(memory)

    def start(self) -> None:
        self._attachment.begin()

    def collect(self, into: DirtyBitmap) -> None:
        self._attachment.check(into)

    def mark(self, gpa: GuestAddress, length: int) -> None:
        raise TrackerError(
            f"{length} bytes at {gpa:#x} were written by a participant that said it writes no guest memory",
            remedy="give it the tracker scan or log",
        )

    def mark_runs(self, runs: PageRuns) -> None:
        raise TrackerError(
            f"{runs.pages} pages were written by a participant that said it writes no guest memory",
            remedy="give it the tracker scan or log",
        )

    def stop(self) -> None:
        self._attachment.end()

    def close(self) -> None:
        self._attachment.detach()
