"""Pages out and pages in, over real sockets: after a round both memories are the same, byte for byte."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_wires import PAGES, dirty_of, fill, wires

from migrate.coordinator.arrival import check_arrival
from migrate.coordinator.pages_in import PageReceiver
from migrate.coordinator.pages_out import PageSender, coarse_extents
from migrate.coordinator.preflight import stopped
from migrate.errors import ChannelClosed, FerryError, RemoteProtocolError
from migrate.memory import (
    PAGE_SIZE,
    CompareTracker,
    DirtyBitmap,
    GuestAddress,
    GuestMemory,
    PageRuns,
    RegionSpec,
)
from migrate.protocol import frames

CHANNELS = pytest.mark.parametrize("channels", [1, 2, 3, 4])

#: What a guest does to a stretch of pages between two rounds.
WRITES = st.tuples(
    st.integers(0, PAGES - 1), st.integers(1, 40), st.sampled_from(["data", "zero", "punch", "one byte"])
)
HISTORY = st.lists(st.lists(WRITES, max_size=6), min_size=1, max_size=5)


def play(memory: GuestMemory, writes: list[tuple[int, int, str]], salt: int) -> DirtyBitmap:
    dirty = DirtyBitmap(PAGES)
    for first, count, what in writes:
        count = min(count, PAGES - first)
        dirty.set_range(first, count)
        if what == "punch":
            memory.punch(PageRuns([(first, count)]))
            continue
        for page in range(first, first + count):
            region, local = memory.locate(page)
            if what == "one byte":
                region.view[local * PAGE_SIZE + (page * 7 + salt) % PAGE_SIZE] = 1 + salt % 255
            else:
                region.pages[local] = page + salt if what == "data" else 0
    return dirty


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(HISTORY, st.integers(1, 4))
def test_after_every_round_both_memories_are_the_same(
    history: list[list[tuple[int, int, str]]], channels: int
) -> None:
    async def run() -> None:
        async with wires(channels) as w:
            for number, writes in enumerate(history, 1):
                await w.round(play(w.source, writes, number * 100_000), last=number == len(history))
                assert w.same()

    asyncio.run(run())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(HISTORY, st.integers(1, 4))
def test_with_the_compare_tracker_nobody_has_to_say_what_was_written(
    history: list[list[tuple[int, int, str]]], channels: int
) -> None:
    async def run() -> None:
        compare = CompareTracker()
        async with wires(channels, compare=compare) as w:
            for number, writes in enumerate(history, 1):
                play(w.source, writes, number * 100_000)
                dirty = DirtyBitmap(PAGES)
                compare.collect(dirty)
                await w.round(dirty)
                assert w.same()

    asyncio.run(run())


@CHANNELS
def test_a_guest_that_writes_all_the_while_is_complete_after_the_last_pass(channels: int) -> None:
    async def run() -> None:
        async with wires(channels) as w:
            guest = Writer(w.source)
            guest.start()
            dirty = DirtyBitmap(PAGES)
            dirty.set_range(0, PAGES)
            for _ in range(6):
                await w.round(dirty.take())
                guest.collect(dirty)
            guest.stop()
            guest.collect(dirty)
            await w.round(dirty, last=True)
            assert guest.written > 0
            assert w.same()

    asyncio.run(run())


class Writer(threading.Thread):
    """A guest: stores, then marks, under the lock that a collection takes."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__()
        self.written = 0
        self._memory = memory
        self._log = DirtyBitmap(PAGES)
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def run(self) -> None:
        pages = np.random.default_rng(1).integers(0, PAGES, 1 << 14).tolist()
        while not self._stopping.is_set():
            for page in pages:
                with self._lock:
                    self.written += 1
                    fill(self._memory, page, 0 if self.written % 5 == 0 else self.written)
                    self._log.set_range(page, 1)
                if self._stopping.is_set():
                    return

    def collect(self, into: DirtyBitmap) -> None:
        with self._lock:
            into |= self._log.take()

    def stop(self) -> None:
        self._stopping.set()
        self.join()


@CHANNELS
def test_the_last_pass_is_digested_alike_on_both_sides(channels: int) -> None:
    async def run() -> None:
        async with wires(channels) as w:
            await w.round(play(w.source, [(0, 900, "data"), (2000, 153, "data")], 1))
            dirty = play(w.source, [(5, 700, "data"), (10, 30, "zero"), (2100, 53, "one byte")], 2)
            sent, digests = await w.round(dirty, last=True)
            assert sent.digests == digests
            assert len(digests) == channels
            blobs = {"uart0": b"blob"}
            said = stopped(2, sent, blobs)
            check_arrival(said, digests, blobs, ["uart0"])

    asyncio.run(run())


def test_the_digest_is_over_what_the_protocols_page_says() -> None:
    async def run() -> None:
        async with wires(1) as w:
            fill(w.source, 7, 42)
            sent, _ = await w.round(dirty_of([7]), last=True)
            table = np.array([[7 * PAGE_SIZE, PAGE_SIZE]], np.uint64)
            frame = frames.encode_table(frames.Kind.PAGES, 1, table[:, 0], table[:, 1], digested=True)
            body = (
                frame[frames.HEADER_SIZE :] + w.source.find(GuestAddress(7 * PAGE_SIZE), PAGE_SIZE).tobytes()
            )
            assert sent.digests == (hashlib.sha256(body).digest(),)

    asyncio.run(run())


