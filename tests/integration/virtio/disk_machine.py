"""A machine of real processes with a disk: uart, rtc, virtio-blk and the vCPU with the built-in guest."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
for neighbour in (HERE.parents[0] / "vcpu", HERE.parents[1] / "unit" / "vcpu"):
    sys.path.insert(0, str(neighbour))

import vcpu_processes  # noqa: E402
from disk_journal import durable, lines, missing  # noqa: E402

__all__ = ["DiskMachine", "durable", "lines", "missing"]


class DiskMachine(vcpu_processes.Machine):
    devices = {"uart0": "uart16550", "rtc0": "rtc", "disk0": "virtio-blk"}  # noqa: RUF012
    writers = ("disk0", "vcpu0")
    vectors = {"virtio-blk": 3}  # noqa: RUF012

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.image = directory.parent / "disk.img"  # shared storage, of a source and its destination
        if not self.image.exists():
            with self.image.open("wb") as file:
                file.truncate(8 << 20)

    def options(self, kind: str) -> list[str]:
        if kind == "virtio-blk":
            return ["--option", f"image={self.image}"]
        return super().options(kind)

    async def until_lasting(self, more: int) -> None:
        """Until so many operations more were said to last."""
        wanted = durable(self.said())[0] + more
        while durable(self.said())[0] < wanted:
            await self.until_ticks(1)

    async def flow(self, other: DiskMachine, tracker: str) -> None:
        """Move to a machine that waits, by what is tracked; this one is then stopped and has let go of the image."""
        for name in self.writers:
            await self.clients[name].start_tracking()
        dirty = await self.collect()
        dirty.set_runs(self.memory.data_extents())
        for _ in range(2):
            self.copy(other, dirty)
            await self.until_ticks(2)
            dirty = await self.collect()
        for name in self.clients:
            await self.clients[name].set_state("PRE_COPY")
        await self.rest(last="STOP_COPY")
        dirty |= await self.collect()
        self.copy(other, dirty)
        for name in self.writers:
            await self.clients[name].stop_tracking()
        await other.load(await self.save())
        await self.clients["disk0"].release_locks()

    def copy(self, other: DiskMachine, dirty: object) -> None:
        pages = dirty.pages_array()  # type: ignore[attr-defined]
        other.memory.regions[0].pages[pages] = self.memory.regions[0].pages[pages]
