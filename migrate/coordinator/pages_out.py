"""Pages out: worker threads that send page runs over the channels of a migration. Knows no rounds' policy and no devices.

Long runs go straight from the memfd or the mapping; short ones are gathered by one NumPy operation into a staging buffer, so that
no Python object is made a page. A round ends with MARK on every channel; the destination acknowledges it on the control channel
when every channel's MARK has come, so a page is never overtaken by an older copy of itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from migrate.coordinator.limits import RateLimit
from migrate.memory import PAGE_SIZE, CompareTracker, DirtyBitmap, GuestMemory, PageRuns, SendPlan
from migrate.memory.mapping import Pages
from migrate.protocol import frames
from migrate.protocol.frames import Kind
from migrate.protocol.messages import MAX_LIST

#: Pages in one frame: large enough to keep a TLS channel busy, small enough to share work among channels.
FRAME_PAGES = 2048
#: Pages planned in one go, 1 ms of work; of large memories more, for every plan costs a pass over whole bitmaps as well.
PLAN_PAGES = 16384
MOST_PLANS = 64
#: Below this mean length of a run, in pages, copying into one buffer is cheaper than one system call argument a run.
GATHER_BELOW = 16
#: From this mean length on a run is worth a system call of its own, which copies it once less.
FROM_FILE_ABOVE = 64
NO_PAGES = np.empty(0, np.uint64)


class Channel(Protocol):
    """What migrate.transport gives a page thread."""

    peer: str

    def send(self, data: memoryview | bytes) -> None: ...
    def send_runs(self, views: Sequence[memoryview], places: Sequence[tuple[int, int]] = ()) -> None: ...
    def recv_into(self, view: memoryview) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Sent:
    """Of one round: pages, seconds from the first frame to the last MARK, digest of each channel if it was digested."""

    pages: int = 0
    seconds: float = 0.0
    digests: tuple[bytes, ...] = ()

    @property
    def size(self) -> int:
        return self.pages * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Item:
    """One frame to be: its runs, and the pages if they were copied already."""

    kind: Kind
    runs: PageRuns
    copy: Pages | None = None


class PageSender:
    """:param compare: the tracker that has to see exactly the bytes that are sent, where one is used."""

    def __init__(
        self,
        memory: GuestMemory,
        channels: Sequence[Channel],
        compare: CompareTracker | None = None,
        limit: RateLimit | None = None,
    ) -> None:
        self.memory = memory
        self.limit = limit or RateLimit()
        self.channels = channels
        self.sent_bytes = 0  #: of all rounds; read by the progress line while threads add to it
        self.compare = compare
        self._plan = SendPlan(memory)
        self._pool = ThreadPoolExecutor(len(channels), thread_name_prefix="pages")
        self._counting = threading.Lock()
        self._broke: BaseException | None = (
            None  #: what came first; the other channels were then aborted by us
        )

    async def send_round(self, number: int, dirty: DirtyBitmap, *, last: bool = False) -> Sent:
        """Send what of `dirty` must be sent, then MARK on every channel.

        :param last: the machine is stopped: digest all.
        :raises FerryError: what broke the first channel that broke; the others are then aborted.
        """
        loop = asyncio.get_running_loop()
        work = _Work(self._copies(dirty) if self.compare else self._items(dirty))
        start = time.monotonic()
        results = await asyncio.gather(
            *(
                loop.run_in_executor(self._pool, self._serve, channel, work, number, last)
                for channel in self.channels
            ),
            return_exceptions=True,
        )
        if self._broke is not None:
            raise self._broke
        sent = Sent(work.pages, time.monotonic() - start)
        if last:
            sent.digests = tuple(result for result in results if isinstance(result, bytes))
        return sent

    def _items(self, dirty: DirtyBitmap) -> Iterator[Item]:
        """Planned in stretches, so that the first frame goes at once and one thread plans while others send."""
        for stretch in dirty.runs().split(max(PLAN_PAGES, dirty.pages // MOST_PLANS)):
            data, zero = self._plan.plan(DirtyBitmap.from_runs(stretch, dirty.pages))
            for part in data.split(FRAME_PAGES):
                yield Item(Kind.PAGES, part)
            for low in range(0, len(zero), frames.MAX_RUNS):
                yield Item(Kind.ZERO, _slice(zero, low))

    def _copies(self, dirty: DirtyBitmap) -> Iterator[Item]:
        """For `compare`: each block copied once; what is judged, recorded and sent is that copy."""
        assert self.compare is not None
        for first, count in self.compare.blocks(dirty):
            copy = np.empty((count, PAGE_SIZE // 8), np.uint64)
            self.memory.gather(PageRuns([(first, count)]), copy)
            data, zero = self._plan.plan_copy(first, copy)
            self.compare.record(first, copy.data)
            if len(data):
                yield Item(Kind.PAGES, data, copy[data.pages_array() - first])
            if len(zero):
                yield Item(Kind.ZERO, zero)

    def _serve(self, channel: Channel, work: _Work, number: int, last: bool) -> bytes:
        """One thread's part of a round. Answers with the channel's digest (of nothing, unless it is the last)."""
        digest = hashlib.sha256()
        staging = np.empty((FRAME_PAGES, PAGE_SIZE // 8), np.uint64)
        try:
            while (item := work.take()) is not None:
                table = self.memory.to_table(item.runs)
                if len(table) > frames.MAX_RUNS:  # a run that goes over a region's end counts twice
                    raise ValueError("a frame's runs were cut too long")
                head = frames.encode_table(item.kind, number, table[:, 0], table[:, 1], digested=last)
                views, places = self._views(item, staging)
                if last:
                    for view in [memoryview(head)[frames.HEADER_SIZE :], *views]:
                        digest.update(view)
                if places:
                    channel.send(head)
                    channel.send_runs(views, places)
                else:
                    channel.send_runs([memoryview(head), *views])
                size = len(head) + sum(view.nbytes for view in views)
                self.limit.pay(size)
                with self._counting:
                    self.sent_bytes += size
                    if item.kind is Kind.PAGES:
                        work.pages += item.runs.pages
            channel.send(frames.encode_table(Kind.MARK, number, NO_PAGES, NO_PAGES, digested=last))
        except BaseException as error:
            with self._counting:
                self._broke = self._broke or error
            for other in self.channels:
                other.abort()
            raise
        return digest.digest()

    def _views(self, item: Item, staging: Pages) -> tuple[list[memoryview], list[tuple[int, int]]]:
        """The item's bytes, and where they lie in memfds if they should be sent from there."""
        if item.kind is Kind.ZERO:
            return [], []
        if item.copy is not None:
            return [item.copy.data.cast("B")], []
        if item.runs.pages < GATHER_BELOW * len(item.runs):
            part = staging[: item.runs.pages]
            self.memory.gather(item.runs, part)
            return [part.data.cast("B")], []
        long = item.runs.pages >= FROM_FILE_ABOVE * len(item.runs)
        return self.memory.views(item.runs), self.memory.places(item.runs) if long else []

    def close(self) -> None:
        self.limit.set(0)  # nobody sleeps through the end
        for channel in self.channels:
            channel.abort()
        self._pool.shutdown(wait=True)
        for channel in self.channels:
            channel.close()


class _Work:
    """Items that threads take in turn; made one at a time, so that copies do not pile up."""

    def __init__(self, items: Iterator[Item]) -> None:
        self.pages = 0
        self._items = items
        self._lock = threading.Lock()

    def take(self) -> Item | None:
        with self._lock:
            return next(self._items, None)


def _slice(runs: PageRuns, low: int) -> PageRuns:
    return PageRuns(runs.array[low : low + frames.MAX_RUNS])


def coarse_extents(memory: GuestMemory) -> tuple[tuple[int, int], ...]:
    """Where data lies now, in at most MAX_LIST stretches (gpa, bytes): a hint for prefaulting, so roundness is no harm."""
    runs = memory.data_extents()
    if len(runs) > MAX_LIST:
        grain = max(512, -(-memory.page_count // MAX_LIST))
        grains = np.unique(runs.pages_array() // grain)
        ends = np.minimum((grains + 1) * grain, memory.page_count)
        runs = PageRuns.merged(np.column_stack((grains * grain, ends - grains * grain)))
    return tuple((int(gpa), int(size)) for gpa, size in memory.to_table(runs)[:MAX_LIST])
