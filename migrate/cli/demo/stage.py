"""The stage of the demo: two hosts, the certificates, the machine, and the checks that follow every scenario."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from migrate.bus.host import MigrateOptions
from migrate.cli.demo import bridged, console
from migrate.cli.demo.hosts import DemoHost, cpu_ticks
from migrate.cli.demo.relay import Relay
from migrate.errors import FerryError, Phase
from migrate.transport import pki

MACHINE = "demo"
#: The guest is seen to work before it is moved, and to go on after.
TICKS_BEFORE = 30
TICKS_AFTER = 30
DISK_BYTES = 16 << 20
MEMORY = "256M"
BOOT_SECONDS = 60.0
GO_ON_SECONDS = 60.0


class Console(Protocol):
    """How a guest is read: console.py, or linux/console.py."""

    def last_tick(self, output: Path) -> int: ...
    def read(self, before: bytes, after: bytes | None, at_start: int) -> console.GuestReport: ...


Event = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What `ferry demo` was asked for."""

    scenario: str = "completed"
    at: str = ""
    destination_gone: bool = False
    memory: str = ""  #: of the guest; "" is what its VMM has for the demo
    vmm: str = "embedded"
    dirty_rate: str = ""  #: bytes a second as "25M", "0", "max", or the guest's own default
    tracker: str = ""
    connections: int = 1
    downtime_ms: int = 300
    keep: str = ""
    devices: str = (
        "bus"  #: who moves the devices: the bus, or bridges by vfio-user; x-remote: one more, QEMU's
    )
    back: bool = False  #: a second run, from where it has gone to where it was


