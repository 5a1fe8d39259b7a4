"""State that is streamed while the device runs: nothing is lost, whatever is written when; bad chunks change nothing."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.kit.stream import MAX_CHUNK, MIN_CHUNK, StreamedMemory
from migrate.errors import DeviceRefused, MemoryFault
from migrate.memory.memfd import sealed_bytes

PAGE = 4096
PAGES = 24


def close(*memories: StreamedMemory) -> None:
    for memory in memories:
        memory.close()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, PAGES - 1), st.integers(0, 255)),
        st.tuples(st.just("scribble"), st.integers(0, PAGES * PAGE - 100), st.integers(1, 255)),
        st.tuples(st.just("send"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("abort"), st.just(0), st.just(0)),
        st.tuples(st.just("reset"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_whatever_is_written_between_chunks_both_memories_are_equal_in_the_end(steps):
    source, target = StreamedMemory(PAGES * PAGE, "s"), StreamedMemory(PAGES * PAGE, "t")
    # What an earlier, aborted session left there must not shine through.
    target.view[:] = b"\xee" * (PAGES * PAGE)
    source.write(5 * PAGE, b"from before")
    source.begin()
    for what, where, value in steps:
        match what:
            case "write":
                source.write(where * PAGE, bytes([value]) * PAGE)
            case "scribble":
                source.view[where : where + 100] = bytes([value]) * 100
                source.mark(where, 100)
            case "send":
                chunk, _ = source.read_chunk(MIN_CHUNK + (where - 1) * (PAGE + 16))
                if chunk:
                    target.write_chunk(chunk)
            case "abort":
                source.end()
                source.begin()
            case "reset":
                source.begin()
    while True:
        chunk, remaining = source.read_chunk(MAX_CHUNK)
        if not chunk:
            break
        target.write_chunk(chunk)
        assert remaining == 0
    assert bytes(target.view) == bytes(source.view)
    assert target.digests() == source.digests()
    close(source, target)


def test_zero_pages_cost_no_bytes_and_holes_are_not_even_mentioned():
    source = StreamedMemory(1024 * PAGE, "s")
    source.write(10 * PAGE, bytes(100 * PAGE))
    source.write(50 * PAGE, b"x")
    source.begin()
    chunk, remaining = source.read_chunk(MAX_CHUNK)
    assert remaining == 0
    assert len(chunk) == 32 + 3 * 16 + PAGE
    assert source.read_chunk(MAX_CHUNK) == (b"", 0)
    close(source)


def test_a_chunk_is_never_longer_than_was_asked_for_and_what_is_left_goes_down_to_nothing():
    source = StreamedMemory(64 * PAGE, "s")
    for page in range(0, 64, 2):  # the worst case: a run a page
        source.write(page * PAGE, b"x")
    source.begin()
    left = []
    while (answer := source.read_chunk(5 * PAGE))[0]:
        assert len(answer[0]) <= 5 * PAGE
        left.append(answer[1])
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    with pytest.raises(DeviceRefused, match="holds no page"):
        source.read_chunk(MIN_CHUNK - 1)
    close(source)


def test_a_page_that_is_written_all_the_time_does_not_keep_the_others_from_being_sent():
    source, target = StreamedMemory(PAGES * PAGE, "s"), StreamedMemory(PAGES * PAGE, "t")
    for page in range(PAGES):
        source.write(page * PAGE, bytes([page + 1]))
    source.begin()
    for _ in range(PAGES + 1):
        source.write(0, os.urandom(8))
        target.write_chunk(source.read_chunk(MIN_CHUNK)[0])
    assert np.array_equal(target.pages[1:], source.pages[1:])
    close(source, target)


def header(rows: int, number: int, size: int, pages: int) -> bytes:
    return struct.pack("<8sIIQQ", b"VMFSTRM1", rows, number, size, pages)


def row(first: int, pages: int, zero: int = 0) -> bytes:
    return struct.pack("<QII", first, pages, zero)


SIZE = PAGES * PAGE


@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        (b"", "0 bytes"),
        (b"x" * 40, "do not begin as one"),
        (header(0, 0, SIZE, 0)[:-1], "do not begin as one"),
        (header(0, 0, SIZE - PAGE, 0), "this one has 98304"),
        (header(0, 1, SIZE, 0), "number 1 came where 0 is next"),
        (header(1, 0, SIZE, 1) + row(0, 1) + bytes(PAGE - 1), "do not hold"),
        (header(2**32 - 1, 0, SIZE, 2**64 - 1), "do not hold"),
        (header(1, 0, SIZE, 0) + row(0, 1, 2), "no known kind"),
        (header(1, 0, SIZE, 0) + row(0, 0, 1), "empty"),
        (header(1, 0, SIZE, 0) + row(PAGES, 1, 1), "past the end"),
        (header(1, 0, SIZE, 0) + row(2**64 - 1, 1, 1), "past the end"),
        (header(1, 0, SIZE, 0) + row(1, 2**32 - 1, 1), "past the end"),
        (header(2, 0, SIZE, 0) + row(3, 2, 1) + row(4, 1, 1), "overlap"),
        (header(2, 0, SIZE, 0) + row(3, 1, 1) + row(1, 1, 1), "overlap"),
        (header(1, 0, SIZE, 1) + row(0, 2) + bytes(PAGE), "add up"),
    ],
)
def test_a_chunk_that_is_not_one_is_refused_and_changes_nothing(chunk, text):
    target = StreamedMemory(SIZE, "t")
    target.write(0, b"precious")
    with pytest.raises(DeviceRefused, match=text):
        target.write_chunk(chunk)
    assert bytes(target.view[:8]) == b"precious"
    close(target)


def test_a_chunk_that_was_lost_on_the_way_is_noticed():
    source, target = StreamedMemory(SIZE, "s"), StreamedMemory(SIZE, "t")
    source.write(0, b"x" * SIZE)
    source.begin()
    chunks = [source.read_chunk(MIN_CHUNK)[0] for _ in range(3)]
    target.write_chunk(chunks[0])
    with pytest.raises(DeviceRefused, match="number 2 came where 1 is next"):
        target.write_chunk(chunks[2])
    target.write_chunk(chunks[1])
    target.write_chunk(chunks[2])
    close(source, target)


async def carry(source, target, *, rounds: int | None = None) -> int:
    """Chunks from one to the other, until nothing is left or for some rounds; how many there were."""
    count = 0
    while rounds is None or count < rounds:
        fd, size, _ = await source.bus.stream_read(4 * (PAGE + 16) + 32)
        if size:
            await target.bus.stream_write(fd, size)
        os.close(fd)
        if not size:
            break
        count += 1
    return count


def paint(vmm, page: int, byte: int) -> None:
    vmm.region_write(0, 0, 8, page << 8 | byte)


def test_a_canvas_is_streamed_while_it_is_painted_and_arrives_whole(machines):
    async def scenario(here, there):
        source = await here.device("canvas", "k0", "--option", "pages=64")
        target = await there.device("canvas", "k0", "--option", "pages=64", "--incoming")
        info = await source.bus.info()
        assert info.streams
        # What QEMU cannot carry does not stand in QEMU's queue, and says so when it is asked all the same.
        assert await here.bus.queued_owners("org.qemu.VMState1") == []
        with pytest.raises(DeviceRefused, match="dbus-vmstate cannot carry"):
            await source.bus.save()
        with source.vmm() as vmm:
            for page in range(0, 64, 3):
                paint(vmm, page, page + 1)
            with pytest.raises(DeviceRefused, match="PRE_COPY"):
                await source.bus.stream_read(1 << 20)
            await source.bus.set_state("PRE_COPY")
            await carry(source, target, rounds=3)
            for page in (0, 1, 63):
                paint(vmm, page, 200)
            paint(vmm, 3, 0)
            await carry(source, target)
            paint(vmm, 30, 77)
            await source.bus.set_state("PRE_COPY_P2P")
            await source.bus.set_state("STOP_COPY")
        assert await carry(source, target) == 1
        await target.bus.stage(await source.bus.save_as(1))
        await target.bus.apply()
        await target.bus.set_state("STOP")
        await source.bus.set_state("STOP")
        assert await target.bus.fingerprint() == await source.bus.fingerprint()
        with pytest.raises(DeviceRefused, match="PRE_COPY"):
            await source.bus.stream_read(1 << 20)

    machines(scenario)


def test_the_fingerprint_sees_a_single_byte_of_what_is_streamed(machines):
    async def scenario(machine):
        canvas = await machine.device("canvas", "k0")
        prints = set()
        with canvas.vmm() as vmm:
            # As many strokes each time, so that the blob's own part can be the same.
            for byte in (1, 2):
                paint(vmm, 63, byte)
                await canvas.bus.set_state("STOP")
                prints.add(await canvas.bus.fingerprint())
                await canvas.bus.set_state("RUNNING_P2P")
                vmm.reset()
                await canvas.bus.set_state("RUNNING")
        assert len(prints) == 2

    machines(scenario)


def test_a_session_that_was_aborted_begins_anew_and_a_reset_restarts_it(machines):
    async def scenario(here, there):
        source = await here.device("canvas", "k0")
        target = await there.device("canvas", "k0", "--incoming")
        with source.vmm() as vmm:
            for page in range(20):
                paint(vmm, page, 9)
            await source.bus.set_state("PRE_COPY")
            assert await carry(source, target) == 5
            await source.bus.set_state("RUNNING")
            await source.bus.set_state("PRE_COPY")
            assert await carry(source, target) == 5
            vmm.reset()
            assert await carry(source, target) == 5

    machines(scenario)


def test_a_chunk_must_be_a_sealed_memfd_of_the_size_that_was_said(machines):
    async def scenario(here, there):
        source = await here.device("canvas", "k0")
        target = await there.device("canvas", "k0", "--incoming")
        with source.vmm() as vmm:
            paint(vmm, 0, 1)
        await source.bus.set_state("PRE_COPY")
        fd, size, _ = await source.bus.stream_read(1 << 20)
        bare = os.memfd_create("x")
        os.write(bare, os.pread(fd, size, 0))
        for wrong, said in ((bare, size), (fd, size - 1), (fd, MAX_CHUNK + 1)):
            with pytest.raises(MemoryFault):
                await target.bus.stream_write(wrong, said)
        with pytest.raises(DeviceRefused, match="RESUMING only"):
            await source.bus.stream_write(fd, size)
        garbage = sealed_bytes(b"y" * 100)
        with pytest.raises(DeviceRefused, match="do not begin as one"):
            await target.bus.stream_write(garbage, 100)
        await target.bus.stream_write(fd, size)
        for one in (fd, bare, garbage):
            os.close(one)

    machines(scenario)
