"""A whole machine of real processes on a private bus: uart, rtc, display and the vCPU with the built-in guest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from migrate.bus import Bus, DeviceClient, PrivateBus, discover
from migrate.memory.addresses import GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.memfd import read_sealed
from migrate.memory.region import GuestMemory, RegionSpec

ROOT = Path(__file__).parents[3]
SIZE = 32 << 20
DEVICES = {"uart0": "uart16550", "rtc0": "rtc", "display0": "display"}
#: In the order in which states are left and entered: the vCPU first to rest, last to run.
WRITERS = ("display0", "vcpu0")


class Machine:
    #: Each device's Id and type, in the order of their windows and interrupt lines.
    devices = DEVICES
    writers = WRITERS
    #: Interrupt lines of those that have more than one.
    vectors: Mapping[str, int] = {}

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemon = PrivateBus(directory / "bus")
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.clients: dict[str, DeviceClient] = {}
        self.output = directory.parent / "output"  # what a source and its destination have in common
        self.memory: GuestMemory | None = None
        self.bus: Bus | None = None

    # -- starting -------------------------------------------------------------------------------------------------------

    async def start(self, cmdline: str = "", *, incoming: bool = False, tracker: str = "log") -> None:
        """All processes on the bus, with memory, stopped or waiting for their states."""
        self.directory.mkdir()
        await self.daemon.start()
        self.bus = await Bus.connect(self.daemon.address)
        mode = "--incoming" if incoming else "--paused"
        entries: list[dict[str, Any]] = []
        line = 0
        for number, (name, kind) in enumerate(self.devices.items()):
            socket = str(self.directory / name)
            tracks = ["--tracker", tracker] if name in self.writers else []
            await self.spawn(
                name,
                f"devices.{kind.replace('-', '_')}",
                mode,
                "--socket",
                socket,
                *tracks,
                *self.options(kind),
            )
            gpa = 0xD000_0000 + number * 0x100_0000
            vectors = self.vectors.get(kind, 1)
            entries.append(
                {"id": name, "type": kind, "socket": socket, "gpa": gpa, "irq": line, "vectors": vectors}
            )
            line += vectors
        platform = self.directory / "platform.json"
        platform.write_text(json.dumps({"devices": entries, "cmdline": cmdline}))
        await self.spawn("vcpu0", "devices.vcpu", mode, "--platform", str(platform), "--tracker", tracker)
        await self.find_all()
        self.memory = GuestMemory.create([RegionSpec(GuestAddress(0), SIZE)], "machine")
        for name in self.writers:
            await self.clients[name].attach_memory(0, SIZE, self.memory.regions[0].fd, 0)

    def options(self, kind: str) -> list[str]:
        return ["--option", f"output={self.output}"] if kind == "uart16550" else []

    async def spawn(self, name: str, module: str, *arguments: str) -> asyncio.subprocess.Process:
        self.processes[name] = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, "--id", name, "--bus", self.daemon.address, *arguments),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        return self.processes[name]

    async def find_all(self) -> None:
        assert self.bus is not None
        while not self.processes.keys() <= (found := await discover(self.bus)).keys():
            for name, process in self.processes.items():
                if process.returncode is not None:
                    raise AssertionError(f"{name}: {await self.log(name)}")
            await asyncio.sleep(0.01)
        self.clients = found

    # -- states, in the machine's order -----------------------------------------------------------------------------------

    async def run(self, stopped_ns: int = 0) -> None:
        for state in ("RUNNING_P2P", "RUNNING"):
            for name in (*self.devices, "vcpu0"):
                await self.clients[name].set_state(state, stopped_ns=stopped_ns)

    async def rest(self, *, last: str = "STOP") -> None:
        p2p = "PRE_COPY_P2P" if last == "STOP_COPY" else "RUNNING_P2P"
        for state in (p2p, last):
            for name in ("vcpu0", *self.devices):
                await self.clients[name].set_state(state)

    async def save(self) -> dict[str, bytes]:
        infos = {name: await client.info() for name, client in self.clients.items()}
        return {name: await client.save_as(infos[name].version) for name, client in self.clients.items()}

    async def load(self, blobs: dict[str, bytes]) -> None:
        for name, blob in blobs.items():
            await self.clients[name].stage(blob)
        for name in blobs:
            await self.clients[name].apply()
        for name in blobs:
            await self.clients[name].set_state("STOP")

    async def collect(self) -> DirtyBitmap:
        assert self.memory is not None
        dirty = DirtyBitmap(self.memory.page_count)
        for name in self.writers:
            fd, _ = await self.clients[name].collect_dirty()
            dirty.or_bytes(read_sealed(fd, dirty.nbytes, limit=1 << 20))
            os.close(fd)
        return dirty

    # -- what the guest says ------------------------------------------------------------------------------------------------

    def said(self) -> list[str]:
        text = self.output.read_text() if self.output.exists() else ""
        return text.split("\n")[:-1]

    def ticks(self) -> list[int]:
        return [int(found[1]) for line in self.said() if (found := re.match(r"T (\d+) ", line))]

    def corrupt(self) -> list[str]:
        return [line for line in self.said() if line.startswith("CORRUPT")]

    async def until_ticks(self, more: int) -> None:
        wanted = len(self.ticks()) + more
        while len(self.ticks()) < wanted:
            await asyncio.sleep(0.01)

    # -- the end --------------------------------------------------------------------------------------------------------------

    async def log(self, name: str) -> str:
        """What a process wrote, after its end."""
        stderr = self.processes[name].stderr
        assert stderr is not None
        return (await stderr.read()).decode()

    async def close(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
        if self.bus is not None:
            await self.bus.close()
        await self.daemon.stop()
        if self.memory is not None:
            self.memory.close()
