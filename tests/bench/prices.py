"""What the steps of a switchover cost here, one at a time: calls on a private bus, a sync of a ledger, a crossing of loopback."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from migrate.bus import Bus, DeviceClient, PrivateBus, discover
from migrate.machine.ledger import Ledger
from migrate.state import DeviceState

ROOT = Path(__file__).resolve().parents[2]
#: As many as the demo's machine has: four devices and the vCPU.
PARTICIPANTS = 5

#: What follows one another between the first participant's stop and RUNNING, by DESIGN 2.3 and 2.6, and how often:
STEPS = {
    # quiesce of the supervisor, the vCPU into P2P; ready; commit and, in it, the disk's locks; commit_incoming, the vCPU to RUNNING
    "one call": 7,
    # devices into P2P, all stopped; saved; applied at the destination; into RUNNING_P2P; devices to RUNNING
    "a call to all": 6,
    "sync": 2,  # COMMIT and COMMITTED
    "loopback": 2,  # STOPPED and READY, COMMIT and RUNNING: there and back
}


class Prices:
    """:meth:`sample` measures each once, s."""

    def __init__(self, clients: list[DeviceClient], ledger: Ledger, crossing: socket.socket) -> None:
        self._clients = clients
        self._ledger = ledger
        self._crossing = crossing

    async def sample(self) -> dict[str, float]:
        return {
            "one call": await _timed(self._one_call),
            "a call to all": await _timed(self._a_call_to_all),
            "sync": await _timed(self._sync),
            "loopback": await _timed(self._cross),
        }

    async def floor(self) -> float:
        """A downtime of nothing but STEPS, s: the least of some samples of each."""
        samples = [await self.sample() for _ in range(20)]
        return sum(count * min(each[name] for each in samples) for name, count in STEPS.items())

    async def _one_call(self) -> None:
        await self._clients[0].set_state(DeviceState.STOP)  # where it is: the call alone

    async def _a_call_to_all(self) -> None:
        await asyncio.gather(*(client.set_state(DeviceState.STOP) for client in self._clients))

    async def _sync(self) -> None:
        os.write(self._ledger._fd, b"\n")
        os.fdatasync(self._ledger._fd)

    async def _cross(self) -> None:
        self._crossing.send(b"x")
        self._crossing.recv(1)


async def _timed(work: Callable[[], Awaitable[None]]) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


@asynccontextmanager
async def prices() -> AsyncIterator[Prices]:
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))  # where the demo's ledgers are, too
    private = PrivateBus(directory / "bus")
    await private.start()
    processes = [await _participant(f"rtc{number}", private.address) for number in range(PARTICIPANTS)]
    bus = await Bus.connect(private.address)
    ledger = Ledger(directory, "bench")
    crossing = _echoed()
    try:
        while len(found := await discover(bus)) < PARTICIPANTS:
            await asyncio.sleep(0.02)
        yield Prices(list(found.values()), ledger, crossing)
    finally:
        crossing.close()
        ledger.close()
        await bus.close()
        for process in processes:
            process.kill()
            await process.wait()
        await private.stop()
        shutil.rmtree(directory)


async def _participant(name: str, address: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "devices.rtc", "--id", name, "--bus", address, "--paused",
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _echoed() -> socket.socket:
    """One end of a TCP connection over loopback whose other end answers every byte."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    for sock in (mine, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def echo() -> None:
        while data := theirs.recv(64):
            theirs.send(data)
        theirs.close()

    threading.Thread(target=echo, daemon=True).start()
    return mine
