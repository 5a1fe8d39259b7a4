"""The queues' threads: who waits for a slow image and who does not, and how a disk under load comes to rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from virtio_driver import FLUSH, IN, OK, OUT, DiskQueue
from virtio_rig import Disk, Rig

from devices import virtio_blk
from migrate.errors import DeviceRefused, DeviceTimeout


class Gate:
    """Holds requests to the image up until it is opened."""

    def __init__(self, disk: Disk, monkeypatch: pytest.MonkeyPatch, name: str = "read") -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        real: Callable[..., None] = getattr(disk.device.image, name)

        def gated(*arguments: object, **named: object) -> None:
            self.reached.set()
            assert self.open.wait(20)
            real(*arguments, **named)

        monkeypatch.setattr(disk.device.image, name, gated)


def answers(disk: Disk, queue: DiskQueue, number: int, count: int) -> list[int]:
    """Statuses of the next `count` answers, by their interrupts."""
    found: list[int] = []
    while len(found) < count:
        found += [answer.status for answer in queue.answers()]
        if len(found) < count:
            assert disk.wait_for_edge(number + 1)
    return found


def ask(disk: Disk, queue: DiskQueue, number: int, kind: int, **how: object) -> None:
    if queue.ask(kind, **how)[1]:  # type: ignore[arg-type]
        disk.pci.notify(number)


@pytest.fixture
def disk(rig: Rig) -> Disk:
    return rig.running(threads=True)


def test_requests_of_all_queues_are_answered_by_interrupts(rig: Rig, disk: Disk) -> None:
    queues = disk.set_up(rig.guest)
    for turn in range(100):
        for number, queue in enumerate(queues):
            ask(disk, queue, number, OUT, sector=turn % 32 + 32 * number, data=bytes((turn,)) * 512)
            ask(disk, queue, number, FLUSH if turn % 10 == 0 else IN, length=0 if turn % 10 == 0 else 512)
        for number, queue in enumerate(queues):
            assert answers(disk, queue, number, 2) == [OK, OK]
    last = [96 + at if at < 4 else 64 + at for at in range(32)]
    assert rig.image.read_bytes() == b"".join(bytes((turn,)) * 512 for turn in last * 2)


def test_a_slow_image_keeps_neither_registers_nor_the_other_queue_nor_a_save_waiting(
    rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues = disk.set_up(rig.guest)
    gate = Gate(disk, monkeypatch)
    ask(disk, queues[0], 0, IN, length=512)
    assert gate.reached.wait(10)
    assert disk.pci.common(0x14, 1) == 15
    ask(disk, queues[1], 1, OUT, data=bytes(512))
    assert answers(disk, queues[1], 1, 1) == [OK]
    with disk.device.lock:
        assert disk.device.save()["queues"][0]["in_flight"] == [0]  # type: ignore[index]
    assert queues[0].answers() == []
    gate.open.set()
    assert answers(disk, queues[0], 0, 1) == [OK]


def test_coming_to_rest_waits_for_what_is_on_its_way_and_leaves_the_rest_in_the_ring(
    rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = disk.set_up(rig.guest)[0]
    gate = Gate(disk, monkeypatch)
    for _ in range(2):
        ask(disk, queue, 0, IN, length=512)
    assert gate.reached.wait(10)
    threading.Timer(0.05, gate.open.set).start()
    disk.rest()
    assert [answer.status for answer in queue.answers()] == [OK]
    assert disk.edges(1) == 1  # signalled before it stood still
    state = disk.save()
    assert (
        disk.device.function.queues[0].save() | {"taken": 1, "returned": 1}
        == disk.device.function.queues[0].save()
    )
    before = bytes(rig.memory.regions[0].view)
    time.sleep(0.05)  # long enough for a thread that did not rest
    assert (disk.save(), bytes(rig.memory.regions[0].view)) == (state, before)
    disk.start()
    disk.run()
    assert answers(disk, queue, 0, 1) == [OK]


def test_an_image_that_hangs_refuses_the_stop_by_name_and_the_disk_runs_on(
    rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtio_blk, "PATIENCE", 0.05)
    queue = disk.set_up(rig.guest)[0]
    gate = Gate(disk, monkeypatch)
    ask(disk, queue, 0, IN, length=512)
    ask(disk, queue, 0, IN, length=512)
    assert gate.reached.wait(10)
    with pytest.raises(DeviceTimeout, match=r"disk\.img has not answered") as caught:
        disk.rest()
    assert caught.value.device == "disk0"
    gate.open.set()
    assert answers(disk, queue, 0, 2) == [OK, OK]
    monkeypatch.undo()
    disk.rest()


def test_a_reset_does_not_wait_for_the_image_and_is_seen_when_it_is_done(
    rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = disk.set_up(rig.guest)[0]
    gate = Gate(disk, monkeypatch)
    ask(disk, queue, 0, IN, length=512)
    assert gate.reached.wait(10)
    disk.pci.common(0x14, 1, 0)
    assert disk.pci.common(0x14, 1) == 15
    gate.open.set()
    deadline = time.monotonic() + 10
    while disk.pci.common(0x14, 1):
        assert time.monotonic() < deadline
    queue = disk.set_up(rig.guest)[0]
    ask(disk, queue, 0, IN, length=512)
    assert answers(disk, queue, 0, 1) == [OK]


def test_memory_that_is_taken_back_is_let_go_of_first(
    rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = disk.set_up(rig.guest)[0]
    gate = Gate(disk, monkeypatch)
    ask(disk, queue, 0, IN, length=512)
    assert gate.reached.wait(10)
    threading.Timer(0.05, gate.open.set).start()
    with disk.device.lock:
        disk.device.before_unmap()
        assert [answer.status for answer in queue.answers()] == [OK]
        disk.device.windows_changed()
    ask(disk, queue, 0, IN, length=512)
    assert answers(disk, queue, 0, 1) == [OK]


def test_a_disk_under_load_is_stopped_a_hundred_times_and_loses_and_repeats_nothing(
    rig: Rig, disk: Disk
) -> None:
    queues = disk.set_up(rig.guest)
    turn = [0, 0]
    expected = bytearray(rig.image.read_bytes())
    for _ in range(100):
        for number, queue in enumerate(queues):
            while len(queue.ring.free) >= 3:
                turn[number] += 1
                sector = 32 * number + turn[number] % 32
                data = turn[number].to_bytes(2, "little") * 256
                expected[512 * sector : 512 * (sector + 1)] = data
                ask(disk, queue, number, OUT, sector=sector, data=data)
        disk.rest()
        assert all(answer.status == OK for queue in queues for answer in queue.answers())
        disk.start()
        disk.run()
    for number, queue in enumerate(queues):
        answers(disk, queue, number, len(queue.asked))
    assert rig.image.read_bytes() == expected


def test_the_lock_comes_with_p2p_stays_through_a_stop_and_is_let_go_when_told(rig: Rig) -> None:
    one, other = rig.disk(threads=True), rig.disk(threads=True)
    one.start()
    with pytest.raises(DeviceRefused, match=r"disk\.img is locked"):
        other.start()
    one.run()
    one.rest()
    with pytest.raises(DeviceRefused):
        other.start()
    one.device.release_locks()
    one.device.release_locks()
    other.start()
    with pytest.raises(DeviceRefused):
        one.start()
    other.run()
    other.rest()
    other.device.release_locks()
    one.start()
