"""A vhost-user back end before a front end that follows the specification: rings, the dirty log, memory, reconnecting."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vhost_front_end import (
    ACCEPTED,
    ADD_REG,
    GET_CONFIG,
    LOG_ALL,
    MAX_SLOTS,
    PROTOCOL,
    REM_REG,
    USER,
    Bench,
    FrontEnd,
    Refused,
    answered,
    descriptors,
    eventually,
)
from virtio_driver import GET_ID, IN, OK, OUT, DiskQueue, Ring

from devices.protocols.vhost_user import log as dirty_log
from devices.protocols.vhost_user.log import DirtyLog
from migrate.memory.memfd import create_memfd

# -- rings --------------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_the_driver_is_interrupted(bench: Bench) -> None:
    [queue] = bench.run()
    queue.ask(OUT, 3, b"x" * 1024)
    bench.kick()
    assert answered(bench, queue)[0].status == OK
    eventually(lambda: bool(select.select([bench.front.calls[0]], [], [], 0)[0]))
    queue.ask(IN, 3, length=1024)
    bench.kick()
    assert answered(bench, queue)[0].data == b"x" * 1024
    assert bench.image.read_bytes()[1536:2560] == b"x" * 1024


def test_what_was_available_before_the_ring_started_is_served_without_a_kick(bench: Bench) -> None:
    front = bench.front
    front.features(ACCEPTED | PROTOCOL)
    front.table()
    ring = Ring(front.guest, 0x10000, 8, event_idx=True)
    queue = DiskQueue(ring, 0x20000)
    for _ in range(2):
        queue.ask(GET_ID, length=20)
    front.start(0, ring)
    assert [answer.data.rstrip(b"\0") for answer in answered(bench, queue, 2)] == [b"disk0"] * 2


def test_a_ring_that_is_not_enabled_is_not_served(bench: Bench) -> None:
    [queue] = bench.run()
    bench.front.stop(0)
    queue.ask(GET_ID, length=20)
    bench.kick()
    time.sleep(0.05)
    assert queue.answers() == []


def test_a_stop_says_how_far_the_ring_came_and_another_goes_on_there(bench: Bench) -> None:
    [queue] = bench.run()
    for turn in range(11):
        queue.ask(OUT, turn, bytes([turn]) * 512)
        bench.kick()
        answered(bench, queue)
    assert bench.front.stop(0) == 11
    queue.ask(GET_ID, length=20)
    bench.front.start(0, queue.ring, 11)
    assert answered(bench, queue)[0].status == OK
    assert bench.front.stop(0) == 12


def test_a_second_driver_gets_its_first_interrupt(bench: Bench) -> None:
    """As Linux after SeaBIOS: its ring begins anew, whatever the one before was told."""
    [queue] = bench.run()
    queue.ask(GET_ID, length=20)
    bench.kick()
    answered(bench, queue)
    bench.front.stop(0)
    os.eventfd_read(bench.front.calls[0])
    ring = Ring(bench.front.guest, 0x50000, 8, event_idx=True)
    second = DiskQueue(ring, 0x60000)
    bench.front.start(0, ring, 0)
    second.ask(GET_ID, length=20)
    bench.kick()
    answered(bench, second)
    eventually(lambda: bool(select.select([bench.front.calls[0]], [], [], 0)[0]))


def test_queues_are_served_each_on_its_own(tmp_path: Path) -> None:
    bench = Bench(tmp_path, queues=3)
    queues = bench.run()
    for number in (2, 0, 1):
        queues[number].ask(OUT, number, bytes([number + 1]) * 512)
        bench.kick(number)
        assert answered(bench, queues[number])[0].status == OK
    assert bench.front.stop(1) == 1
    queues[2].ask(GET_ID, length=20)
    bench.kick(2)
    assert answered(bench, queues[2])[0].status == OK
    bench.close()


def test_the_configuration_is_that_of_the_disk(bench: Bench) -> None:
    answer = bench.front.ask(GET_CONFIG, struct.pack("=III", 0, 57, 0) + bytes(57))
    assert struct.unpack_from("=III", answer) == (0, 57, 0)
    assert struct.unpack_from("<Q", answer, 12) == (2048,)


# -- the dirty log ------------------------------------------------------------------------------------------------------------


def pages_of(fd: int) -> set[int]:
    data = os.pread(fd, 4096, 0)
    return {page for page in range(len(data) * 8) if data[page // 8] >> page % 8 & 1}


def changed(before: bytes, after: bytes) -> set[int]:
    return {
        at // 4096 for at in range(0, len(before), 4096) if before[at : at + 4096] != after[at : at + 4096]
    }


def work(bench: Bench, queue: DiskQueue, rounds: int) -> set[int]:
    """Requests of both kinds; the pages that the back end wrote for them: between our last store and the used index."""
    written: set[int] = set()
    for turn in range(rounds):
        queue.ask(OUT, turn % 64, os.urandom(512))
        queue.ask(IN, turn % 64, length=2048)
        before = bytes(bench.memory.regions[0].view)
        bench.kick()
        eventually(lambda: bench.front.guest.read16(queue.ring.used + 2) == (queue.ring.seen + 2) & 0xFFFF)
        with bench.device.lock:  # and it listens for the next kick
            written |= changed(before, bytes(bench.memory.regions[0].view))
        assert len(queue.answers()) == 2
    return written


def logged(bench: Bench, queue: DiskQueue) -> tuple[set[int], set[int]]:
    """Work while it is logged: the pages that the back end wrote, and those that it logged."""
    bench.image.write_bytes(os.urandom(1 << 20))
    fd = bench.front.begin_log()
    bench.front.features(ACCEPTED | PROTOCOL | LOG_ALL)
    bench.front.addresses(0, queue.ring, flags=1)
    return work(bench, queue, 20), pages_of(fd)


def test_every_page_that_the_back_end_wrote_is_in_the_log(bench: Bench) -> None:
    [queue] = bench.run()
    work(bench, queue, 3)  # in the middle of traffic, as a migration begins
    written, found = logged(bench, queue)
    assert written <= found
    assert queue.ring.used >> 12 in found
    # And again from the beginning, after a migration was given up.
    bench.front.features(ACCEPTED | PROTOCOL)
    bench.front.begin_log()
    work(bench, queue, 3)
    assert pages_of(bench.front.log or 0) == set()


def test_a_log_that_is_not_written_is_seen_by_the_same_comparison(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: without it the test above could not fail."""
    monkeypatch.setattr(DirtyLog, "mark", lambda self, gpa, length: None)
    [queue] = bench.run()
    written, found = logged(bench, queue)
    assert not written <= found


