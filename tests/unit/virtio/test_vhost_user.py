"""A vhost-user back end before a front end that follows the specification: rings, the dirty log, memory, state, reconnecting."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vhost_front_end import (
    ACCEPTED,
    ADD_REG,
    CHECK_STATE,
    ENABLE,
    GET_BASE,
    GET_CONFIG,
    LOG_ALL,
    MAX_SLOTS,
    PROTOCOL,
    REM_REG,
    SET_STATE_FD,
    USER,
    Bench,
    FrontEnd,
    Refused,
)
from virtio_driver import GET_ID, IN, OK, OUT, Answer, DiskQueue, Ring

from devices import vhost_blk
from devices.protocols.vhost_user import log as dirty_log
from devices.protocols.vhost_user.log import DirtyLog
from devices.virtio import blk
from devices.virtio.backing import Image
from migrate.errors import DeviceRefused, FerryError
from migrate.memory.memfd import create_memfd
from migrate.state import blob


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def answered(bench: Bench, queue: DiskQueue, count: int = 1, seconds: float = 10.0) -> list[Answer]:
    """So many answers, waited for as a driver does."""
    found: list[Answer] = []
    deadline = time.monotonic() + seconds
    while len(found) < count:
        found += queue.answers()
        assert time.monotonic() < deadline, f"{len(found)} of {count} answers"
        time.sleep(0.001)
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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


# -- who is served ------------------------------------------------------------------------------------------------------------


def test_a_ring_waits_for_the_image_that_another_host_has_locked(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    bench = Bench(tmp_path)
    [queue] = bench.run()
    other = Bench(tmp_path / "other", image=str(bench.image))
    [waiting] = other.run()
    waiting.ask(GET_ID, length=20)
    other.kick()
    time.sleep(0.1)
    assert waiting.answers() == []
    with other.device.lock:
        assert "locked by another process" in other.device.not_serving()
    bench.front.stop(0)
    with other.device.lock:
        other.device._look_at_lock()  # what a timer of the kit's does
    assert answered(other, waiting)[0].status == OK
    with other.device.lock:
        assert other.device.not_serving() == ""
    queue.ask(GET_ID, length=20)
    bench.front.start(0, queue.ring, 0)
    time.sleep(0.05)
    assert queue.answers() == []
    other.close()
    bench.close()


def test_a_machines_disk_is_locked_while_its_rings_are_stopped(tmp_path: Path) -> None:
    bench = Bench(tmp_path, lock="machine")
    bench.run()
    bench.front.stop(0)
    assert bench.device.image.locked
    with bench.device.lock:
        bench.device.enter_p2p()
        bench.device.release_locks()
    assert not bench.device.image.locked
    bench.close()


def test_a_device_that_is_stopped_says_so_and_serves_once_it_runs(bench: Bench) -> None:
    with bench.device.lock:
        bench.device.enter_p2p()
    [queue] = bench.run()
    queue.ask(GET_ID, length=20)
    bench.kick()
    time.sleep(0.05)
    assert queue.answers() == []
    with bench.device.lock:
        assert "stopped" in bench.device.not_serving()
        bench.device.leave_p2p()
        assert bench.device.not_serving() == ""
    assert answered(bench, queue)[0].status == OK


# -- state --------------------------------------------------------------------------------------------------------------------


def saved(front: FrontEnd) -> bytes:
    reader, writer = os.pipe()
    front.send(SET_STATE_FD, struct.pack("=II", 0, 0), [writer])
    os.close(writer)
    assert front.reply(SET_STATE_FD)[0] == struct.pack("=Q", 0x100)
    with os.fdopen(reader, "rb") as file:
        found = file.read()
    assert front.ask(CHECK_STATE) == bytes(8)
    return found


def load(front: FrontEnd, data: bytes) -> int:
    reader, writer = os.pipe()
    front.send(SET_STATE_FD, struct.pack("=II", 1, 0), [reader])
    os.close(reader)
    assert front.reply(SET_STATE_FD)[0] == struct.pack("=Q", 0x100)
    with os.fdopen(writer, "wb") as file:
        file.write(data)
    time.sleep(0.01)
    return struct.unpack("=Q", front.ask(CHECK_STATE))[0]


def test_the_state_goes_through_a_pipe_of_the_front_ends_as_the_blob_that_save_gives(bench: Bench) -> None:
    bench.run()
    bench.front.stop(0)
    found = saved(bench.front)
    assert blob.unpack(found).type == "vhost-user-blk"
    assert load(bench.front, found) == 0
    assert load(bench.front, found[:-1]) != 0
    assert load(bench.front, b"") != 0
    assert load(bench.front, bytes(1 << 20)) != 0
    before = descriptors()
    assert load(bench.front, found) == 0
    assert descriptors() == before


def test_the_state_of_another_disk_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    found = saved(bench.front)
    bench.close()
    other = Bench(tmp_path, serial="another")
    assert load(other.front, found) != 0
    other.close()


def test_state_is_not_given_while_a_ring_runs(bench: Bench) -> None:
    """The refusal is an answer: the connection goes on, and so do the rings."""
    [queue] = bench.run()
    reader, writer = os.pipe()
    bench.front.send(SET_STATE_FD, struct.pack("=II", 0, 0), [writer])
    assert struct.unpack("=Q", bench.front.reply(SET_STATE_FD)[0])[0] & 0xFF
    os.close(reader)
    os.close(writer)
    queue.ask(GET_ID, length=20)
    bench.kick()
    assert answered(bench, queue)[0].status == OK


def test_state_that_came_before_a_ring_ran_is_not_loaded_under_it(bench: Bench) -> None:
    [queue] = bench.run()
    bench.front.stop(0)
    found = saved(bench.front)
    reader, writer = os.pipe()
    bench.front.send(SET_STATE_FD, struct.pack("=II", 1, 0), [reader])
    assert bench.front.reply(SET_STATE_FD)[0] == struct.pack("=Q", 0x100)
    os.close(reader)
    with os.fdopen(writer, "wb") as file:
        file.write(found)
    bench.front.start(0, queue.ring)
    assert struct.unpack("=Q", bench.front.ask(CHECK_STATE))[0]


def test_what_is_in_flight_must_fit_into_its_region(tmp_path: Path) -> None:
    """A request beyond it would be lost with the process."""
    bench = Bench(tmp_path)
    bench.front.keep_inflight(1, 4)
    with pytest.raises(Refused):
        bench.run()
    bench.close()


# -- requests in flight -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """SIGKILL, as far as the device's memory is concerned: nothing after this is done."""


