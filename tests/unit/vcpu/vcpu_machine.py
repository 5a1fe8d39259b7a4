"""The built-in guest on a processor with real devices, all in one process: the devices are called instead of spoken to.

Without Unicorn, whoever imports this is skipped.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from collections.abc import Callable
from pathlib import Path

from vcpu_box import ENTRY, MIB

from devices.display import Display
from devices.kit import Device
from devices.rtc import Rtc
from devices.uart16550 import Uart16550
from devices.vcpu import boot, platform_page
from devices.vcpu.engine import Engine
from devices.vcpu.platform_file import CONFIG_OFFSET, DeviceEntry, PlatformFile
from devices.vcpu.platform_page import PlatformPage
from devices.vcpu.runner import Runner
from devices.virtio_blk import VirtioBlk
from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory, RegionSpec

TYPES: dict[str, type[Device]] = {
    "uart16550": Uart16550,
    "rtc": Rtc,
    "display": Display,
    "virtio-blk": VirtioBlk,
}
#: Interrupt lines of those that have more than one.
VECTORS = {"virtio-blk": 3}
#: Where the guest keeps things: devices/vcpu/guest/guest.h.
GENERATIONS, WORKING_SET = 0x40_0000, 0x80_0000
SIZE = 32 * MIB
PATIENCE = 20  # seconds for the guest to say something


class Machine:
    def __init__(
        self,
        directory: Path,
        cmdline: str = "",
        types: tuple[str, ...] = ("uart16550", "rtc", "display"),
        memory: GuestMemory | None = None,
    ) -> None:
        """Cold; or, with memory, waiting for `load`."""
        cold = memory is None
        self.memory = memory or GuestMemory.create([RegionSpec(GuestAddress(0), SIZE)], "machine")
        self.region = self.memory.regions[0]
        self.page = PlatformPage()
        self.engine = Engine()
        self.engine.map_window(platform_page.GPA, platform_page.SIZE, self.page.read, self.page.write)
        self.engine.map_ram(0, SIZE, self.region.address)
        self.failures: list[Exception] = []
        self.runner = Runner(self.engine, self.page.wake, self.failures.append)
        self.engine.reset(ENTRY)
        self.devices: dict[str, Device] = {}
        self.said: list[str] = []
        self._partial = ""
        fifo = directory / "uart"
        if not fifo.exists():
            os.mkfifo(fifo)
        self._output = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self.image = directory / "disk.img"
        if not self.image.exists():
            self.image.touch()
            os.truncate(self.image, 8 * MIB)
        options = {"uart16550": {"output": str(fifo)}, "virtio-blk": {"image": str(self.image)}}
        entries: list[DeviceEntry] = []
        for number, name in enumerate(types):
            device = TYPES[name](name, options.get(name, {}))
            device.memory.attach(0, SIZE, self.region.fd, 0)
            gpa = 0xD000_0000 + number * 0x100_0000
            line = entries[-1].lines.stop if entries else 0
            entry = DeviceEntry(name, name, "/nowhere", gpa, line, VECTORS.get(name, 1))
            for irq, line in zip(device.all_irqs, entry.lines, strict=False):
                irq.connect(os.dup(self.page.line(line)))
            self.engine.map_window(gpa, -(-device.regions[0].size // 0x1000) * 0x1000, *_locked(device, 0))
            if device.pci:
                self.engine.map_window(gpa + CONFIG_OFFSET, 0x1000, *_locked(device, 7))
            entries.append(entry)
            self.devices[name] = device
        if cold:
            boot.write(self.region.view, PlatformFile(tuple(entries), cmdline=cmdline))

    def run(self, stopped_ns: int = 0) -> None:
        for device in self.devices.values():
            with device.lock:
                device.start(stopped_ns)
                device.leave_p2p()
                device._set_active(True)
        self.runner.run()

    def rest(self) -> None:
        self.runner.rest()
        for device in self.devices.values():
            with device.lock:
                device._set_active(False)
                device.enter_p2p()
                device.stop()
        self.page.latch()

    def save(self) -> dict[str, object]:
        state: dict[str, object] = {name: device.save() for name, device in self.devices.items()}
        return state | {"cpu": self.engine.registers(), "page": (self.page.pending, self.page.mask)}

    def load(self, state: dict[str, object]) -> None:
        for name, device in self.devices.items():
            device.load(state[name])  # type: ignore[arg-type]
        self.engine.set_registers(state["cpu"])  # type: ignore[arg-type]
        self.page.pending, mask = state["page"]  # type: ignore[misc]
        self.page.set_mask(mask)

    def listen(self, until: Callable[[list[str]], bool]) -> list[str]:
        """Wait until the guest has said enough; all it said since the machine was made."""
        while not until(self.said):
            if self.failures:
                raise self.failures[0]
            assert select.select([self._output], [], [], PATIENCE)[0], (
                f"the guest is silent after {self.said[-3:]}"
            )
            self._read()
        return self.said

    def _read(self) -> None:
        *lines, self._partial = (self._partial + os.read(self._output, 65536).decode("ascii")).split("\n")
        self.said += lines

    def drain(self) -> None:
        """Take what the guest said before it was stopped."""
        with contextlib.suppress(BlockingIOError):
            self._read()

    def run_ticks(self, count: int) -> list[str]:
        """Run for that many ticks, and stop."""
        wanted = len(ticks(self.said)) + count
        self.run()
        self.listen(lambda said: len(ticks(said)) >= wanted)
        self.rest()
        self.drain()
        return self.said

    def close(self) -> None:
        self.runner.close()
        for device in self.devices.values():
            for irq in device.all_irqs:
                irq.connect(None)
            device.close()
        self.page.close()
        os.close(self._output)


def _locked(device: Device, region: int) -> tuple[Callable[[int, int], int], Callable[[int, int, int], None]]:
    def read(offset: int, size: int) -> int:
        with device.lock:
            return device.read(region, offset, size)

    def write(offset: int, size: int, value: int) -> None:
        with device.lock:
            device.write(region, offset, size, value)

    return read, write


def ticks(said: list[str]) -> list[int]:
    return [int(found[1]) for line in said if (found := re.match(r"T (\d+) (\d+) (\d+) (\d+) (\d+)$", line))]


def corrupt(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("CORRUPT")]
