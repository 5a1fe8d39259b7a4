"""The world of a history: two hosts, a link that can be cut, one machine that moves, and what must hold after every step.

Nothing is faked: real daemons, supervisors, devices and coordinators; faults are signals and a link that is cut. What is
checked comes from outside vmferry: the guest's own words on both UARTs, and the CPU time of vCPU processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from migrate.bus.host import HostClient, MigrateOptions
from migrate.cli.demo import console
from migrate.cli.demo.hosts import DemoHost, cpu_ticks, processes_of
from migrate.cli.demo.relay import Relay
from migrate.cli.demo.stage import vcpus
from migrate.errors import FerryError
from migrate.transport import pki

NAME = "m"
MACHINE = """
[machine]
name = "m"
memory = "32M"
[vcpu]
cmdline = "dirty=32 span=8"
[[device]]
id = "uart0"
type = "uart16550"
[[device]]
id = "rtc0"
type = "rtc"
"""
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

    def note(self, text: str) -> None:
        self.log.append(text)
        print(f"  {text}", flush=True)

    # -- making and ending ---------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
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
        shutil.rmtree(self.directory, ignore_errors=True)
        assert not left, f"processes were left behind: {left}"
        assert not sockets, f"sockets were left behind: {sockets}"

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
    ) -> Event:
        """Ask for a migration from where it runs to the other host; `strike` is done when the job waits at `hold`."""
        target = self.other(source)
        uri = f"tls://127.0.0.1:{self.links[target].port}?name={target}"
        client = self.hosts[source].client
        options = MigrateOptions(verify=True, hold=hold, doubt_seconds=1, connections=connections)
        job = await client.migrate(NAME, uri, options)
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

    async def restart_daemon(self, host: str) -> None:
        """kill -9 of a daemon; its machines go on, and it finds them again."""
        self.kill(host, b"migrate.cli host")
        client = self.hosts[host].client
        await client.close()
        await self.hosts[host].start()

    # -- what must hold -------------------------------------------------------------------------------------------------------

    async def settle(self) -> str:
        """Links heal, doubts end: exactly one host runs the machine, and the guest goes on there and nowhere else."""
        await self.heal()
        deadline = time.monotonic() + SETTLE_SECONDS
        while (runs := await self.where()) is None:
            assert time.monotonic() < deadline, "it runs nowhere:\n" + "\n".join(
                [*self.log, *(await self._states())]
            )
            await asyncio.sleep(0.1)
        output = self.hosts[runs].output(NAME)
        before = console.last_tick(output)
        while console.last_tick(output) < before + 5:
            assert time.monotonic() < deadline, f"the guest stands still on {runs}:\n" + "\n".join(self.log)
            await asyncio.sleep(0.02)
        await self._silent(self.other(runs))
        self._guest_is_whole()
        return runs

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

    def _guest_is_whole(self) -> None:
        """Every tick exactly once, over both hosts' output, and nothing corrupt."""
        numbers: list[int] = []
        for host in self.hosts.values():
            path = host.output(NAME)
            data = path.read_bytes() if path.exists() else b""
            assert b"CORRUPT" not in data, re.findall(rb"CORRUPT.*", data)[:5]
            numbers += [int(match[0]) for match in console.TICK.findall(data)]
        # A line that is cut by a move stands in two files, half in each: at most one a move is not whole in either.
        numbers.sort()
        assert len(set(numbers)) == len(numbers), "a tick was printed twice: two sides executed"


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
