"""Hosts, machines and the command `ferry` as a user has them: real daemons in a pen (leftovers.py), and a guest that proves
itself."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar

from migrate.bus.host import HostClient
from migrate.errors import FerryError
from migrate.transport import pki
from tests.faults.leftovers import Pen, Process

T = TypeVar("T")
Event = dict[str, Any]

FERRY: Final = (sys.executable, "-m", "migrate.cli")
#: For what other processes do by themselves, s. Only failing tests wait that long.
PATIENCE: Final = 90.0
MACHINE: Final = "web1"
MACHINE_TOML: Final = f"""
[machine]
name = "{MACHINE}"
memory = "16M"
[vcpu]
cmdline = "dirty=64"
[[device]]
id = "uart0"
type = "uart16550"
[[device]]
id = "rtc0"
type = "rtc"
"""


def eventually(condition: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """What `condition` answers once that is true; fails when it never is."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)
    return found


@dataclass(frozen=True, slots=True, repr=False)
class Said:
    """What a command said, and its exit code."""

    words: tuple[str, ...]
    code: int
    out: list[str]
    err: list[str]

    @property
    def events(self) -> list[Event]:
        return [json.loads(line) for line in self.out]

    @property
    def outcome(self) -> Event:
        return self.events[-1]

    def complaint(self, code: int) -> str:
        """The one line of a command that failed like this; it says what is wrong and, in brackets, what to do."""
        assert self.code == code, self
        assert len(self.err) == 1, self
        assert re.fullmatch(r"ferry: .+ \(.+\)", self.err[0]), self
        return self.err[0]

    def __repr__(self) -> str:
        return "\n".join([f"ferry {' '.join(self.words)} → {self.code}", *self.out[-6:], *self.err])


