"""A vhost-user back end: which rings are served when, its state, what was in flight when it was killed, and what hangs."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from vhost_front_end import (
    ACCEPTED,
    CHECK_STATE,
    ENABLE,
    GET_BASE,
    PROTOCOL,
    SET_STATE_FD,
    Bench,
    FrontEnd,
    Refused,
    answered,
    descriptors,
    eventually,
)
from virtio_driver import GET_ID, IN, OK, OUT

from devices import vhost_blk
from devices.virtio import blk
from devices.virtio.backing import Image
from migrate.errors import DeviceRefused, FerryError
from migrate.state import blob

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
    assert Path(image.path).read_bytes()[3 * 512 : 4 * 512] == b"\xa5" * 512
    other.close()


def test_the_socket_is_for_this_user_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert os.stat(bench.path).st_mode & 0o777 == 0o600
    with pytest.raises(FerryError, match="another process serves"):
        bench.make_device()
    bench.close()
    assert not os.path.exists(bench.path)