@dataclass(slots=True)
class Stage:
    """Made by `open_stage`, taken down by `close`."""

    options: Options
    directory: Path
    source: DemoHost
    destination: DemoHost
    relay: Relay | None
    say: Say
    tell: Callable[[Event], None]  #: every event of the migration
    extra: Event = field(default_factory=dict)  #: what a scenario adds to the last line
    strange: str = ""  #: the first line of the guest's that is not one of its own, or says CORRUPT
    tick_at_start: int = 0
    said_before: bytes = b""  #: what the guest said on the destination's host before it was there last

    machine: str = MACHINE
    #: How the guest speaks, and which words of a command line tell a process that executes it.
    console: Console = console
    executes: bytes = b"devices.vcpu"

    def output(self, host: DemoHost) -> Path:
        """Where that host keeps what the guest has said."""
        return host.output(MACHINE)

    # -- the machine ---------------------------------------------------------------------------------------------------------

    def machine_toml(self) -> str:
        tracker = f'tracker = "{self.options.tracker}"\n' if self.options.tracker else ""
        if self.options.devices == "vfio-user":
            return bridged.machine_toml(
                MACHINE, self.options.memory or MEMORY, self.cmdline(), self.options.tracker, self.image
            )
        return (
            f'[machine]\nname = "{MACHINE}"\nmemory = "{self.options.memory or MEMORY}"\n\n'
            f'[vcpu]\ncmdline = "{self.cmdline()}"\n{tracker}\n'
            '[[device]]\nid = "uart0"\ntype = "uart16550"\n\n'
            '[[device]]\nid = "rtc0"\ntype = "rtc"\n\n'
            f'[[device]]\nid = "display0"\ntype = "display"\n{tracker}\n'
            f'[[device]]\nid = "disk0"\ntype = "virtio-blk"\nimage = "{self.image}"\nvectors = 3\n{tracker}'
            + (self._scsi() if self.options.devices == "x-remote" else "")
        )

    def _scsi(self) -> str:
        return (
            '\n[[device]]\nid = "scsi0"\ntype = "x-remote"\noptions = { model = "lsi53c895a" }\n'
            f'image = "{self.image.with_name("scsi0.img")}"\ntracker = "compare"\nirq = 8\n'
        )

    @property
    def image(self) -> Path:
        """The disk's image, on storage that both hosts share."""
        return self.directory / "storage" / "disk0.img"

    def configure(self, destination: str) -> None:
        """The host.toml of both hosts; `destination` is what the destination's says besides."""
        for host, more in ((self.source, ""), (self.destination, destination)):
            host.directory.mkdir()
            if self.options.devices == "vfio-user":
                more = bridged.host_toml() + more
            (host.directory / "host.toml").write_text(f'images = ["{self.image.parent}"]\n{more}')

    def cmdline(self) -> str:
        """Options of the guest: how much it rewrites each tick of 10 ms, and over what."""
        # `compare` sends 64 KiB where a page was written: a small working set lets it come to an end.
        more = " span=8 scsi=4" if self.options.devices == "x-remote" else ""
        return self._dirty(self.options.dirty_rate) + more

    def _dirty(self, rate: str) -> str:
        if rate == "max":
            return "storm=1"
        if not rate:
            return "dirty=64"
        if rate == "0":
            return "dirty=0"
        from migrate.machine.config import parse_size

        return f"dirty={max(1, parse_size(rate, '--dirty-rate') // 4096 // 100)}"

    async def boot(self) -> None:
        """Start the machine on the source and see the guest work."""
        path = self.directory / "machine.toml"
        path.write_text(self.machine_toml())
        await self.source.client.run_machine(str(path))
        await self._ticks(self.source, TICKS_BEFORE, BOOT_SECONDS)
        tick = self.console.last_tick(self.output(self.source))
        self.say(f"the guest runs on {self.source.name}: tick {tick}")

    async def _ticks(self, host: DemoHost, least: int, seconds: float) -> int:
        """Wait until the guest has printed a tick of at least that number there."""
        deadline = time.monotonic() + seconds
        while (tick := self.console.last_tick(self.output(host))) < least:
            if time.monotonic() > deadline:
                raise FerryError(
                    f"the guest printed no tick {least} on {host.name} within {seconds:.0f} s (the last is {tick})",
                    phase=Phase.RUNNING,
                    remedy=f"see {self.output(host)} and the logs beside it",
                )
            await asyncio.sleep(0.02)
        return tick

    # -- the migration -------------------------------------------------------------------------------------------------------

    @property
    def uri(self) -> str:
        port = self.relay.port if self.relay is not None else self.destination.port
        return f"tls://127.0.0.1:{port}?name={self.destination.name}"

    async def begin(self, *, hold: str = "", doubt_seconds: int = 30) -> str:
        """Start the migration; the job's id."""
        self.tick_at_start = self.console.last_tick(self.output(self.source))
        self.say(f"migrating to {self.uri}")
        options = MigrateOptions(
            connections=self.options.connections,
            downtime_ms=self.options.downtime_ms,
            verify=True,
            keep=self.options.keep,
            hold=hold,
            doubt_seconds=doubt_seconds,
        )
        return await self.source.client.migrate(MACHINE, self.uri, options)

    async def follow(
        self, job: str, on_held: Callable[[str], Awaitable[None]] | None = None, host: DemoHost | None = None
    ) -> Event:
        """Every event of a job to its outcome; `on_held` is told of each point that the job waits at."""
        async for event in (host or self.source).client.follow(job):
            self.tell(event)
            if event.get("event") == "held" and on_held is not None:
                await on_held(str(event["at"]))
            if event.get("event") == "outcome":
                return event
        raise FerryError(
            f"job {job} ended without an outcome", phase=Phase.RUNNING, remedy="see the host's log"
        )

    async def proceed(self) -> None:
        await self.source.client.proceed(MACHINE)

    async def held_at_destination(self, job: str, point: str) -> None:
        """Wait until the destination waits at that point of the job.

        :raises FerryError: if the job ends before.
        """
        while True:
            try:
                events = await self.destination.client.job_events(job)
            except FerryError:
                events = []  # it has not heard of the job yet
            if any(event.get("event") == "held" and event.get("at") == point for event in events):
                return
            last = (await self.source.client.job_events(job))[-1]
            if last.get("event") == "outcome":
                why = "; ".join(reason["reason"] for reason in last["reasons"])
                raise FerryError(
                    f"the migration ended before {point}: {why}",
                    phase=Phase.LOAD,
                    remedy="see the hosts' logs",
                )
            await asyncio.sleep(0.01)

    def turn_round(self) -> None:
        """The machine has moved; from now on its destination is where it came from."""
        self.said_before = console.output_of(self.output(self.source))
        self.source, self.destination = self.destination, self.source

    # -- what must be true afterwards ----------------------------------------------------------------------------------------

    async def judge(self, outcome: Event) -> Event:
        """The last line: the outcome, what the guest proves, and that exactly the side that is named runs it."""
        running_on = outcome["running_on"]
        here = self.destination if running_on == "destination" else self.source
        there = self.source if running_on == "destination" else self.destination
        moved = running_on == "destination"
        if running_on == "neither":
            await self.nobody_executes([self.source, self.destination])
        else:
            now = self.console.last_tick(self.output(here))
            await self._ticks(here, now + TICKS_AFTER, GO_ON_SECONDS)
            await self.nobody_executes([there])
        first = self.said_before + console.output_of(self.output(self.source))
        second = console.output_of(self.output(self.destination))[len(self.said_before) :]
        report = self.console.read(first, second if moved else None, self.tick_at_start)
        for key in ("job", "machine", "to", "role"):
            outcome.pop(key, None)
        self.strange = report.strange
        return {**outcome, "guest": report.to_json(), **self.extra}

    async def nobody_executes(self, hosts: list[DemoHost]) -> None:
        """For a second no vCPU of the machine executes anything on these hosts.

        :raises FerryError: if one does: the one thing that must never be.
        """
        outputs = {host.name: self._size(host) for host in hosts}
        busy: dict[int, int] = {}
        for host in hosts:
            for pid in vcpus(host, self.executes):
                ticks = cpu_ticks(pid)
                if ticks is not None:
                    busy[pid] = ticks
        await asyncio.sleep(1.0)
        for host in hosts:
            used = {pid: now - then for pid, then in busy.items() if (now := cpu_ticks(pid)) is not None}
            # An idle event loop may use a tick of 10 ms a second; a vCPU that executes uses tens.
            if self._size(host) != outputs[host.name] or any(ticks > 2 for ticks in used.values()):
                raise FerryError(
                    f"the machine executes on {host.name}, where it must not (vCPU ticks {used})",
                    phase=Phase.RUNNING,
                    remedy="this is a defect of vmferry: keep the logs and report it",
                )

    def _size(self, host: DemoHost) -> int:
        try:
            return self.output(host).stat().st_size
        except FileNotFoundError:
            return 0

    # -- taking down ---------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End everything; keep what was asked to be kept."""
        await asyncio.gather(self.source.stop(), self.destination.stop())
        if self.relay is not None:
            await self.relay.cut()
        try:
            if self.options.keep:
                keep_files(self.directory, Path(self.options.keep))
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


