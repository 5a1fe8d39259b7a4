"""Sectors a second of the disk: its own process behind vfio-user, a driver in Python, 4 KiB reads; beside it `preadv` of the same.

The driver shares the two cores with the device, and is most of the cost at depth 1: what a guest gets is not less.
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from devices.protocols.vfio_user.client import Client
from migrate.bus import Bus, PrivateBus, discover
from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory, RegionSpec
from tests.bench.figures import MIB, Figure, Scale

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "virtio"))
from virtio_driver import EVENT_IDX, IN, INDIRECT_DESC, OK, VERSION_1, DiskQueue, Guest, Pci, Ring  # noqa: E402

IMAGE_BYTES = 16 * MIB
BLOCK = 4096
SECTORS = BLOCK // 512
REQUESTS = 4096
RUNS = 5


class Driver:
    """On the first queue of a disk."""

    def __init__(self, socket: Path, memory: GuestMemory) -> None:
        self._client = Client.connect(str(socket), device="disk0")
        for region in memory.regions:
            self._client.dma_map(region.gpa, region.size, region.fd)
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self._client.set_irq_eventfd(2, self._eventfd, 1)
        self._pci = Pci(self._client.region_read, self._client.region_write)
        assert self._pci.accept(VERSION_1 | EVENT_IDX | INDIRECT_DESC) & 8
        ring = Ring(Guest(memory), 0x10000, 128, event_idx=True)
        self._pci.use_vector(1)
        self._pci.set_up_queue(0, ring, 1)
        self._pci.status(4)
        self._queue = DiskQueue(ring, 0x20000)

    def read(self, requests: int, depth: int) -> float:
        """Blocks one after the other, so many under way at once; sectors/s."""
        asked = answered = 0
        began = time.perf_counter()
        while answered < requests:
            notify = False
            while asked < requests and asked - answered < depth:
                notify |= self._queue.ask(IN, sector=asked * SECTORS % (IMAGE_BYTES // 512), length=BLOCK)[1]
                asked += 1
            if notify:
                self._pci.notify(0)
            while not (found := self._queue.answers()):
                if not select.select([self._eventfd], [], [], 10)[0]:
                    raise RuntimeError("the disk did not answer for 10 s")
                os.eventfd_read(self._eventfd)
            if any(answer.status != OK for answer in found):
                raise RuntimeError("the disk refused a read")
            answered += len(found)
        return requests * SECTORS / (time.perf_counter() - began)

    def close(self) -> None:
        self._client.close()
        os.close(self._eventfd)


def run(scale: Scale) -> Iterator[Figure]:
    requests = 64 if scale.quick else REQUESTS
    depths = (1, 16)
    found: dict[int, list[float]] = {depth: [] for depth in depths}
    raw: dict[int, list[float]] = {depth: [] for depth in depths}

    async def measure() -> None:
        async with _disk() as (driver, image):
            for _ in range(scale.runs(RUNS)):
                for depth in depths:
                    raw[depth].append(_raw(image, requests))
                    found[depth].append(await asyncio.to_thread(driver.read, requests, depth))

    asyncio.run(measure())
    for depth in depths:
        yield Figure(
            "disk", f"4 KiB reads, depth {depth}", "sectors/s", found[depth], raw[depth], "raw: preadv"
        )


def _raw(image: Path, requests: int) -> float:
    block = bytearray(BLOCK)
    fd = os.open(image, os.O_RDONLY)
    began = time.perf_counter()
    for number in range(requests):
        os.preadv(fd, [block], number * BLOCK % IMAGE_BYTES)
    took = time.perf_counter() - began
    os.close(fd)
    return requests * SECTORS / took


@asynccontextmanager
async def _disk() -> AsyncIterator[tuple[Driver, Path]]:
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    image = directory / "disk0.img"
    image.write_bytes(os.urandom(IMAGE_BYTES))
    private = PrivateBus(directory / "bus")
    await private.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "devices.virtio_blk", "--id", "disk0", "--bus", private.address,
        "--socket", str(directory / "disk0"), "--option", f"image={image}",
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    bus = await Bus.connect(private.address)
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), 4 * MIB)], "bench")
    try:
        while "disk0" not in await discover(bus):
            await asyncio.sleep(0.02)
        driver = await asyncio.to_thread(Driver, directory / "disk0", memory)
        try:
            yield driver, image
        finally:
            driver.close()
    finally:
        memory.close()
        await bus.close()
        process.kill()
        await process.wait()
        await private.stop()
        shutil.rmtree(directory)
