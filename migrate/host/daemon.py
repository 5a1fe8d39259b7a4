"""The daemon of a host, put together: `ferry host`. Nothing is decided here but the order of coming up and going down.

Its directory: bus (its own), host.lock, accept.sock (a `unix:` destination), stdio.sock (for `ferry accept`), machines/NAME,
ledger/NAME.jsonl, jobs/JOB.jsonl, host.toml, incarnation. It may be killed and started again at any time: machines and their
jobs go on, and are found again.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate.bus.objects import Objects
from migrate.bus.status import ROOT
from migrate.errors import UsageError
from migrate.host.buses import Buses
from migrate.host.doubt import Doubt
from migrate.host.incoming import Incoming
from migrate.host.jobs import COORDINATOR, Job, Jobs
from migrate.host.machines import Machines
from migrate.host.outcome import conclude
from migrate.host.service import HostFace
from migrate.host.stdio import StdioDoor
from migrate.host.tree import Tree
from migrate.machine import hostconfig
from migrate.machine.ledger import incarnation_of
from migrate.transport import tls
from migrate.transport.listener import Arrival, listen
from migrate.transport.uri import UnixDestination, parse_listen

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What `ferry host` is told."""

    directory: Path  #: absolute
    name: str  #: what other hosts and people see
    listen: Sequence[str] = ()  #: URIs
    pki: Path | None = None  #: what `ferry pki issue` made for this host
    allow: Sequence[str] = ()  #: names of certificates of other hosts
    bus: str = ""  #: a bus to be managed on beside its own: "system", "session" or an address
    hold: Sequence[str] = ()  #: points at which machines that arrive wait; for tests


class HostDaemon:
    """Use `serve`; or `start`, then `stop` in any case."""

    def __init__(self, options: HostOptions, *, coordinator: Sequence[str] = COORDINATOR) -> None:
        """:param coordinator: the command of a migration's process; tests have their own."""
        self.options = options
        self.listening: list[str] = []
        self._coordinator = coordinator
        self._directory = options.directory
        self._objects = Objects(ROOT)
        self._buses = Buses(self._directory, self._objects, options.bus)
        self._started = False
        self._up = AsyncExitStack()

    @property
    def address(self) -> str:
        """Of the daemon's own bus."""
        return self._buses.address

    async def start(self) -> None:
        """:raises FerryError: why it cannot be; nothing is left behind then."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Everything down again in the opposite order. Machines go on; jobs that can roll back do."""
        await self._up.aclose()

    async def _start(self) -> None:
        options, up = self.options, self._up
        config = hostconfig.load(options.directory)
        addresses = [parse_listen(text) for text in options.listen]
        credentials = None if options.pki is None else tls.load(options.pki, options.allow)
        _lock(self._directory, up)
        up.push_async_callback(self._buses.leave)
        await self._buses.start()
        spec = self._spec(await asyncio.to_thread(incarnation_of, self._directory))

        machines = Machines(config, self._machine_changed, lambda name: self._tree.machine(name))
        self._jobs = Jobs(
            self._directory,
            emit=lambda job, number, line: self._tree.event("JobEvent", job, number, line),
            conclude=lambda job: conclude(job, machines),
            on_end=self._job_ended,
            on_status=lambda job, urgent: self._tree.job(job, urgent),
            command=self._coordinator,
        )
        self._doubt = Doubt(
            machines, self._jobs, lambda: spec, on_resolved=lambda name: self._tree.machine(name)
        )
        incoming = Incoming(machines, self._jobs, spec, hold=options.hold, command=self._coordinator)
        face = HostFace(
            name=options.name,
            incarnation=spec["incarnation"],
            listen=self.listening,
            spec=spec,
            machines=machines,
            jobs=self._jobs,
            incoming=incoming,
            doubt=self._doubt,
        )
        self._tree = Tree(self._objects, face, machines, self._jobs, self._doubt)

        up.push_async_callback(machines.close)
        await machines.adopt()
        self._jobs.adopt()
        up.push_async_callback(self._stop_jobs)
        up.push_async_callback(incoming.stop)
        up.callback(self._doubt.stop)

        async def arrived(arrival: Arrival) -> None:
            with arrival.sock as sock:
                await incoming.connection(
                    arrival.first, [sock.fileno()], f"{arrival.remote} by {arrival.kind}"
                )

        for address in [UnixDestination(str(self._directory / "accept.sock")), *addresses]:
            listener = await listen(address, arrived, credentials)
            up.push_async_callback(listener.close)
            self.listening += [str(bound) for bound in listener.addresses]
        door = StdioDoor(self._directory / "stdio.sock", incoming.connection)
        up.push_async_callback(door.close)

        self._tree.show_everything()
        await self._buses.join()
        self._started = True
        self._doubt.look_everywhere()

    async def _stop_jobs(self) -> None:
        """Not where this daemon could not even start: what an earlier one left goes on."""
        if self._started:
            await self._jobs.stop()

    def _spec(self, incarnation: str) -> dict[str, Any]:
        """What every coordinator of this host is told."""
        options = self.options
        pki = {"directory": str(options.pki), "allow": list(options.allow)}
        return {
            "host_name": options.name,
            "incarnation": incarnation,
            "credentials": pki if options.pki is not None else None,
        }

    # -- what the parts tell ---------------------------------------------------------------------------------------------

    def _job_ended(self, job: Job) -> None:
        self._doubt.ended(job)
        self._tree.machine(job.machine)

    def _machine_changed(self, name: str, state: str, detail: str) -> None:
        self._tree.event("MachineChanged", name, state, detail)
        self._tree.machine(name)
        self._doubt.look(name)


def _lock(directory: Path, up: AsyncExitStack) -> None:
    """One daemon a directory. :raises UsageError: if there is one already."""
    path = directory / "host.lock"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be opened: {error.strerror}", remedy="choose a --dir that you may write"
        ) from None
    up.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
        raise UsageError(
            f"another `ferry host` (process {pid or '?'}) serves {directory}",
            remedy="stop that one, or choose another --dir",
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


async def serve(
    options: HostOptions,
    on_ready: Callable[[HostDaemon], None],
    *,
    coordinator: Sequence[str] = COORDINATOR,
) -> None:
    """Run a host until SIGTERM or SIGINT.

    :raises FerryError: why it does not start.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    daemon = HostDaemon(options, coordinator=coordinator)
    await daemon.start()
    try:
        log.info("event=ready directory=%s listen=%s", options.directory, ",".join(daemon.listening))
        on_ready(daemon)
        await stop.wait()
        log.info("event=stopping directory=%s", options.directory)
    finally:
        await daemon.stop()
