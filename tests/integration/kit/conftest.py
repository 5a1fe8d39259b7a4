"""Device processes on real buses: a Machine is one private bus and the processes that were started on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.protocols.vfio_user.client import Client
from migrate.bus import Bus, DeviceClient, PrivateBus, discover
from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory, RegionSpec

HERE = Path(__file__).parent
MIB = 1 << 20


class Process:
    """A device process: its D-Bus client, and where its vfio-user socket is."""

    def __init__(self, process: asyncio.subprocess.Process, client: DeviceClient, socket: str) -> None:
        self.process = process
        self.bus = client
        self.socket = socket

    def vmm(self) -> Client:
        return Client.connect(self.socket, device=self.bus.id)

    async def log(self) -> str:
        """What it wrote, after its end."""
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


class Machine:
    here = HERE

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.daemon = PrivateBus(directory / "bus")
        self.processes: list[asyncio.subprocess.Process] = []
        self.memory: GuestMemory | None = None
        self.bus: Bus | None = None

    async def start(self) -> Machine:
        await self.daemon.start()
        self.bus = await Bus.connect(self.daemon.address)
        return self

    async def spawn(
        self, device: str, name: str, *arguments: str, **environment: str
    ) -> asyncio.subprocess.Process:
        """`device` is a file of this directory, or a module with its first arguments."""
        environment = {"FERRY_SCHEMAS": str(HERE), "DBUS_VMSTATE_ADDRESS": self.daemon.address} | environment
        what = [str(HERE / f"{device}.py")] if (HERE / f"{device}.py").exists() else ["-m", *device.split()]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *what, "--id", name, "--socket", f"{self.directory}/{name}", *arguments),
            env={**os.environ, **environment},
            cwd=HERE.parents[2],
            stderr=asyncio.subprocess.PIPE,
        )
        self.processes.append(process)
        return process

    async def device(self, device: str, name: str, *arguments: str) -> Process:
        """Start a device process and wait until it is on the bus."""
        process = await self.spawn(device, name, *arguments)
        client = await self.find(name, process)
        return Process(process, client, f"{self.directory}/{name}")

    async def find(self, name: str, process: asyncio.subprocess.Process | None = None) -> DeviceClient:
        assert self.bus is not None
        while True:
            found = await discover(self.bus)
            # Caught between its two names, a process can be taken for an opaque one.
            if name in found and not found[name].opaque:
                return found[name]
            if process is not None and process.returncode is not None:
                assert process.stderr is not None
                raise AssertionError((await process.stderr.read()).decode())
            await asyncio.sleep(0.01)

    async def attach(self, *clients: DeviceClient, sizes: tuple[int, ...] = (4 * MIB,)) -> GuestMemory:
        """Make guest memory (regions 16 MiB apart) and give it to participants."""
        if self.memory is None:
            specs = [RegionSpec(GuestAddress(16 * MIB * n), size) for n, size in enumerate(sizes)]
            self.memory = GuestMemory.create(specs, "test")
        for client in clients:
            for region in self.memory.regions:
                await client.attach_memory(region.gpa, region.size, region.fd, region.offset)
        return self.memory

    async def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            # communicate and not wait: a full pipe would never end.
            await process.communicate()
        if self.bus is not None:
            await self.bus.close()
        await self.daemon.stop()
        if self.memory is not None:
            self.memory.close()


Scenario = Callable[..., Awaitable[Any]]


@pytest.fixture
def machines() -> Iterator[Callable[[Scenario], None]]:
    """Run an async test with as many machines as it has parameters. None of their processes is left afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            count = scenario.__code__.co_argcount  # type: ignore[attr-defined]
            made = [Machine(directory / str(number)) for number in range(count)]
            try:
                async with asyncio.timeout(60):
                    await scenario(*[await machine.start() for machine in made])
            finally:
                for machine in made:
                    await machine.close()

        asyncio.run(main())

    yield run
    shutil.rmtree(directory)
