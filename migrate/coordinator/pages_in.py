"""Pages in: one thread a channel, from frames into guest memory. The peer is hostile: every run is checked against the layout
before a byte is received, and no more is ever held than one staging buffer a channel."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from migrate.coordinator.pages_out import GATHER_BELOW, Channel
from migrate.errors import FerryError, Phase, RemoteProtocolError, TransportError
from migrate.memory import PAGE_SIZE, GuestMemory, PageRuns
from migrate.protocol import frames
from migrate.protocol.frames import Kind

log = logging.getLogger(__name__)

#: A source ends one round before it begins the next, so a page channel is never more than that ahead of the control channel.
MAX_OPEN_ROUNDS = 4

#: As migrate.coordinator.link has it: takes a page frame's header and body.
PageSink = Callable[[frames.Header, bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Mark:
    """The end of a round on one channel; the digest of what came digested before it, or nothing."""

    round_number: int
    digest: bytes


class PageDecoder:
    """What one channel's frames do to memory. `read` fills a view with the next bytes of the channel."""

    def __init__(self, memory: GuestMemory, read: Callable[[memoryview], None]) -> None:
        self.memory = memory
        self.pages = 0
        self._read = read
        self._head = bytearray(frames.TABLE_HEAD.size)
        self._table = bytearray(frames.MAX_TABLE)
        self._staging = np.empty((frames.MAX_PAGE_BYTES // PAGE_SIZE, PAGE_SIZE // 8), np.uint64)
        self._digest = hashlib.sha256()

    def body(self, header: frames.Header) -> Mark | None:
        """Receive the body of one frame; for a MARK, what it ends.

        :raises RemoteProtocolError: for anything that is not what the header and the layout allow.
        :raises MemoryFault: for runs outside the guest's memory.
        """
        if header.kind in (Kind.CONTROL, Kind.RELAY):
            raise RemoteProtocolError(
                f"a {header.kind.name} frame came among pages", phase=Phase.PRECOPY, remedy="see its log"
            )
        self._read(memoryview(self._head))
        head = frames.decode_table_head(header, self._head)
        raw = memoryview(self._table)[: head.table_bytes]
        self._read(raw)
        table = frames.decode_table(header, head, raw)
        if header.kind is Kind.MARK:
            return Mark(head.round_number, self._digest.digest() if header.digested else b"")
        if header.digested:
            self._digest.update(self._head)
            self._digest.update(raw)
        rows: NDArray[np.uint64] = np.empty((head.runs, 2), np.uint64)
        rows[:, 0], rows[:, 1] = table["gpa"], table["bytes"]
        runs = self.memory.from_table(rows)
        if header.kind is Kind.ZERO:
            self.memory.punch(runs)
        else:
            self._pages(runs, header.digested)
        return None

    def _pages(self, runs: PageRuns, digested: bool) -> None:
        if runs.pages < GATHER_BELOW * len(runs):
            part = self._staging[: runs.pages]
            views = [part.data.cast("B")]
        else:
            views = self.memory.views(runs)
        for view in views:
            self._read(view)
            if digested:
                self._digest.update(view)
        if runs.pages < GATHER_BELOW * len(runs):
            self.memory.scatter(runs, part)
        self.pages += runs.pages


class PageReceiver:
    """The threads of all page channels, and what their MARKs say. Made in the event loop; told of channels as they join."""

    def __init__(
        self, memory: GuestMemory, on_refusal: Callable[[FerryError], None] = lambda error: None
    ) -> None:
        """:param on_refusal: told of what may not be, at once: the source may be in the middle of a long round."""
        self.memory = memory
        self._on_refusal = on_refusal
        self._loop = asyncio.get_running_loop()
        self._channels: list[Channel] = []
        self._threads: list[threading.Thread] = []
        self._marks: dict[int, dict[int, bytes]] = {}  # round → channel → digest
        self._changed = asyncio.Event()
        self._failure: FerryError | None = None
        self._expected = 0
        self._stopping = threading.Event()

    def prefault(self, runs: PageRuns) -> None:
        """Allocate what will be written, ahead of it, in the background: the first touch is what costs."""
        self._start(lambda: self.memory.prefault(runs, self._stopping.is_set), "prefault")

    def join(self, index: int, channel: Channel) -> None:
        """Serve one more channel."""
        self._channels.append(channel)
        self._expected += 1
        self._start(lambda: self._serve(index, channel), f"pages-{index}")

    def join_inline(self) -> PageSink:
        """Pages come on the control channel instead; answers with what takes their frames."""
        self._expected = 1
        waiting: list[memoryview] = []

        def read(view: memoryview) -> None:
            source = waiting[0]
            if len(source) < view.nbytes:
                raise RemoteProtocolError("a page frame is shorter than it says", phase=Phase.PRECOPY)
            view[:] = source[: view.nbytes]
            waiting[0] = source[view.nbytes :]

        decoder = PageDecoder(self.memory, read)

        async def take(header: frames.Header, body: bytes) -> None:
            waiting[:] = [memoryview(body)]
            mark = await asyncio.to_thread(decoder.body, header)
            if mark is not None:
                self._mark(0, mark)

        return take

    async def round_ended(self, number: int) -> tuple[bytes, ...]:
        """Wait until every channel's MARK of this round is here; their digests in the order of channels.

        :raises FerryError: what broke a channel.
        """
        while len(self._marks.get(number, {})) < self._expected:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        found = self._marks.pop(number)
        return tuple(found[index] for index in sorted(found))

    def _start(self, work: Callable[[], object], name: str) -> None:
        def run() -> None:
            try:
                work()
            except FerryError as error:
                self._tell(partial(self._fail, error))
            except Exception:
                log.exception("event=page-thread-failed thread=%s", name)
                failed = FerryError(
                    "a page thread failed here", phase=Phase.PRECOPY, remedy="see this host's logs"
                )
                self._tell(partial(self._fail, failed))

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, index: int, channel: Channel) -> None:
        decoder = PageDecoder(self.memory, channel.recv_into)
        raw = bytearray(frames.HEADER_SIZE)
        while not self._stopping.is_set():
            channel.recv_into(memoryview(raw))
            mark = decoder.body(frames.decode_header(raw))
            if mark is not None:
                self._tell(partial(self._mark, index, mark))

    def _tell(self, what: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:
            pass  # the loop is closed: nobody is left who wants to know

    def _mark(self, index: int, mark: Mark) -> None:
        if len(self._marks) >= MAX_OPEN_ROUNDS and mark.round_number not in self._marks:
            error = "a page channel ended rounds that were never begun"
            self._fail(RemoteProtocolError(error, phase=Phase.PRECOPY))
            self._stopping.set()
            return
        self._marks.setdefault(mark.round_number, {})[index] = mark.digest
        self._changed.set()

    def _fail(self, error: FerryError) -> None:
        if not self._stopping.is_set():
            self._failure = self._failure or error
            self._changed.set()
            if not isinstance(error, TransportError):  # that the peer is gone is the control channel's to say
                self._on_refusal(error)

    async def close(self) -> None:
        """Wake and join every thread; memory may be unmapped after this."""
        self._stopping.set()
        for channel in self._channels:
            channel.abort()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        for channel in self._channels:
            channel.close()
