"""A peer that was let in and lies: nothing outside the guest's memory is touched, nothing grows, and one line says what it did."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import zlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_wires import HIGH, LAYOUT, PAGES

from migrate.coordinator.pages_in import MAX_OPEN_ROUNDS, PageReceiver
from migrate.errors import FerryError, MemoryFault, RemoteProtocolError
from migrate.memory import PAGE_SIZE, GuestMemory
from migrate.protocol import frames
from migrate.protocol.frames import Kind
from migrate.transport.channel import SocketChannel

END = LAYOUT[0].size  # of the first region


def table(kind: Kind, rows: list[tuple[int, int]], *, number: int = 1, digested: bool = False) -> bytes:
    """The head of a frame whose checksums are right, whatever it says."""
    raw = b"".join(struct.pack(">QQ", gpa, size) for gpa, size in rows)
    start = struct.pack(">II", number, len(rows))
    data = sum(size for _, size in rows) if kind is Kind.PAGES else 0
    head = struct.pack(">4sBBHI", b"VMF1", kind, digested, 0, (len(start) + 4 + len(raw) + data) & 0xFFFFFFFF)
    return (
        head
        + struct.pack(">I", zlib.crc32(head))
        + start
        + struct.pack(">I", zlib.crc32(raw, zlib.crc32(start)))
        + raw
    )


def mark(number: int) -> bytes:
    return table(Kind.MARK, [], number=number)


async def hear(data: bytes, *, memory: GuestMemory, wait_for: int = 1) -> BaseException | None:
    """What a receiver with one channel says of these bytes, and the end of the channel after them."""
    ours, theirs = socket.socketpair()
    receiver = PageReceiver(memory)
    receiver.join(0, SocketChannel(theirs, "unix", "the peer"))
    feeding = threading.Thread(target=feed, args=(ours, data))
    feeding.start()
    try:
        await asyncio.wait_for(receiver.round_ended(wait_for), 10)
    except FerryError as error:
        return error
    finally:
        await receiver.close()
        feeding.join()
    return None


def feed(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except OSError:
        pass  # they hung up on us, and rightly so
    sock.close()


def with_memory(play: Callable[[GuestMemory], None]) -> None:
    memory = GuestMemory.create(LAYOUT, "victim")
    try:
        play(memory)
    finally:
        memory.close()


LIES = {
    "beyond the first region": (table(Kind.PAGES, [(END, PAGE_SIZE)]), MemoryFault, "one memory region"),
    "over the first region's end": (
        table(Kind.PAGES, [(END - PAGE_SIZE, 2 * PAGE_SIZE)]), MemoryFault, "one memory region",
    ),
    "between the regions": (table(Kind.ZERO, [(1 << 31, PAGE_SIZE)]), MemoryFault, "one memory region"),
    "beyond the last region": (
        table(Kind.ZERO, [(HIGH + LAYOUT[1].size, PAGE_SIZE)]), MemoryFault, "one memory region",
    ),
    "a run twice": (table(Kind.ZERO, [(0, PAGE_SIZE)] * 2), MemoryFault, "not sorted, disjoint"),
    "runs that overlap": (
        table(Kind.ZERO, [(0, 3 * PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)]), MemoryFault, "not sorted, disjoint",
    ),
    "runs in no order": (
        table(Kind.ZERO, [(8 * PAGE_SIZE, PAGE_SIZE), (0, PAGE_SIZE)]), MemoryFault, "not sorted, disjoint",
    ),
    "half a page": (table(Kind.ZERO, [(0, 100)]), RemoteProtocolError, "whole pages"),
    "an empty run": (table(Kind.ZERO, [(0, 0)]), RemoteProtocolError, "whole pages"),
    "a run of 2^63 bytes": (table(Kind.ZERO, [(0, 1 << 63)]), RemoteProtocolError, "beyond any guest"),
    "a sum that wraps": (
        table(Kind.PAGES, [(0, (1 << 64) - PAGE_SIZE), (0, 2 * PAGE_SIZE)]), RemoteProtocolError, "beyond any guest",
    ),
    "a control frame": (frames.encode_control(b"x"), RemoteProtocolError, "a CONTROL frame came among pages"),
    "a frame of 4 GiB": (
        (lambda head: head + struct.pack(">I", zlib.crc32(head)))(struct.pack(">4sBBHI", b"VMF1", 2, 0, 0, 0xFFFFFFFF)),
        RemoteProtocolError, "claims 4294967295 bytes",
    ),
    "garbage": (b"GET / HTTP/1.1\r\n\r\n", RemoteProtocolError, "does not speak vmferry"),
    "nothing": (b"", FerryError, "closed the connection"),
    "half a header": (mark(1)[:7], FerryError, "closed the connection"),
    "half a page of bytes": (table(Kind.PAGES, [(0, PAGE_SIZE)]) + bytes(100), FerryError, "closed the connection"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named_and_touches_nothing(lie: str) -> None:
    data, kind, says = LIES[lie]

    def play(memory: GuestMemory) -> None:
        before = memory.digest_blocks()
        error = asyncio.run(hear(data + bytes(3 * PAGE_SIZE) if lie not in SHORT else data, memory=memory))
        assert isinstance(error, kind)
        assert says in str(error)
        assert memory.digest_blocks() == before
        assert memory.data_extents().pages <= 1  # half a page may have begun to arrive

    with_memory(play)


SHORT = {"nothing", "half a header", "half a page of bytes"}


def test_marks_of_rounds_that_were_never_begun_are_refused_and_not_kept() -> None:
    def play(memory: GuestMemory) -> None:
        flood = b"".join(mark(number) for number in range(2, 5000))
        error = asyncio.run(hear(flood, memory=memory))
        assert isinstance(error, RemoteProtocolError)
        assert "never begun" in error.reason

    with_memory(play)
    assert MAX_OPEN_ROUNDS < 10


def test_a_frame_with_nothing_in_it_is_no_breach() -> None:
    def play(memory: GuestMemory) -> None:
        data = table(Kind.PAGES, []) + table(Kind.ZERO, []) + mark(1)
        assert asyncio.run(hear(data, memory=memory)) is None

    with_memory(play)


def test_the_fullest_frame_that_is_allowed_fits_the_staging_buffer() -> None:
    def play(memory: GuestMemory) -> None:
        # Every other page, so that none of it goes straight into memory.
        rows = [(2 * page * PAGE_SIZE, PAGE_SIZE) for page in range(1050)]
        data = table(Kind.PAGES, rows) + bytes(range(256)) * (16 * 1050) + mark(1)
        assert asyncio.run(hear(data, memory=memory)) is None
        assert memory.data_extents().pages == 1050

    with_memory(play)


BEGUN = st.sampled_from(
    [b"", table(Kind.PAGES, [(0, PAGE_SIZE)]), table(Kind.ZERO, [(0, PAGE_SIZE)]), mark(1)]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BEGUN, st.binary(max_size=400))
def test_any_bytes_are_a_round_or_one_of_our_errors(begun: bytes, data: bytes) -> None:
    def play(memory: GuestMemory) -> None:
        error = asyncio.run(hear(begun + data, memory=memory, wait_for=2))
        assert isinstance(error, FerryError)
        assert memory.page_count == PAGES

    with_memory(play)
