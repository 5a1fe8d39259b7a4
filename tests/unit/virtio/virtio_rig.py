"""A disk for tests: its image, guest memory, and a driver's side of it; the device is called instead of spoken to."""

from __future__ import annotations

import os
import select
import threading
from pathlib import Path

from virtio_driver import EVENT_IDX, INDIRECT_DESC, VERSION_1, DiskQueue, Guest, Pci, Ring

from devices.kit.access import MemoryAccess
from devices.virtio.runner import QueueRunner
from devices.virtio_blk import VirtioBlk
from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory, RegionSpec
from migrate.state import catalog

MIB = 1 << 20
SIZE = 2 * MIB
SCHEMA = catalog.load("virtio-blk").at(1)
FLUSH, MQ, DISCARD, WRITE_ZEROES = 1 << 9, 1 << 12, 1 << 13, 1 << 14
#: What a driver of ours accepts unless a test says otherwise.
ACCEPTED = VERSION_1 | EVENT_IDX | INDIRECT_DESC | FLUSH | DISCARD | WRITE_ZEROES


def make_memory() -> GuestMemory:
    return GuestMemory.create([RegionSpec(GuestAddress(0), SIZE)], "guest")


def access(memory: GuestMemory) -> MemoryAccess:
    found = MemoryAccess(writes=True)
    for region in memory.regions:
        found.attach(region.gpa, region.size, region.fd, region.offset)
    return found


def make_image(directory: Path, sectors: int = 64, name: str = "disk.img") -> Path:
    path = directory / name
    path.write_bytes(bytes(512 * sectors))
    return path


class Disk:
    """A device on its image and on guest memory, stopped; with no threads, `step` does their work."""

    def __init__(self, image: Path, memory: GuestMemory, *, threads: bool = False, **options: str) -> None:
        self.device = VirtioBlk("disk0", {"image": str(image)} | options)
        for region in memory.regions:
            self.device.memory.attach(region.gpa, region.size, region.fd, region.offset)
        self.device._set_silent(True)
        if not threads:
            for runner in self.device.runners:
                runner._thread = threading.current_thread()
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in self.device.all_irqs]
        for irq, eventfd in zip(self.device.all_irqs, self.eventfds, strict=True):
            irq.connect(os.dup(eventfd))
        self.pci = Pci(self._read, self._write)

    def _read(self, region: int, offset: int, size: int) -> int:
        with self.device.lock:
            return self.device.read(region, offset, size)

    def _write(self, region: int, offset: int, size: int, value: int) -> None:
        with self.device.lock:
            self.device.write(region, offset, size, value)

    # -- states ---------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """STOP to RUNNING_P2P."""
        with self.device.lock:
            self.device.start(0)
            self.device._set_silent(False)

    def run(self) -> None:
        """RUNNING_P2P to RUNNING."""
        with self.device.lock:
            self.device.leave_p2p()

    def rest(self) -> None:
        """RUNNING to STOP."""
        with self.device.lock:
            self.device.enter_p2p()
            self.device.stop()
            self.device._set_silent(True)

    def save(self) -> bytes:
        with self.device.lock:
            return SCHEMA.encode(self.device.save())

    def load(self, state: bytes) -> None:
        values = SCHEMA.decode(state)
        with self.device.lock:
            self.device.check(values)
            self.device.load(values)

    # -- the driver -------------------------------------------------------------------------------------------------------------

    def set_up(
        self, guest: Guest, features: int = ACCEPTED, size: int = 8, start: int = 0
    ) -> list[DiskQueue]:
        """As a driver does: negotiate, set up every queue with a vector of its own, go."""
        assert self.pci.accept(features) & 8
        queues = []
        for number in range(self.pci.common(0x12, 2)):
            base = 0x10000 + 0x80000 * number
            ring = Ring(guest, base, size, event_idx=bool(features & EVENT_IDX), start=start)
            self.pci.use_vector(number + 1)
            self.pci.set_up_queue(number, ring, number + 1)
            queues.append(DiskQueue(ring, base + 0x10000))
            # A device begins with 0; one that has worked for long is as far as this.
            self.device.function.queues[number].taken = start
            self.device.function.queues[number].returned = start
        self.pci.status(4)
        return queues

    def step(self, number: int) -> bool:
        """All three steps of one request, without the queue's thread. False: there was none."""
        runner = self.device.runners[number]
        if take(runner) is None:
            return False
        runner.run()
        complete(runner)
        return True

    def edges(self, vector: int) -> int:
        try:
            return os.eventfd_read(self.eventfds[vector])
        except BlockingIOError:
            return 0

    def wait_for_edge(self, vector: int, seconds: float = 10) -> bool:
        return bool(select.select([self.eventfds[vector]], [], [], seconds)[0]) and bool(self.edges(vector))

    def close(self) -> None:
        for runner in self.device.runners:
            if runner._running is not None and runner._thread is threading.current_thread():
                runner.run()  # what a test has left half done
        with self.device.lock:
            self.device.close()
        self.lose()

    def lose(self) -> None:
        """As the end of its process: whatever it was doing is not done."""
        self.device.image.close()
        for irq in self.device.all_irqs:
            irq.connect(None)
        for eventfd in self.eventfds:
            os.close(eventfd)
        if self.device.memory.tracker is not None:
            self.device.memory.tracker.close()
        self.device.memory.attached.close()


class Rig:
    """Guest memory and an image, and as many devices on them as a test makes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.memory = make_memory()
        self.guest = Guest(self.memory)
        self.image = make_image(directory)
        self.disks: list[Disk] = []

    def disk(self, **options: object) -> Disk:
        """Stopped, in the state after power-on."""
        self.disks.append(Disk(self.image, self.memory, **options))  # type: ignore[arg-type]
        return self.disks[-1]

    def running(self, **options: object) -> Disk:
        disk = self.disk(**options)
        disk.start()
        disk.run()
        return disk

    def close(self) -> None:
        for disk in self.disks:
            disk.close()
        self.memory.close()


def take(runner: QueueRunner) -> object:
    with runner._lock:
        return runner.take()


def complete(runner: QueueRunner) -> None:
    with runner._lock:
        runner.complete()
