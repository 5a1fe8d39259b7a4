"""The disk's process on a bus and behind vfio-user, with a driver of our own: what it says, refuses, locks and leaves behind."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from disk_machine import HERE, DiskMachine

from devices.protocols.vfio_user.client import Client, RequestRefused
from devices.protocols.vfio_user.messages import DeviceFlags
from migrate.bus import Bus, Disk
from migrate.errors import DeviceRefused
from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory, RegionSpec

sys.path.insert(0, str(HERE.parents[1] / "unit" / "virtio"))
from virtio_driver import EVENT_IDX, FLUSH, IN, INDIRECT_DESC, OK, OUT, VERSION_1, DiskQueue, Guest, Pci, Ring

ROOT = HERE.parents[2]
SIZE = 2 << 20


class Driver:
    """A VMM and a driver in it, on the first queue of a disk's process."""

    def __init__(self, machine: DiskMachine, memory: GuestMemory) -> None:
        self.client = Client.connect(str(machine.directory / "disk0"), device="disk0")
        for region in memory.regions:
            self.client.dma_map(region.gpa, region.size, region.fd)
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self.client.set_irq_eventfd(2, self.eventfd, 1)
        self.pci = Pci(self.client.region_read, self.client.region_write)
        self.guest = Guest(memory)

    def set_up(self) -> DiskQueue:
        assert self.pci.accept(VERSION_1 | EVENT_IDX | INDIRECT_DESC | 1 << 9) & 8
        ring = Ring(self.guest, 0x10000, 16, event_idx=True)
        self.pci.use_vector(1)
        self.pci.set_up_queue(0, ring, 1)
        self.pci.status(4)
        return DiskQueue(ring, 0x20000)

    def ask(self, queue: DiskQueue, kind: int, **how: object) -> bytes:
        """One request to its end, by interrupt; the data that came with it."""
        if queue.ask(kind, **how)[1]:  # type: ignore[arg-type]
            self.pci.notify(0)
        while not (found := queue.answers()):
            assert select.select([self.eventfd], [], [], 10)[0]
            os.eventfd_read(self.eventfd)
        assert found[0].status == OK
        return found[0].data

    def close(self) -> None:
        self.client.close()
        os.close(self.eventfd)


@pytest.fixture
def memory():
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), SIZE)], "guest")
    yield memory
    memory.close()


async def start(machine: DiskMachine, *arguments: str) -> None:
    """The disk's process alone."""
    machine.directory.mkdir()
    await machine.daemon.start()
    machine.bus = await Bus.connect(machine.daemon.address)
    words = ["--socket", str(machine.directory / "disk0"), *machine.options("virtio-blk"), *arguments]
    await machine.spawn("disk0", "devices.virtio_blk", *words)
    await machine.find_all()


def test_it_is_found_under_both_names_and_says_which_disks_it_has(machines):
    async def scenario(machine: DiskMachine) -> None:
        await start(machine)
        info = await machine.clients["disk0"].info()
        assert (info.type, info.state, info.streams, info.opaque) == ("virtio-blk", "RUNNING", False, False)
        assert info.tracker in ("scan", "log")
        assert info.disks == (Disk("image", 8 << 20, False),)
        assert await machine.bus.queued_owners("org.qemu.VMState1") == [info.unique_name]

    machines(scenario)


def test_a_vmm_sees_a_pci_function_and_drives_a_disk_through_it(machines, memory):
    async def scenario(machine: DiskMachine) -> None:
        await start(machine)
        driver = Driver(machine, memory)
        info = driver.client.info()
        assert info.flags == DeviceFlags.RESET | DeviceFlags.PCI
        assert [driver.client.region_info(index).size for index in range(info.regions)] == [
            0x8000,
            *[0] * 6,
            256,
            0,
        ]
        assert [driver.client.irq_info(index).count for index in range(info.irqs)] == [0, 0, 9, 0, 0]
        queue = driver.set_up()
        for sector in range(40):
            driver.ask(queue, OUT, sector=sector, data=bytes((sector,)) * 512)
        driver.ask(queue, FLUSH)
        for sector in range(40):
            assert driver.ask(queue, IN, sector=sector, length=512) == bytes((sector,)) * 512
        assert machine.image.read_bytes()[: 40 * 512] == b"".join(bytes((n,)) * 512 for n in range(40))
        driver.client.reset()
        assert driver.pci.common(0x14, 1) == 0
        driver.ask(driver.set_up(), IN, length=512)
        driver.close()

    machines(scenario)


def test_qemu_style_save_and_load_while_it_runs_leave_the_driver_undisturbed(machines, memory):
    async def scenario(machine: DiskMachine) -> None:
        await start(machine)
        driver = Driver(machine, memory)
        queue = driver.set_up()
        driver.ask(queue, OUT, data=b"1" * 512)
        blob = await machine.clients["disk0"].save()
        await machine.clients["disk0"].load(blob)
        assert driver.ask(queue, IN, length=512) == b"1" * 512
        driver.close()

    machines(scenario)


