"""Real daemons in directories short enough for sockets, and the proof that they leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from migrate.bus.host import HostClient

T = TypeVar("T")
HERE = Path(__file__).parent

MACHINE = """
[machine]
name = "web1"
memory = "4M"
[[device]]
id = "uart0"
type = "uart16550"
"""


def processes_of(directory: Path) -> list[str]:
    """Command lines of the processes that name the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                if str(directory) in words:
                    found.append(f"{entry.name}: {words}")
    return found


def eventually(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Wait for what another process does by itself; fails when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


class Host:
    """One daemon's process in one directory."""

    def __init__(self, directory: Path, *, real: bool = False) -> None:
        self.directory = directory
        self.real = real
        self.process: subprocess.Popen[str] | None = None
        self.log = directory.with_suffix(".log")

    def spawn(self, *words: str, bus: str = "") -> subprocess.Popen[str]:
        """:param bus: a shared bus to be managed on, too."""
        environment = {name: value for name, value in os.environ.items() if name != "FERRY_BUS"}
        environment |= {"FERRY_BUS": bus} if bus else {}
        if self.real:
            command = [
                sys.executable,
                "-m",
                "migrate.cli",
                "host",
                "--json",
                "--dir",
                str(self.directory),
                *words,
            ]
        else:
            command = [sys.executable, str(HERE / "run_host.py"), str(self.directory), *words]
        with self.log.open("a") as log:
            return subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env=environment,
            )

    def start(self, *words: str, bus: str = "") -> Host:
        self.process = self.spawn(*words, bus=bus)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "ready" in line, self.log.read_text()
        return self

    def end(self, number: signal.Signals) -> int:
        """Signal it and wait; its exit code."""
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.process.stdout.close()
        self.process = None
        return code

    def machine(self, text: str = MACHINE) -> Path:
        path = self.directory.parent / "machine.toml"
        path.write_text(text)
        return path

    def close(self) -> None:
        if self.process is not None:
            self.end(signal.SIGTERM)
        for line in processes_of(self.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)


@contextlib.asynccontextmanager
async def client_of(host: Host) -> AsyncIterator[HostClient]:
    client = await HostClient.connect(host.directory)
    try:
        yield client
    finally:
        await client.close()


def run(host: Host, work: Callable[[HostClient], Awaitable[T]], *, seconds: float = 60.0) -> T:
    """Do something with a client of this host's daemon."""

    async def session() -> T:
        async with asyncio.timeout(seconds), client_of(host) as client:
            return await work(client)

    return asyncio.run(session())


async def events_of(client: HostClient, job: str) -> list[dict[str, Any]]:
    """All events of a job, when it has ended."""
    return [event async for event in client.follow(job)]


async def until(client: HostClient, job: str, kind: str) -> dict[str, Any]:
    """The first event of a kind."""
    async with contextlib.aclosing(client.follow(job)) as events:
        async for event in events:
            if event["event"] == kind:
                return event
    raise AssertionError(f"no {kind}")


def state_of(host: Host, name: str = "web1") -> str | None:
    machines = run(host, lambda client: client.list_machines())
    return next((machine["state"] for machine in machines if machine["name"] == name), None)