class Running:
    """A `ferry` command that goes on, with --json: its events as they come."""

    def __init__(self, pen: Pen, words: tuple[str, ...]) -> None:
        self.words = words
        self.process = subprocess.Popen(
            [*FERRY, *words, "--json"], cwd=pen.directory, env=pen.environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.seen: list[Event] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._err: list[str] = []
        self._threads = [threading.Thread(target=self._read_out), threading.Thread(target=self._read_err)]
        for thread in self._threads:
            thread.start()

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_err(self) -> None:
        assert self.process.stderr is not None
        self._err += [line.rstrip("\n") for line in self.process.stderr]

    def until(self, kind: str, **fields: object) -> Event:
        """The next event of this kind with these fields."""
        deadline = time.monotonic() + PATIENCE
        while (line := self._lines.get(timeout=max(0.01, deadline - time.monotonic()))) is not None:
            event: Event = json.loads(line)
            self.seen.append(event)
            if event["event"] == kind and fields.items() <= event.items():
                return event
        raise AssertionError(f"it ended without {kind} {fields}: {self.seen[-5:]} {self._err}")

    def end(self) -> Said:
        """Wait for its end."""
        code = self.process.wait(PATIENCE)
        for thread in self._threads:
            thread.join()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        while not self._lines.empty():
            if (line := self._lines.get()) is not None:
                self.seen.append(json.loads(line))
        return Said(self.words, code, [json.dumps(event) for event in self.seen], self._err)


class Host:
    """One `ferry host`. It keeps its port when it is started again."""

    def __init__(
        self, pen: Pen, name: str, *, keys: Path | None = None, allow: str = "*", toml: str = ""
    ) -> None:
        """:param keys: what `ferry pki issue` made; without, it does not listen on TCP. :param toml: its host.toml."""
        self.pen = pen
        self.name = name
        self.directory = pen.directory / name
        self.log = pen.directory / f"{name}.log"
        self.port = 0
        self._keys = keys
        self._allow = allow
        self._process: subprocess.Popen[str] | None = None
        self._words: tuple[str, ...] = ()
        if toml:
            self.directory.mkdir()
            (self.directory / "host.toml").write_text(toml)

    # -- the daemon ----------------------------------------------------------------------------------------------------------

    def start(self, *words: str) -> Host:
        self._words = words
        tls = (
            ["--listen", f"tls://127.0.0.1:{self.port}", "--pki", str(self._keys), "--allow", self._allow]
            if self._keys
            else []
        )
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [*FERRY, "host", "--json", "--dir", str(self.directory), "--name", self.name, *tls, *words],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=self.pen.environment(),
                cwd=self.pen.directory,
            )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith('{"event": "ready"'), line + self.log.read_text()
        for address in json.loads(line)["listen"]:
            if address.startswith("tls://"):
                self.port = int(address.rpartition(":")[2])
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the daemon alone and wait for its end; its exit code."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.send_signal(number)
        code = self._process.wait(PATIENCE)
        self._process.stdout.close()
        self._process = None
        return code

    def restart(self, *words: str) -> None:
        self.end()
        self.start(*words)

    def revive(self) -> None:
        """As `start()` left it, whatever a test has done to the daemon."""
        if self._process is not None and (self._words or self._process.poll() is not None):
            self.end()
        if self._process is None:
            self.start()

    def close(self) -> None:
        """Machines and daemon, as a user ends them."""
        if self._process is None:
            return
        try:
            self.clear()
        finally:
            self.end()

    def clear(self) -> None:
        """No machine is left here, nor a doubt about one."""
        for machine in self.machines():
            name = str(machine["name"])
            if machine["pid"]:
                self.do(lambda client, name=name: client.stop_machine(name, force=True))  # type: ignore[misc]
            if any(one["name"] == name for one in self.machines()):
                self.do(lambda client, name=name: client.resolve(name, "source"))  # type: ignore[misc]

    # -- asking it -----------------------------------------------------------------------------------------------------------

    def ferry(self, *words: str) -> Said:
        """`ferry WORDS --dir` of this host."""
        return ferry(self.pen, *words, "--dir", str(self.directory))

    def begin(self, *words: str) -> Running:
        return Running(self.pen, (*words, "--dir", str(self.directory)))

    def do(self, work: Callable[[HostClient], Awaitable[T]]) -> T:
        async def session() -> T:
            client = await HostClient.connect(self.directory)
            try:
                async with asyncio.timeout(PATIENCE):
                    return await work(client)
            finally:
                await client.close()

        return asyncio.run(session())

    def machines(self) -> list[dict[str, Any]]:
        return self.do(lambda client: client.list_machines())

    def machine(self, name: str = MACHINE) -> dict[str, Any] | None:
        return next((machine for machine in self.machines() if machine["name"] == name), None)

    def state(self, name: str = MACHINE) -> str:
        """Of a machine; "" where it is not here."""
        found = self.machine(name)
        return "" if found is None else str(found["state"])

    def becomes(self, state: str, name: str = MACHINE) -> None:
        eventually(lambda: self.state(name) == state, f"{name} is {state!r} on {self.name}")

    def proceed(self, name: str = MACHINE) -> None:
        self.do(lambda client: client.proceed(name))

    def job_events(self, job: str) -> list[Event]:
        try:
            return self.do(lambda client: client.job_events(job))
        except FerryError:
            return []  # it has not heard of it yet

    def held(self, job: str, at: str) -> None:
        """Wait until this side of a job waits there."""
        eventually(
            lambda: any(event.get("at") == at for event in self.job_events(job) if event["event"] == "held"),
            f"{job} is held at {at} on {self.name}",
        )

    def outcome_of(self, job: str) -> Event:
        return eventually(
            lambda: next((e for e in self.job_events(job) if e["event"] == "outcome"), None),
            f"{self.name} knows how {job} ended",
        )  # type: ignore[return-value]

    @property
    def unix(self) -> str:
        return f"unix:{self.directory}/accept.sock"

    @property
    def tls(self) -> str:
        return f"tls://127.0.0.1:{self.port}?name={self.name}"

    # -- its processes -------------------------------------------------------------------------------------------------------

    def processes(self, module: str, *words: str) -> list[Process]:
        """Those of this host that run a module, with these words in their command lines."""
        return [
            process
            for process in self.pen.processes()
            if module in process.words
            and all(word in " ".join(process.words) for word in words)
            and (self._names(process) or self._is_ours(process))
        ]

    def _names(self, process: Process) -> bool:
        return f"{self.directory}/" in " ".join(process.words) or f'{self.directory}"' in " ".join(
            process.words
        )

    def _is_ours(self, process: Process) -> bool:
        return self._process is not None and process.status["PPid"] == str(self._process.pid)

    def pid_of(self, device: str, name: str = MACHINE) -> int:
        machine = self.machine(name)
        assert machine is not None
        return next(int(found["pid"]) for found in machine["devices"] if found["id"] == device)

    def kill_device(self, device: str) -> None:
        os.kill(self.pid_of(device), signal.SIGKILL)

    # -- the guest -----------------------------------------------------------------------------------------------------------

    def console(self, name: str = MACHINE) -> bytes:
        try:
            return (self.directory / "machines" / name / "uart0.out").read_bytes()
        except FileNotFoundError:
            return b""

    def ticks_on(self, more: int = 20) -> None:
        """See the guest go on here."""
        start = len(TICK.findall(self.console()))
        eventually(lambda: len(TICK.findall(self.console())) >= start + more, f"{more} ticks on {self.name}")

    def is_still(self) -> None:
        """Nothing comes from the guest here for a second."""
        before = len(self.console())
        time.sleep(1.0)
        assert len(self.console()) == before, f"the guest executes on {self.name}"