@pytest.mark.parametrize("damage", ["pages", "blob", "no blob", "channels"])
def test_what_arrived_otherwise_than_it_was_sent_is_named(damage: str) -> None:
    async def run() -> None:
        async with wires(2) as w:
            sent, digests = await w.round(play(w.source, [(0, 300, "data")], 1), last=True)
            blobs = {"uart0": b"u", "rtc0": b"r"}
            said = stopped(1, sent, blobs)
            if damage == "pages":
                digests = (digests[0], bytes(32))
            elif damage == "channels":
                digests = digests[:1]
            elif damage == "blob":
                blobs["rtc0"] = b"x"
            else:
                del blobs["rtc0"]
            with pytest.raises(RemoteProtocolError) as caught:
                check_arrival(said, digests, blobs, ["uart0", "rtc0"])
            assert caught.value.device == (None if damage in ("pages", "channels") else "rtc0")

    asyncio.run(run())


def test_pages_that_are_zero_and_were_never_sent_cost_nothing() -> None:
    async def run() -> None:
        async with wires(1) as w:
            fill(w.source, 3, 0)  # allocated, and zero
            everything = DirtyBitmap(PAGES)
            everything.set_range(0, PAGES)
            sent, _ = await w.round(everything)
            assert sent.pages == 0
            assert w.destination.data_extents().pages == 0
            fill(w.source, 3, 9)
            assert (await w.round(dirty_of([3])))[0].pages == 1
            fill(w.source, 3, 0)
            assert (await w.round(dirty_of([3])))[0].pages == 0
            assert w.destination.data_extents().pages == 0  # punched there
            assert w.same()

    asyncio.run(run())


def test_pages_go_in_line_where_there_is_one_connection_only() -> None:
    async def run() -> None:
        async with wires(1) as w:  # for its memories; the frames go another way
            receiver = PageReceiver(w.destination)
            sink = receiver.join_inline()
            channel = Recorded()
            sender = PageSender(w.source, [channel])
            try:
                dirty = play(w.source, [(0, 500, "data"), (600, 20, "one byte")], 1)
                sent = await sender.send_round(1, dirty, last=True)
                for header, body in channel.frames():
                    await sink(header, body)
                assert await receiver.round_ended(1) == sent.digests
                assert w.same()
                header = frames.Header(frames.Kind.PAGES, 5000)
                with pytest.raises(RemoteProtocolError):
                    await sink(header, bytes(20))
            finally:
                sender.close()
                await receiver.close()

    asyncio.run(run())


class Recorded:
    """A channel whose bytes are kept."""

    peer = "exec"

    def __init__(self) -> None:
        self.data = bytearray()

    def send(self, data: memoryview | bytes) -> None:
        self.data += data

    def send_runs(self, views: Sequence[memoryview], places: Sequence[tuple[int, int]] = ()) -> None:
        for view in views:
            self.data += view

    def recv_into(self, view: memoryview) -> None:
        raise ChannelClosed("nothing comes")

    def abort(self) -> None: ...

    def close(self) -> None: ...

    def frames(self) -> list[tuple[frames.Header, bytes]]:
        found, at = [], 0
        while at < len(self.data):
            header = frames.decode_header(self.data[at : at + 16])
            found.append((header, bytes(self.data[at + 16 : at + 16 + header.length])))
            at += 16 + header.length
        return found


# -- channels that break -----------------------------------------------------------------------------------------------


@CHANNELS
def test_a_channel_that_breaks_ends_the_round_on_both_sides_with_what_broke_first(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with wires(channels) as w:
            broken = w.sender.channels[-1]
            monkeypatch.setattr(broken, "send", cut)
            monkeypatch.setattr(broken, "send_runs", cut)
            dirty = DirtyBitmap(PAGES)
            dirty.set_range(0, PAGES)
            play(w.source, [(0, PAGES, "data")], 1)
            with pytest.raises(ChannelClosed, match="the cable was cut"):
                await w.sender.send_round(1, dirty)
            with pytest.raises(FerryError):
                await asyncio.wait_for(w.receiver.round_ended(1), 10)

    asyncio.run(run())


def cut(*_: object) -> None:
    raise ChannelClosed("the cable was cut")


def test_a_receiver_that_closes_wakes_its_threads(no_threads: None) -> None:
    async def run() -> None:
        async with wires(4) as w:
            await w.round(dirty_of([]))

    asyncio.run(run())


@pytest.fixture
def no_threads() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before + 1  # asyncio's own pool may keep one


def test_a_bug_in_a_page_thread_is_told_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with wires(1) as w:

            def bug(*_: object) -> None:
                raise ValueError("a bug")

            monkeypatch.setattr(w.destination, "from_table", bug)
            await w.sender.send_round(1, play(w.source, [(0, 4, "data")], 1))
            with pytest.raises(FerryError, match="a page thread failed here"):
                await asyncio.wait_for(w.receiver.round_ended(1), 10)

    asyncio.run(run())
    assert "a bug" in caplog.text


# -- the hint for prefaulting ------------------------------------------------------------------------------------------


def test_extents_are_few_and_cover_all_data() -> None:
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), 12000 * PAGE_SIZE)], "sparse")
    try:
        for page in range(0, 12000, 2):
            fill(memory, page, 1)
        extents = coarse_extents(memory)
        assert 0 < len(extents) <= 4096
        table = memory.from_table(np.array(extents, np.uint64))
        covered = DirtyBitmap.from_runs(table, 12000)
        assert all(covered.contains(page) for page in range(0, 12000, 2))
    finally:
        memory.close()


def test_extents_of_little_data_are_exact() -> None:
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), 64 * PAGE_SIZE)], "little")
    try:
        fill(memory, 3, 1)
        assert coarse_extents(memory) == ((3 * PAGE_SIZE, PAGE_SIZE),)
    finally:
        memory.close()
