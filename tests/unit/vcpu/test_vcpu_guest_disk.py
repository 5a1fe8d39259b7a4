"""The built-in guest on a disk: it works on it all the time, what it was told lasts is there, and it notices what is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disk_journal import SECTOR, content, durable, lines, missing, zeroes
from vcpu_machine import Machine, corrupt, ticks

#: Every block is read again within a few ticks, so that damage shows soon.
BUSY = "span=1 check=8 dirty=8 tick_us=2000 idle_us=1000 draw=0 loop=0 disk=8 disk_kb=128 flush=16"
TYPES = ("uart16550", "rtc", "virtio-blk")
BLOCKS = 32


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def make(cmdline: str = BUSY, types: tuple[str, ...] = TYPES, **named: object) -> Machine:
        made.append(Machine(tmp_path, cmdline, types, **named))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()
    for memory in {id(one.memory): one.memory for one in made}.values():
        memory.close()


def work(guest: Machine, operations: int) -> list[str]:
    """Run until so many operations more were said to last, and stop."""
    wanted = durable(guest.said)[0] + operations
    guest.run()
    guest.listen(lambda said: durable(said)[0] >= wanted)
    guest.rest()
    guest.drain()
    return guest.said


def test_it_works_on_the_disk_and_what_it_was_told_lasts_is_in_the_image(machine):
    guest = machine()
    said = work(guest, 500)
    assert not corrupt(said)
    assert lines(said)[0].split()[:4] == ["V", "16384", "2", str(BLOCKS)]
    assert not missing(guest.image, said)


@pytest.mark.parametrize("other", [-1, 1])
def test_the_check_of_the_image_can_fail(machine, other):
    guest = machine()
    said = work(guest, 300)
    seed = int(lines(said)[0].split()[4])
    data = bytearray(guest.image.read_bytes())
    sector = next(n for n in range(8 * BLOCKS) if any(data[SECTOR * n : SECTOR * (n + 1)]))
    span = slice(SECTOR * sector, SECTOR * (sector + 1))
    operation = int.from_bytes(data[span][:8], "little") >> 32
    assert data[span] == content(sector, operation, seed)
    data[span] = content(sector, operation + other, seed)
    guest.image.write_bytes(data)
    (found,) = missing(guest.image, said)
    assert found.startswith(f"sector {sector} ")


def test_writes_discards_and_zeroes_are_among_what_it_does(machine):
    guest = machine()
    last = durable(work(guest, 200))[0]
    kinds = [zeroes(number) for number in range(1, last + 1)]
    assert 0.05 < sum(kinds) / len(kinds) < 0.25


@pytest.mark.parametrize(
    ("cmdline", "types"),
    [
        (BUSY + " disk=0", TYPES),
        (BUSY, ("virtio-blk", "uart16550")),
        ("storm=1 stride=64 span=2 tick_us=5000 disk=4 disk_kb=256 flush=8", TYPES),
    ],
)
def test_it_works_with_whatever_else_there_is_or_leaves_the_disk_alone(machine, cmdline, types):
    guest = machine(cmdline.replace("disk=8", "") if "disk=0" in cmdline else cmdline, types)
    said = guest.run_ticks(100)
    assert not corrupt(said)
    if "disk=0" in cmdline:
        assert not lines(said)
    else:
        assert durable(said)[0] > 16


def test_a_disk_that_may_only_be_read_is_read(tmp_path, machine, monkeypatch):
    import vcpu_machine

    class ReadOnly(vcpu_machine.VirtioBlk):
        def __init__(self, name: str, options: dict[str, str]) -> None:
            super().__init__(name, options | {"read_only": "on"})

    monkeypatch.setitem(vcpu_machine.TYPES, "virtio-blk", ReadOnly)
    guest = machine()
    said = guest.run_ticks(50)
    assert not corrupt(said)
    assert len(lines(said)) == 1
    assert not guest.image.read_bytes().strip(b"\0")
    assert guest.devices["virtio-blk"].function.queues[0].returned > 50


def test_it_is_not_disturbed_by_being_stopped_a_hundred_times(machine, monkeypatch):
    guest = machine()
    read = guest.devices["virtio-blk"].image.read

    def slow(*arguments: object) -> None:
        time.sleep(0.002)  # as a disk might; else nothing would ever wait at a stop
        read(*arguments)

    monkeypatch.setattr(guest.devices["virtio-blk"].image, "read", slow)
    work(guest, 16)
    in_the_ring = 0
    for _ in range(100):
        guest.run()
        guest.rest()
        queues = guest.devices["virtio-blk"].function.queues
        in_the_ring += any(queue._load(queue.available + 2) != queue.taken for queue in queues)
    said = work(guest, 100)
    assert not corrupt(said)
    assert not missing(guest.image, said)
    assert ticks(said) == list(range(1, len(ticks(said)) + 1))
    # Else this test would not show what becomes of them.
    assert in_the_ring


def test_it_goes_on_in_another_machine_and_nothing_that_lasts_is_lost(machine):
    guest = machine()
    said: list[str] = []
    for _ in range(8):
        said += work(guest, 40)
        state = guest.save()
        guest.devices["virtio-blk"].release_locks()
        following = machine(memory=guest.memory)
        following.load(state)
        assert following.save() == state
        following._partial, guest = guest._partial, following
        following.said = said
        said = []
    said = work(guest, 40)
    assert not corrupt(said)
    assert not missing(guest.image, said)


# -- it notices what is lost ------------------------------------------------------------------------------------------------


def a_block_is_old(guest: Machine) -> None:
    old = guest.image.read_bytes()
    work(guest, 4 * BLOCKS)
    with guest.image.open("r+b") as image:
        image.write(old)


def a_bit_changed(guest: Machine) -> None:
    with guest.image.open("r+b") as image:
        data = bytearray(image.read())
        for sector in range(8 * BLOCKS):
            data[SECTOR * sector + 100] ^= 1
        image.seek(0)
        image.write(data)


def sectors_changed_places(guest: Machine) -> None:
    with guest.image.open("r+b") as image:
        data = image.read()
        image.seek(0)
        image.write(data[4096 : 4096 * BLOCKS] + data[:4096])


def the_image_cannot_be_read(guest: Machine) -> None:
    only_written = os.open(guest.image, os.O_WRONLY)
    os.dup2(only_written, guest.devices["virtio-blk"].image._fd)
    os.close(only_written)


def interrupts_do_not_come(guest: Machine) -> None:
    for irq in guest.devices["virtio-blk"].all_irqs:
        irq.connect(None)


def an_answer_comes_again(guest: Machine) -> None:
    """The used ring goes on by one that was there before."""
    device = guest.devices["virtio-blk"]
    for queue in device.function.queues:
        queue._store(queue.used + 2, queue.returned + 1 & 0xFFFF)
        queue.returned = queue.returned + 1 & 0xFFFF


@pytest.mark.parametrize(
    ("damage", "noticed"),
    [
        (a_block_is_old, "disk_sector"),
        (a_bit_changed, "disk_data"),
        (sectors_changed_places, "disk_sector"),
        (the_image_cannot_be_read, "disk_status"),
        (interrupts_do_not_come, "disk_irq"),
        (an_answer_comes_again, "disk_answer"),
    ],
)
def test_it_says_so_when_something_is_wrong_and_goes_on(machine, damage, noticed):
    guest = machine()
    work(guest, 4 * BLOCKS)
    damage(guest)
    assert not corrupt(guest.said)
    enough = len(ticks(guest.said)) + 3000
    guest.run()
    guest.listen(
        lambda said: noticed in {line.split()[1] for line in corrupt(said)} or len(ticks(said)) > enough
    )
    guest.rest()
    said = guest.run_ticks(3)
    assert noticed in {line.split()[1] for line in corrupt(said)}
    assert ticks(said) == list(range(1, len(ticks(said)) + 1))