def vcpus(host: DemoHost, executes: bytes = b"devices.vcpu") -> list[int]:
    """Pids of the processes of a host that execute the guest."""
    found = []
    for pid in host.pids():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if executes in words:
            found.append(pid)
    return found


def keep_files(directory: Path, target: Path) -> None:
    """Ledgers, logs, jobs and the guest's output of both hosts, beside the blobs that are there already."""
    for host in ("hosta", "hostb"):
        for path in sorted((directory / host).rglob("*")):
            if path.is_file() and path.suffix in (".log", ".jsonl", ".out", ".toml"):
                copy = target / host / path.relative_to(directory / host)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def open_stage(options: Options, say: Say, tell: Callable[[Event], None], *, relay: bool) -> Stage:
    """Directories and certificates; nothing is started yet.

    :raises UsageError: this host lacks what the VMM needs.
    """
    kind: type[Stage] = Stage
    if options.vmm == "qemu":
        from migrate.cli.demo.qemu_stage import QemuStage

        kind = QemuStage
    directory = Path(tempfile.mkdtemp(prefix="ferry-demo-", dir=_short_tmp()))
    directory.chmod(0o700)
    keys = directory / "pki"
    pki.init(keys, "vmferry demo")
    for name in ("hosta", "hostb"):
        pki.issue(keys, name, ["127.0.0.1"], 2)
    storage = directory / "storage"
    storage.mkdir()
    for disk in ("disk0", "scsi0"):
        with (storage / f"{disk}.img").open("wb") as image:
            image.truncate(DISK_BYTES)
    source = DemoHost("hosta", directory / "hosta", keys / "hosta", "hostb")
    destination = DemoHost("hostb", directory / "hostb", keys / "hostb", "hosta")
    return kind(
        options, directory, source, destination, Relay(destination.port) if relay else None, say, tell
    )


def _short_tmp() -> str:
    """Sockets need short paths; a long TMPDIR does not serve."""
    found = tempfile.gettempdir()
    return found if len(found) <= 24 and os.access(found, os.W_OK) else "/tmp"