def ferry(pen: Pen, *words: str) -> Said:
    done = subprocess.run(
        [*FERRY, *words], cwd=pen.directory, env=pen.environment(), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    return Said(words, done.returncode, done.stdout.splitlines(), done.stderr.splitlines())


TICK: Final = re.compile(rb"^T (\d+)(?: \d+){4}$", re.MULTILINE)


class Trail:
    """What the guest says from now on, wherever it goes."""

    def __init__(self, *hosts: Host) -> None:
        """:param hosts: all that it will be on; it is on the first."""
        self._where = hosts[0]
        self._read = {host.name: len(host.console()) for host in hosts}
        self._said = b""

    def goes(self, to: Host) -> None:
        """It has left, and goes on there."""
        self._take()
        self._where = to

    def _take(self) -> None:
        whole = self._where.console()
        self._said += whole[self._read[self._where.name] :]
        self._read[self._where.name] = len(whole)

    def check(self) -> None:
        """No line is damaged, no tick is missing or there twice, and nothing was corrupt."""
        self._take()
        whole = self._said[self._said.find(b"\n") + 1 : self._said.rfind(b"\n") + 1]
        strange = [
            line
            for line in whole.splitlines()
            if not re.fullmatch(rb"T( \d+){5}|B( \d+){3,4}|V( \d+){4}|L( \d+){3}|[DF]( \d+){2}", line)
        ]
        assert strange == [], f"{strange} in what the guest said"
        numbers = [int(number) for number in TICK.findall(whole)]
        assert len(numbers) >= 20
        assert [pair for pair in pairwise(numbers) if pair[1] != pair[0] + 1] == []


def peak_bytes(pid: int) -> int:
    """Most resident memory that a process has had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


#: CAs of tests are this old, so that they can have signed what has expired since.
LONG_AGO: Final = datetime.now(UTC) - timedelta(days=40)


@contextmanager
def two_hosts(ground: Pen, tomls: Sequence[str]) -> Iterator[tuple[Host, Host]]:
    """hosta and hostb, each with its host.toml, joined by mutual TLS; nothing of theirs is left."""
    keys = keys_for(ground, "hosta", "hostb")
    a, b = (Host(ground, name, keys=keys[name], toml=toml) for name, toml in zip(keys, tomls, strict=True))
    a.start()
    b.start()
    yield a, b
    for host in (a, b):
        host.close()
    assert (left := ground.at_work()) == [], left


def keys_for(pen: Pen, *names: str, ca: str = "pki", expired: bool = False) -> dict[str, Path]:
    """A CA in the pen, and a certificate for each name.

    :param expired: give certificates that were good for a day, long ago.
    """
    directory = pen.directory / ca
    if not directory.exists():
        pki.init(directory, ca, now=LONG_AGO)
    for name in names:
        pki.issue(directory, name, ["127.0.0.1"], 1, now=LONG_AGO if expired else None)
    return {name: directory / name for name in names}