def test_the_log_that_comes_next_takes_the_place_of_the_one_before(bench: Bench) -> None:
    [queue] = bench.run()
    first = os.dup(bench.front.begin_log())
    bench.front.features(ACCEPTED | PROTOCOL | LOG_ALL)
    work(bench, queue, 1)
    assert pages_of(first)
    os.pwrite(first, bytes(4096), 0)
    second = bench.front.begin_log()
    work(bench, queue, 1)
    assert pages_of(second)
    assert not pages_of(first)
    os.close(first)


@given(st.lists(st.tuples(st.integers(0, 32767 * 4096), st.integers(0, 40000)), max_size=20))
@settings(max_examples=50)
def test_the_log_has_exactly_the_pages_that_were_marked(marks: list[tuple[int, int]]) -> None:
    fd = create_memfd("log", 4096)
    found = DirtyLog(fd, 4096, 0)
    expected = set()
    for gpa, length in marks:
        found.mark(gpa, length)
        expected |= set(range(gpa // 4096, (gpa + length + 4095) // 4096)) if length else set()
    assert pages_of(fd) == {page for page in expected if page < 32768}
    found.close()
    os.close(fd)


MARKER = """
import os, sys
from devices.protocols.vhost_user.log import DirtyLog
fd, offset, atomic = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
log = DirtyLog(fd, 4096, 0, atomic=atomic != "byte")
if atomic == "plain":
    def mark(gpa, length):
        log._map[gpa >> 15] |= 1 << (gpa >> 12 & 7)
else:
    mark = log.mark
sys.stdin.readline()
for _ in range(6):
    for page in range(offset, 32768, 2):
        mark(page << 12, 1)
"""


def two_processes(kind: str) -> int:
    """How many of 32768 pages two processes lose that mark every other page each, in one log."""
    fd = create_memfd("log", 4096)
    command = [sys.executable, "-c", MARKER, str(fd)]
    both = [
        subprocess.Popen([*command, str(offset), kind], stdin=subprocess.PIPE, pass_fds=[fd])
        for offset in (0, 1)
    ]
    for one in both:
        assert one.stdin is not None
        one.stdin.write(b"\n")
        one.stdin.flush()
    for one in both:
        assert one.wait(60) == 0
        assert one.stdin is not None
        one.stdin.close()
    lost = 32768 - len(pages_of(fd))
    os.close(fd)
    return lost


@pytest.mark.parametrize("kind", ["atomic", "byte"])
def test_two_back_ends_lose_no_bit_of_the_log_that_they_share(kind: str) -> None:
    assert dirty_log.is_exact()
    assert two_processes(kind) == 0


# -- memory -------------------------------------------------------------------------------------------------------------------


def region(gpa: int, size: int, user: int = USER, offset: int = 0) -> bytes:
    return struct.pack("=8xQQQQ", gpa, size, user, offset)


def test_memory_slots_come_and_go_one_by_one(bench: Bench) -> None:
    front = bench.front
    assert front.ask_u64(MAX_SLOTS) >= 8
    front.features(ACCEPTED | PROTOCOL)
    fd, size = bench.memory.regions[0].fd, bench.memory.regions[0].size
    front.tell(ADD_REG, region(0, size), [fd])
    ring = Ring(front.guest, 0x10000, 8, event_idx=True)
    queue = DiskQueue(ring, 0x20000)
    front.start(0, ring)
    queue.ask(GET_ID, length=20)
    bench.kick()
    assert answered(bench, queue)[0].status == OK
    other = create_memfd("more", 8192)
    front.tell(ADD_REG, region(size, 8192, USER + size), [other])
    with pytest.raises(Refused):  # it overlaps
        front.tell(ADD_REG, region(size + 4096, 4096, USER + size), [other])
    front.stop(0)
    front.tell(REM_REG, region(size, 8192, USER + size))
    with pytest.raises(Refused):
        front.tell(REM_REG, region(size, 8192, USER + size))
    os.close(other)


def unsealed(size: int) -> int:
    fd = os.memfd_create("bare", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


U64 = struct.Struct("=Q")
PAIR = struct.Struct("=II")
#: What no front end should send, by a word for it: request, payload, the descriptors that go along.
MALFORMED: dict[str, tuple[int, bytes, Callable[[], list[int]]]] = {
    "an unknown request": (99, b"", list),
    "features that were not offered": (2, U64.pack(1 << 60), list),
    "protocol features that were not offered": (16, U64.pack(1 << 40), list),
    "a payload that is too short": (2, b"1234", list),
    "a payload that is too long": (18, bytes(9), list),
    "a ring that is not there": (8, PAIR.pack(7, 8), list),
    "a ring of no power of two": (8, PAIR.pack(0, 7), list),
    "a ring that is too large": (8, PAIR.pack(0, 1 << 20), list),
    "a base that is no index": (10, PAIR.pack(0, 1 << 16), list),
    "a ring outside of memory": (9, struct.pack("=IIQQQQ", 0, 0, 1, 2, 3, 4), list),
    "a kick without its descriptor": (12, U64.pack(0), list),
    "a call with two": (13, U64.pack(0), lambda: [unsealed(1), unsealed(1)]),
    "a table without descriptors": (5, struct.pack("=IIQQQQ", 1, 0, 0, 4096, 0, 0), list),
    "a table of nine regions": (5, struct.pack("=II", 9, 0) + bytes(288), list),
    "a table that is cut off": (5, struct.pack("=II", 3, 0) + bytes(32), list),
    "memory without seals": (5, struct.pack("=IIQQQQ", 1, 0, 0, 4096, 0, 0), lambda: [unsealed(4096)]),
    "memory that is smaller than said": (
        5,
        struct.pack("=IIQQQQ", 1, 0, 0, 8192, 0, 0),
        lambda: [create_memfd("m", 4096)],
    ),
    "memory that goes round": (
        5,
        struct.pack("=IIQQQQ", 1, 0, (1 << 64) - 4096, 8192, 0, 0),
        lambda: [create_memfd("m", 8192)],
    ),
    "memory in half pages": (
        5,
        struct.pack("=IIQQQQ", 1, 0, 100, 4096, 0, 0),
        lambda: [create_memfd("m", 8192)],
    ),
    "a log without a descriptor": (6, struct.pack("=QQ", 4096, 0), list),
    "a log without seals": (6, struct.pack("=QQ", 4096, 0), lambda: [unsealed(4096)]),
    "a log that is larger than its memory": (
        6,
        struct.pack("=QQ", 8192, 0),
        lambda: [create_memfd("l", 4096)],
    ),
    "a log at half a page": (6, struct.pack("=QQ", 4096, 7), lambda: [create_memfd("l", 8192)]),
    "an endless log": (6, struct.pack("=QQ", 1 << 60, 0), lambda: [create_memfd("l", 4096)]),
    "an in-flight region that is too small": (
        32,
        struct.pack("=QQHH4x", 64, 0, 4, 1024),
        lambda: [create_memfd("i", 4096)],
    ),
    "an in-flight region of no queues": (31, struct.pack("=QQHH4x", 0, 0, 0, 0), list),
    "device state in no direction": (42, struct.pack("=II", 2, 0), lambda: [unsealed(1)]),
    "a check of state that never came": (43, b"", list),
    "a configuration that is larger than any": (24, struct.pack("=III", 0, 4000, 0), list),
    "a change of the configuration": (25, struct.pack("=III", 0, 1, 0) + b"1", list),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_no_front_end_should_send_is_refused_and_nothing_is_kept_of_it(bench: Bench, what: str) -> None:
    request, payload, make = MALFORMED[what]
    bench.front.features(ACCEPTED | PROTOCOL)
    before = descriptors()
    fds = make()
    with pytest.raises(Refused):
        bench.front.tell(request, payload, fds)
    for fd in fds:
        os.close(fd)
    assert descriptors() == before
    # And the device serves on.
    [queue] = bench.run()
    queue.ask(GET_ID, length=20)
    bench.kick()
    assert answered(bench, queue)[0].status == OK


def hung_up(front: FrontEnd) -> bool:
    try:
        return front.socket.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("=III", 1, 2, 0),
        struct.pack("=III", 1, 5, 0),
        struct.pack("=III", 5, 1, 1 << 30),
        b"\xff" * 12,
    ],
    ids=["another version", "a reply", "a gigabyte", "garbage"],
)
def test_a_message_whose_end_is_not_known_ends_the_connection_and_the_next_front_end_is_served(
    bench: Bench, data: bytes
) -> None:
    bench.front.socket.sendall(data)
    assert hung_up(bench.front)
    bench.front.close()
    bench.front = FrontEnd(bench.path, bench.memory)
    bench.front.realize(1)
    [queue] = bench.run()
    queue.ask(GET_ID, length=20)
    bench.kick()
    assert answered(bench, queue)[0].status == OK


def test_too_many_descriptors_end_the_connection_and_none_is_kept(bench: Bench) -> None:
    before = descriptors()
    fds = [unsealed(1) for _ in range(9)]
    bench.front.send(5, struct.pack("=II", 0, 0), fds)
    assert hung_up(bench.front)
    for fd in fds:
        os.close(fd)
    eventually(
        lambda: descriptors() == before - 3
    )  # the connection, and the call's eventfd; our end is still open


def test_a_front_end_that_goes_leaves_nothing_behind_and_another_finds_the_device(bench: Bench) -> None:
    bench.front.close()
    eventually(lambda: bench.device.server.session is None)
    before = descriptors()
    for _ in range(3):
        bench.front = FrontEnd(bench.path, bench.memory)
        bench.front.realize(1)
        [queue] = bench.run()
        bench.front.begin_log()
        queue.ask(GET_ID, length=20)
        bench.kick()
        assert answered(bench, queue)[0].status == OK
        bench.front.close()
        eventually(lambda: bench.device.server.session is None and descriptors() == before)
    bench.front = FrontEnd(bench.path, bench.memory)


def test_a_second_front_end_waits_until_the_first_has_gone(bench: Bench) -> None:
    second = FrontEnd(bench.path, bench.memory)
    second.socket.settimeout(0.05)
    second.send(1)
    with pytest.raises(TimeoutError):
        second.reply(1)
    bench.front.close()
    second.socket.settimeout(10)
    assert second.reply(1)[0]
    bench.front = second
