"""A device process, and a fresh one beside it that waits for its state: each on a bus and with guest memory of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from migrate.bus import Bus, DeviceClient, PrivateBus, discover
from migrate.errors import DeviceGone, FerryError, Phase
from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory, RegionSpec

T = TypeVar("T")
#: How long a process may take to be on its bus, s.
PATIENCE: Final = 20.0
DEVICE: Final = "dev0"


class Side:
    """One process. :ivar client: its D-Bus side. :ivar memory: the guest memory that it was given."""

    def __init__(self, directory: Path, memory: int) -> None:
        directory.mkdir()
        self.directory = directory
        self.socket = str(directory / "socket")
        self.memory = GuestMemory.create([RegionSpec(GuestAddress(0), memory)], "guest")
        self._private = PrivateBus(directory / "bus")
        self._bus: Bus | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._client: DeviceClient | None = None

    @property
    def client(self) -> DeviceClient:
        assert self._client is not None
        return self._client

    @property
    def regions(self) -> list[tuple[int, int, int]]:
        return [(region.gpa, region.size, region.fd) for region in self.memory.regions]

    def output(self) -> bytes:
        """What it wrote to files in its directory, `{directory}` in its command."""
        made = sorted(path for path in self.directory.glob("*.out") if path.is_file())
        return b"".join(path.read_bytes() for path in made)

    async def start(self, command: Sequence[str], *words: str, environment: Mapping[str, str]) -> None:
        """:raise DeviceGone: it does not come up; with its last words."""
        await self._private.start()
        self._bus = await Bus.connect(self._private.address)
        log = (self.directory / "log").open("wb")
        with log:
            self._process = await asyncio.create_subprocess_exec(
                *(word.replace("{directory}", str(self.directory)) for word in command),
                *("--id", DEVICE, "--bus", self._private.address, "--socket", self.socket, *words),
                env={**os.environ, **environment}, stdin=asyncio.subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(FerryError):
                found = (await discover(self._bus)).get(DEVICE)
                if found is not None and not found.opaque:
                    self._client = found
                    break
            if self._process.returncode is not None or time.monotonic() > deadline:
                last = (self.directory / "log").read_text(errors="replace").strip().splitlines()[-1:]
                raise DeviceGone(
                    f"its process does not come up: {last[0] if last else 'it says nothing'}",
                    phase=Phase.SETUP,
                    device=DEVICE,
                    remedy="start the command by hand",
                )
            await asyncio.sleep(0.02)
        for gpa, size, fd in self.regions:
            await self._client.attach_memory(gpa, size, fd)

    async def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._bus is not None:
            await self._bus.close()
        await self._private.stop()
        self.memory.close()


class Pair:
    """A device's process that runs (`source`) and a fresh one that waits (`target`), for tests that are no coroutines."""

    def __init__(self, command: Sequence[str], memory: int = 4 << 20) -> None:
        self._loop = asyncio.new_event_loop()
        self._stack = contextlib.AsyncExitStack()
        try:
            self.source, self.target = self.run(self._start(command, memory))
        except BaseException:
            self.close()
            raise

    async def _start(self, command: Sequence[str], memory: int) -> tuple[Side, Side]:
        source, target = await self._stack.enter_async_context(sides(2, memory))
        await source.start(command, environment={})
        await target.start(command, "--incoming", environment={})
        return source, target

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for one of a side's calls: `pair.run(pair.source.client.save_as(1))`."""
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self._stack.aclose())
        self._loop.close()


@contextlib.asynccontextmanager
async def sides(count: int, memory: int) -> AsyncIterator[list[Side]]:
    """So many, not started; nothing is left of them afterwards."""
    base = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))  # a short path: sockets lie in it
    made = [Side(base / str(number), memory) for number in range(count)]
    try:
        yield made
    finally:
        for side in made:
            await side.close()
        shutil.rmtree(base, ignore_errors=True)