def test_where_it_stands_still_nothing_is_served_and_it_is_when_it_runs(machines, memory):
    async def scenario(machine: DiskMachine) -> None:
        await start(machine)
        disk = machine.clients["disk0"]
        driver = Driver(machine, memory)
        queue = driver.set_up()
        await disk.set_state("RUNNING_P2P")
        queue.ask(OUT, data=b"2" * 512)
        driver.pci.notify(0)
        await disk.set_state("STOP")
        with pytest.raises(RequestRefused, match="EBUSY"):
            driver.pci.notify(0)
        assert queue.answers() == []
        assert not any(machine.image.read_bytes())
        await disk.set_state("RUNNING")
        while not queue.answers():
            await asyncio.sleep(0.001)
        assert machine.image.read_bytes()[:512] == b"2" * 512
        driver.close()

    machines(scenario)


def test_the_image_is_locked_from_p2p_until_it_is_let_go_of_or_the_process_ends(machines):
    async def scenario(one: DiskMachine, other: DiskMachine) -> None:
        await start(one, "--paused")
        await start(other, "--paused")
        first, second = one.clients["disk0"], other.clients["disk0"]
        await first.set_state("RUNNING_P2P")
        with pytest.raises(DeviceRefused, match=r"disk0: the image .*disk\.img is locked by another process"):
            await second.set_state("RUNNING")
        assert (await second.info()).state == "STOP"
        with pytest.raises(DeviceRefused, match="not in RUNNING_P2P"):
            await first.release_locks()
        await first.set_state("STOP")
        with pytest.raises(DeviceRefused, match="is locked"):
            await second.set_state("RUNNING_P2P")
        await first.release_locks()
        await first.release_locks()
        await second.set_state("RUNNING")
        with pytest.raises(DeviceRefused, match="is locked"):
            await first.set_state("RUNNING")
        other.processes["disk0"].kill()
        await other.processes["disk0"].wait()
        await first.set_state("RUNNING")

    machines(scenario)


def test_a_vmm_that_goes_leaves_the_disk_to_the_next_one_and_no_descriptor(machines, memory):
    async def scenario(machine: DiskMachine) -> None:
        await start(machine)
        fds = f"/proc/{machine.processes['disk0'].pid}/fd"
        before = len(os.listdir(fds))
        for turn in range(4):
            driver = Driver(machine, memory)
            queue = driver.set_up()
            driver.ask(queue, OUT, sector=turn, data=b"3" * 512)
            queue.ask(IN, length=512)  # nobody will hear of this one
            driver.pci.notify(0)
            driver.close()
        while len(os.listdir(fds)) != before:  # else the test's own deadline ends it
            await asyncio.sleep(0.01)
        assert machine.image.read_bytes()[:2048] == b"3" * 2048

    machines(scenario)


def test_a_driver_goes_on_with_its_rings_when_its_vmm_was_exchanged_under_it(machines, memory):
    async def scenario(machine: DiskMachine) -> None:
        await start(machine)
        driver = Driver(machine, memory)
        queue = driver.set_up()
        driver.ask(queue, OUT, data=b"4" * 512)
        driver.close()
        queue.ask(IN, length=512)
        driver = Driver(
            machine, memory
        )  # what waits is served without a notification, when memory is there again
        assert driver.pci.common(0x14, 1) == 15
        while not (found := queue.answers()):
            assert select.select([driver.eventfd], [], [], 10)[0]
            os.eventfd_read(driver.eventfd)
        assert found[0].data == b"4" * 512
        assert driver.ask(queue, IN, length=512) == b"4" * 512
        driver.close()

    machines(scenario)


# -- before it begins -----------------------------------------------------------------------------------------------------------


def begin(*options: str) -> subprocess.CompletedProcess[str]:
    words = [word for option in options for word in ("--option", option)]
    return subprocess.run(
        [sys.executable, "-m", "devices.virtio_blk", "--id", "disk0", "--bus", "unix:path=/nowhere", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "needs an image"),
        (["image={}/nowhere.img"], "nowhere.img cannot be opened: No such file"),
        (["image={}"], "Is a directory"),
        (["image={}/odd.img"], "odd.img has 1000 bytes"),
        (["image=/dev/null"], "/dev/null is not a regular file"),
        (["image={}/good.img", "queues=9"], "queues=9 is not a number from 1 to 8"),
        (["image={}/good.img", "queues=0"], "queues=0"),
        (["image={}/good.img", "read_only=yes"], "read_only=yes is neither on nor off"),
        (["image={}/good.img", "serial=" + 21 * "x"], "at most 20 characters"),
        (["image={}/good.img", "colour=red"], "'colour' is unknown"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(tmp_path: Path, options: list[str], says: str) -> None:
    (tmp_path / "odd.img").write_bytes(bytes(1000))
    (tmp_path / "good.img").write_bytes(bytes(1024))
    ended = begin(*(option.format(tmp_path) for option in options))
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert says in ended.stderr
    assert "disk0" in ended.stderr