#: Every store that belongs to one request, in order: after which of them the process is killed.
STEPS = ("taken", "noted", "done", "returning", "element", "index", "cleared", "told")


def die_after(step: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = bench.device.queues[0]
    journal = queue.journal
    assert journal is not None

    def dying(function: Callable[..., object], *, before: bool = False) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            if before:
                raise Killed
            function(*arguments)
            raise Killed

        return run

    if step == "taken":
        monkeypatch.setattr(journal, "took", dying(journal.took, before=True))
    elif step == "noted":
        monkeypatch.setattr(journal, "took", dying(journal.took))
    elif step == "done":
        monkeypatch.setattr(journal, "returning", dying(journal.returning, before=True))
    elif step == "returning":
        monkeypatch.setattr(journal, "returning", dying(journal.returning))
    elif step == "element":
        monkeypatch.setattr(queue, "_store", dying(queue._store, before=True))
    elif step == "index":
        monkeypatch.setattr(journal, "returned", dying(journal.returned, before=True))
    elif step == "cleared":
        monkeypatch.setattr(journal, "_halves", _Refusing(journal._halves))  # type: ignore[attr-defined]


class _Refusing:
    """The memory of the region, in which the used index is never noted."""

    def __init__(self, halves: memoryview) -> None:
        self.halves = halves

    def __getitem__(self, index: int) -> int:
        return self.halves[index]

    def __setitem__(self, index: int, value: int) -> None:
        if index == 7:
            raise Killed
        self.halves[index] = value


@pytest.mark.parametrize("step", STEPS)
def test_a_back_end_that_is_killed_loses_no_request_and_answers_none_twice(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, threads=False)
    bench.front.keep_inflight(1, 8)
    [queue] = bench.run()
    queue.ask(OUT, 0, b"a" * 512)
    one_step(bench)
    assert queue.answers()[0].status == OK
    die_after(step, bench, monkeypatch)
    queue.ask(OUT, 1, b"b" * 512)
    try:
        one_step(bench)
    except Killed:
        assert step != "told"
    monkeypatch.undo()
    used = bench.front.guest.read16(queue.ring.used + 2)
    kept, calls = os.dup(bench.front.inflight or 0), bench.front
    # A new process on the same image, a front end that gives it the region that it kept.
    calls.close()
    bench.close_device()
    bench.device = bench.make_device()
    front = bench.front = FrontEnd(bench.path, bench.memory)
    front.realize(1)
    front.features(ACCEPTED | PROTOCOL)
    front.table()
    front.inflight = kept
    front.tell(32, struct.pack("=QQHH4x", 4096, 0, 1, 8), [kept])
    front.start(0, queue.ring, used)  # what QEMU says of a ring whose back end has gone: its used index
    queue.ask(IN, 0, length=1024)
    while one_step(bench):
        pass
    answers = queue.answers()
    assert [answer.status for answer in answers] == [OK] * len(answers)
    assert answers[-1].data == b"a" * 512 + b"b" * 512
    assert not queue.asked, "a request was lost"
    assert front.stop(0) == 3
    bench.close()


def one_step(bench: Bench) -> bool:
    """All steps of one request, without the queue's thread."""
    runner = bench.device.runners[0]
    with bench.device.lock:
        if runner.take() is None:
            return False
    runner.run()
    with bench.device.lock:
        runner.complete()
    return True


def test_requests_are_carried_out_again_in_the_order_in_which_they_were_taken() -> None:
    from devices.protocols.vhost_user import inflight

    fd, size = inflight.make(2, 16)
    region = inflight.InflightRegion(fd, size, 0, 2, 16)
    queue = region.queues[1]
    assert queue.recover(5) == []
    for head in (9, 2, 14):
        queue.took(head)
    queue.returning(2)
    queue.returned(2, 6)
    assert queue.recover(6) == [9, 14]
    queue.returning(9)  # killed after the used index went on and before that was noted
    assert queue.recover(7) == [14]
    assert region.queues[0].recover(0) == []
    region.close()
    os.close(fd)


# -- errors from inside -------------------------------------------------------------------------------------------------------


def test_a_driver_that_breaks_the_rules_stops_its_ring_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, queues=2)
    broken, good = bench.run()
    broken.ring.describe(0, 0x20000, 16, 1, 0)  # a chain that loops
    broken.ring.offer(0)
    bench.kick(0)
    good.ask(GET_ID, length=20)
    bench.kick(1)
    assert answered(bench, good)[0].status == OK
    assert bench.front.stop(0) in (0, 1)
    bench.close()


