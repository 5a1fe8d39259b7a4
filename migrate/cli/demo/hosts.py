"""The two hosts of the demo: real `ferry host` daemons, each with a directory, a certificate and a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from migrate.bus.host import HostClient
from migrate.errors import FerryError, Phase, TransportError

#: A loaded machine takes many seconds to import what a daemon needs.
START_SECONDS = 60.0


class DemoHost:
    """One host; `start` it, talk to it by `client`, `kill` it as a power cut would, or `stop` it."""

    def __init__(self, name: str, directory: Path, pki: Path, allow: str) -> None:
        self.name = name
        self.directory = directory
        self.port = free_port()
        self._pki = pki
        self._allow = allow
        self._process: asyncio.subprocess.Process | None = None
        self._client: HostClient | None = None

    @property
    def client(self) -> HostClient:
        assert self._client is not None
        return self._client

    def output(self, machine: str, device: str = "uart0") -> Path:
        return self.directory / "machines" / machine / f"{device}.out"

    async def start(self, hold: Iterable[str] = ()) -> None:
        """:raises FerryError: with the daemon's own words, when it does not come up."""
        self.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory / "demo-host.log"
        words = [
            "--dir",
            str(self.directory),
            "--name",
            self.name,
            "--listen",
            f"tls://127.0.0.1:{self.port}",
        ]
        words += ["--pki", str(self._pki), "--allow", self._allow]
        for point in hold:
            words += ["--hold", point]
        with log.open("ab") as file:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "migrate.cli", "host", *words,
                stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._client = await HostClient.connect(self.directory)
                await self._client.properties()
                return
            except FerryError as error:
                if self._process.returncode is not None or time.monotonic() > deadline:
                    last = log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise TransportError(
                        f"the demo's {self.name} did not start: {last[0] if last else error}",
                        phase=Phase.SETUP,
                        remedy=f"see {log}",
                    ) from None
            await asyncio.sleep(0.05)

    async def machine(self, name: str) -> dict[str, Any] | None:
        """What this host says of a machine; None when it does not have it."""
        return next((item for item in await self.client.list_machines() if item["name"] == name), None)

    def pids(self) -> set[int]:
        """Every process of this host: the daemon, coordinators, supervisors, their buses and devices."""
        return processes_of(str(self.directory))

    async def kill(self) -> None:
        """SIGKILL to all of it at once, as if the power went; returns when all of it has ended and its sockets are closed."""
        while pids := self.pids():
            await asyncio.gather(*(asyncio.to_thread(_kill, pid) for pid in pids))

    async def stop(self) -> None:
        """End machines and daemon; nothing is left behind."""
        if self._client is not None:
            try:
                for machine in await self._client.list_machines():
                    await self._client.stop_machine(machine["name"], force=True)
            except FerryError:
                pass  # it was killed by the scenario: what is left is swept below
            await self._client.close()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), 10.0)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = self.pids()
            for pid in left:
                _signal(pid, number)
            deadline = time.monotonic() + 3.0
            while left and self.pids() and time.monotonic() < deadline:
                await asyncio.sleep(0.02)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _kill(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        select.select([fd], [], [])  # readable once every thread of it is gone
    except ProcessLookupError:
        pass  # it ended meanwhile
    finally:
        os.close(fd)


def processes_of(directory: str) -> set[int]:
    """Pids whose command line names the directory or a path below it, and the coordinators that such a daemon started."""
    found: set[int] = set()
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended while we looked
        if f"{directory}/" in words or f"{directory}\0" in words or f'{directory}"' in words:
            found.add(int(entry.name))
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grown = bool(children)
    return found


def free_port() -> int:
    """A port that nobody has. No outgoing connection gets it before a daemon listens there: those have a range of their own."""
    range_begins = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(100):
        chosen = 1024 + secrets.randbelow(range_begins - 1024) if range_begins > 1024 else 0
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", chosen))
            return int(probe.getsockname()[1])
    raise TransportError("no port is free on 127.0.0.1", phase=Phase.SETUP, remedy="see `ss -ltn`")


def cpu_ticks(pid: int) -> int | None:
    """CPU time of a process in clock ticks; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])
