"""The world of a history: two hosts, a link that can be cut, one machine that moves, and what must hold after every step.

Nothing is faked: real daemons, supervisors, devices and coordinators; faults are signals and a link that is cut. What is
checked comes from outside vmferry: the guest's own words on both UARTs, the image of its disk, and the CPU time of vCPU processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from migrate.bus.host import HostClient, Limits, MigrateOptions
from migrate.cli.demo import console
from migrate.cli.demo.hosts import DemoHost, cpu_ticks, processes_of
from migrate.cli.demo.relay import Relay
from migrate.cli.demo.stage import vcpus
from migrate.errors import FerryError
from migrate.transport import pki

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "vcpu"))
from disk_journal import durable, missing

NAME = "m"
FLUSH = 16
MACHINE = f"""
[machine]
name = "m"
memory = "32M"
[vcpu]
cmdline = "dirty=32 span=8 disk=8 disk_kb=512 flush={FLUSH}"
[[device]]
id = "uart0"
type = "uart16550"
[[device]]
id = "rtc0"
type = "rtc"
[[device]]
id = "disk0"
type = "virtio-blk"
vectors = 3
image = "storage/disk0.img"
"""
DISK_BYTES = 8 << 20
_FLOCK = struct.Struct("hhqqi4x")  # struct flock
#: How long the world may take to come to rest after a fault, s.
SETTLE_SECONDS = 60.0
#: States in which a host says that the guest executes there.
EXECUTES = ("running", "outgoing")

Event = dict[str, Any]


class World:
    """:ivar runs_on: which host runs the machine, by what its own last word was; None while that is in doubt."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vf-hist-", dir="/tmp"))
        keys = self.directory / "pki"
        pki.init(keys, "histories")
        names = ("hosta", "hostb")
        for name in names:
            pki.issue(keys, name, ["127.0.0.1"], 2)
        self.hosts = {
            name: DemoHost(name, self.directory / name, keys / name, other)
            for name, other in zip(names, reversed(names), strict=True)
        }
        #: Each leads to the host of that name.
        self.links = {name: Relay(host.port) for name, host in self.hosts.items()}
        self.log: list[str] = []
        self.image = self.directory / "storage" / "disk0.img"
        self._said = b""  #: all that the guest has said, wherever it was, in its own order
        self._read = dict.fromkeys(names, 0)  #: how much of each host's output that has
        self._ran_on = "hosta"  #: at the last look

    def note(self, text: str) -> None:
        self.log.append(text)
        print(f"  {text}", flush=True)

    # -- making and ending ---------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        self.image.parent.mkdir()
        with self.image.open("wb") as image:
            image.truncate(DISK_BYTES)
        for host in self.hosts.values():
            host.directory.mkdir()
            (host.directory / "host.toml").write_text(f'images = ["{self.image.parent}"]\n')
        for link in self.links.values():
            await link.start()
        await asyncio.gather(*(host.start() for host in self.hosts.values()))
        path = self.directory / "machine.toml"
        path.write_text(MACHINE)
        await self.hosts["hosta"].client.run_machine(str(path))

    async def end(self) -> None:
        """Take all down, and see that nothing is left."""
        for link in self.links.values():
            await link.cut()
        await asyncio.gather(*(host.stop() for host in self.hosts.values()))
        left = processes_of(str(self.directory))
        # A supervisor that was killed leaves the names of its sockets; what counts is that nobody answers there.
        sockets = [path for path in self.directory.rglob("*") if path.is_socket() and answers(path)]
        with self.image.open("rb") as image:
            asked = fcntl.fcntl(image, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        lock = _FLOCK.unpack(asked)[0]
        shutil.rmtree(self.directory, ignore_errors=True)
        assert not left, f"processes were left behind: {left}"
        assert not sockets, f"sockets were left behind: {sockets}"
        assert lock == fcntl.F_UNLCK, "a lock on the image was left behind"

    # -- what is asked of it -------------------------------------------------------------------------------------------------

    async def where(self) -> str | None:
        """The host that says it runs the machine. Two would be the end of the project."""
        found = []
        for name, host in self.hosts.items():
            machine = await host.machine(NAME)
            if machine is not None and machine["state"] in EXECUTES:
                found.append(name)
        assert len(found) <= 1, f"two hosts run it: {found}\n" + "\n".join(self.log)
        return found[0] if found else None

    def other(self, name: str) -> str:
        return next(other for other in self.hosts if other != name)

    async def migrate(
        self,
        source: str,
        *,
        hold: str = "",
        strike: Callable[[], Awaitable[None]] | None = None,
        connections: int = 1,
        follow: bool = True,
    ) -> Event:
        """Ask for a migration from where it runs to the other host; `strike` is done when the job waits at `hold`.

        :param follow: hear every event as it comes; else nobody listens, and its outcome is asked for from time to time.
        """
        target = self.other(source)
        uri = f"tls://127.0.0.1:{self.links[target].port}?name={target}"
        client = self.hosts[source].client
        options = MigrateOptions(verify=True, hold=hold, doubt_seconds=1, connections=connections)
        job = await client.migrate(NAME, uri, options)
        while not follow:
            await asyncio.sleep(0.5)
            if (last := (await client.job_events(job))[-1]).get("event") == "outcome":
                return last
        async with contextlib.aclosing(client.follow(job)) as events:
            async for event in events:
                if event.get("event") == "held" and strike is not None:
                    await strike()
                if event.get("event") == "outcome":
                    return event
        raise AssertionError("a job ended without an outcome")

    async def cut(self, host: str) -> None:
        await self.links[host].cut()

    async def heal(self) -> None:
        for link in self.links.values():
            if link.is_cut:
                await link.start()

    def kill(self, host: str, what: bytes) -> int:
        """SIGKILL to the processes of a host whose command line has these words; how many there were."""
        pids = self._find(host, what)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)

    async def freeze(self, host: str, what: bytes, seconds: float) -> None:
        """SIGSTOP for a while: a process that hangs and comes back."""
        pids = self._find(host, what)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _find(self, host: str, what: bytes) -> list[int]:
        found = []
        for pid in processes_of(str(self.hosts[host].directory)):
            with contextlib.suppress(OSError):
                if what in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "):
                    found.append(pid)
        return found

    def daemon(self, host: str) -> int:
        """The pid of a host's daemon."""
        [pid] = self._find(host, b"migrate.cli host")
        return pid

    async def restart_daemon(self, host: str) -> None:
        """kill -9 of a daemon; its machines go on, and it finds them again."""
        self.kill(host, b"migrate.cli host")
        client = self.hosts[host].client
        await client.close()
        await self.hosts[host].start()

    async def change_limits(self, host: str, downtime_ms: int, bandwidth: int) -> None:
        await self.hosts[host].client.set_limits(NAME, Limits(downtime_ms=downtime_ms, bandwidth=bandwidth))

    # -- what must hold -------------------------------------------------------------------------------------------------------

    async def settle(self) -> str:
        """Links heal, doubts end: exactly one host runs the machine, and the guest goes on there and nowhere else."""
        await self.heal()
        deadline = time.monotonic() + SETTLE_SECONDS
        # A migration may go on still, when its follower lost its daemon: then it runs, and will run elsewhere.
        while (runs := await self.where()) is None or await self._state(runs) != "running":
            assert time.monotonic() < deadline, "it does not come to rest:\n" + "\n".join(
                [*self.log, *(await self._states())]
            )
            await asyncio.sleep(0.1)
        output = self.hosts[runs].output(NAME)
        before = console.last_tick(output)
        while console.last_tick(output) < before + 5:
            assert time.monotonic() < deadline, f"the guest stands still on {runs}:\n" + "\n".join(self.log)
            await asyncio.sleep(0.02)
        await self._silent(self.other(runs))
        await self._guest_is_whole(runs)
        return runs

    async def _state(self, host: str) -> str:
        machine = await self.hosts[host].machine(NAME)
        return machine["state"] if machine is not None else ""

    async def _states(self) -> list[str]:
        return [f"{name}: {await host.machine(NAME)}" for name, host in self.hosts.items()]

    async def _silent(self, host: str) -> None:
        """No vCPU executes on that host."""
        used = {pid: cpu_ticks(pid) for pid in vcpus(self.hosts[host])}
        size = self._size(host)
        await asyncio.sleep(0.3)
        for pid, then in used.items():
            now = cpu_ticks(pid)
            assert now is None or then is None or now - then <= 2, f"a vCPU executes on {host} as well"
        assert self._size(host) == size, f"the guest speaks on {host} as well"

    def _size(self, host: str) -> int:
        try:
            return self.hosts[host].output(NAME).stat().st_size
        except FileNotFoundError:
            return 0

    async def _guest_is_whole(self, runs: str) -> None:
        """Every line and every tick, nothing corrupt, and every sector that it was told lasts is in the image."""
        client = self.hosts[runs].client
        await client.pause_machine(NAME)
        try:
            self._take(runs)
            image_wrong = missing(self.image, self._lines(), beyond=2 * FLUSH)
        finally:
            await client.resume_machine(NAME)
        lines = self._lines()
        strange = [line for line in lines if not console.LINE.fullmatch(line.encode())]
        assert not strange, f"{strange[:5]}\n" + "\n".join(self.log)
        numbers = [int(line.split()[1]) for line in lines if line.startswith("T ")]
        assert numbers[0] == 1
        assert [pair for pair in pairwise(numbers) if pair[1] != pair[0] + 1] == [], "\n".join(self.log)
        assert not image_wrong, f"{image_wrong[:5]}\n" + "\n".join(self.log)

    def _take(self, runs: str) -> None:
        """The guest moved once at most since the last look: its words are those of where it was, then of where it is."""
        for name in dict.fromkeys((self._ran_on, runs)):
            data = self.hosts[name].output(NAME).read_bytes()
            self._said += data[self._read[name] :]
            self._read[name] = len(data)
        assert self._size(self.other(runs)) == self._read[self.other(runs)], "both sides have spoken"
        self._ran_on = runs

    def _lines(self) -> list[str]:
        return self._said[: self._said.rfind(b"\n") + 1].decode(errors="replace").splitlines()

    @property
    def lasting(self) -> int:
        """Operations on the disk that the guest was told last, at the last look."""
        return durable(self._lines())[0]


def answers(path: Path) -> bool:
    """Does somebody listen there?"""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def unless_refused(work: Awaitable[Event]) -> Event | None:
    """A migration that cannot be asked for now (the machine is busy with the end of another) is no fault."""
    try:
        return await work
    except FerryError:
        return None


__all__ = ["NAME", "HostClient", "World", "unless_refused"]