def test_a_stop_comes_through_while_a_ring_is_busy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages before kicks: GET_VRING_BASE waits for one request at the most."""
    [queue] = bench.run(size=64)
    original = blk.Request.run

    def slow(request: blk.Request) -> None:
        time.sleep(0.02)
        original(request)

    monkeypatch.setattr(blk.Request, "run", slow)
    for _ in range(8):
        queue.ask(GET_ID, length=20)
    bench.kick()
    start = time.monotonic()
    base = struct.unpack("=II", bench.front.ask(GET_BASE, struct.pack("=II", 0, 0)))[1]
    assert time.monotonic() - start < 1.0
    assert base < 8


def test_a_ring_whose_request_hangs_has_no_base_and_keeps_its_image(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the other host would have the image while a write is yet to land in it, or the guest would wait for ever."""
    [queue] = bench.run()
    gate = threading.Event()
    original = blk.Request.run

    def hangs(request: blk.Request) -> None:
        gate.wait(10)
        original(request)

    monkeypatch.setattr(blk.Request, "run", hangs)
    monkeypatch.setattr(vhost_blk, "PATIENCE", 0.1)
    queue.ask(OUT, 3, b"\xa5" * 512)
    bench.kick()
    eventually(lambda: bench.device.runners[0].busy)
    with pytest.raises(Refused):
        bench.front.tell(ENABLE, struct.pack("=II", 0, 0))
    with pytest.raises(ConnectionError):
        bench.front.ask(GET_BASE, struct.pack("=II", 0, 0))
    image = bench.device.image
    other = Image(image.path, read_only=False)
    with pytest.raises(DeviceRefused, match="locked by another"):
        other.lock()
    gate.set()
    eventually(lambda: not bench.device.runners[0].busy)
    with bench.device.lock:
        bench.device._look_at_lock()  # what a timer of the kit's does
    other.lock()
    assert os.pread(os.open(image.path, os.O_RDONLY), 512, 3 * 512) == b"\xa5" * 512
    other.close()


def test_the_socket_is_for_this_user_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert os.stat(bench.path).st_mode & 0o777 == 0o600
    with pytest.raises(FerryError, match="another process serves"):
        bench.make_device()
    bench.close()
    assert not os.path.exists(bench.path)
