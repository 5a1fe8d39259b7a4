"""What docs/dbus/org.vmferry.Host1.xml promises, done by the daemon's parts. Looks at words; the parts decide."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from migrate.bus.host import Limits, MigrateOptions, RunOptions
from migrate.errors import Phase, UsageError
from migrate.host.doubt import Doubt
from migrate.host.incoming import Incoming
from migrate.host.jobs import Job, Jobs, Kind
from migrate.host.machines import Machines
from migrate.machine import config
from migrate.machine.states import MachineState
from migrate.transport.uri import LocalDestination, TlsDestination, parse

MAX_CONNECTIONS: Final = 16
MAX_DOWNTIME_MS: Final = 3_600_000
#: Below this, bytes/s, keeping a connection alive would take all of it.
MIN_BANDWIDTH: Final = 64 << 10
ON_STALL: Final = ("abort", "extend-downtime", "wait")
#: How long the coordinator of a machine that has just arrived may take to say goodbye, s.
GOODBYE_SECONDS: Final = 10.0


class HostFace:
    """What migrate.bus.host.host_interface serves."""

    def __init__(
        self, *, name: str, incarnation: str, listen: list[str], spec: dict[str, Any],
        machines: Machines, jobs: Jobs, incoming: Incoming, doubt: Doubt,
    ) -> None:  # fmt: skip
        """:param spec: what every coordinator of this host is told."""
        self._name, self._incarnation, self._listen, self._spec = name, incarnation, listen, spec
        self._machines, self._jobs, self._incoming, self._doubt = machines, jobs, incoming, doubt

    def name(self) -> str:
        return self._name

    def incarnation(self) -> str:
        return self._incarnation

    def listen(self) -> list[str]:
        return self._listen

    # -- machines --------------------------------------------------------------------------------------------------------

    async def run_machine(self, path: str, options: RunOptions) -> str:
        if not path.startswith("/"):
            raise UsageError(f"{path!r} is not an absolute path", remedy="the daemon has another directory")
        machine = await asyncio.to_thread(config.load, Path(path))
        async with self._machines.alone(machine.name):
            self._jobs.require_free(machine.name)
            await self._machines.launch(machine, incoming=False, fresh=options.fresh)
        return machine.name

    async def list_machines(self) -> list[dict[str, Any]]:
        found = [*await self._machines.describe(), *self._doubt.without_supervisor()]
        for entry in found:
            job = self._jobs.active_of(str(entry["name"]))
            entry["active"] = {"job": job.id, "kind": str(job.kind)} if job is not None else None
        return sorted(found, key=lambda entry: str(entry["name"]))

    async def stop_machine(self, name: str, force: bool) -> None:
        if not force:
            await self._after_goodbye(name)
            job = self._jobs.active_of(name)
            if job is not None and job.kind is not Kind.RECOVER:
                self._jobs.require_free(name)
        await self._machines.stop(name, force=force)

    async def pause_machine(self, name: str) -> None:
        await self._machines.require(name).supervisor.pause()

    async def resume_machine(self, name: str) -> None:
        await self._machines.require(name).supervisor.run()

    # -- migrations ------------------------------------------------------------------------------------------------------

    async def migrate(self, name: str, to: str, options: MigrateOptions) -> str:
        destination = parse(to)
        if isinstance(destination, LocalDestination):
            raise UsageError(
                "local: does not work yet",
                remedy="give a second `ferry host` another --dir, and its unix: address",
            )
        if isinstance(destination, TlsDestination) and self._spec["credentials"] is None:
            raise UsageError(
                "this host has no certificate to show",
                remedy="`ferry pki issue` it one and start `ferry host` with --pki DIR",
            )
        _check(options)
        machine = self._machines.require(name)
        await self._after_goodbye(name)
        spec = {
            **self._spec,
            "machine": name,
            "bus": machine.address,
            "to": str(destination),
            "connections": options.connections,
            "downtime_ms": options.downtime_ms,
            "verify": options.verify,
            "check_only": options.check_only,
            "keep": options.keep,
            "hold": [point for point in options.hold.split(",") if point],
            "doubt_seconds": float(options.doubt_seconds),
            "bandwidth": options.bandwidth,
            "timeout_seconds": options.timeout_seconds,
            "on_stall": options.on_stall,
        }
        kind = Kind.CHECK if options.check_only else Kind.MIGRATE
        return self._jobs.start(kind, name, str(destination), spec).id

    async def _after_goodbye(self, name: str) -> None:
        """An incoming job of a machine that is here has all but ended: it has brought it, or has refused another of its name."""
        machine, job = self._machines.get(name), self._jobs.active_of(name)
        if machine is not None and machine.state in _STANDS and job is not None and job.kind is Kind.INCOMING:
            await _ended(job)

    async def recover(self, name: str) -> str:
        return self._doubt.ask(name).id

    async def resolve(self, name: str, keep: str) -> str:
        return await self._doubt.resolve(name, keep)

    async def cancel(self, name: str) -> None:
        self._jobs.say(self._ours(name, "cancel"), "cancel")

    async def set_limits(self, name: str, limits: Limits) -> None:
        given = {key: value for key, value in asdict(limits).items() if value != -1}
        if not given:
            raise UsageError("no limit was given", remedy="give downtime_ms, bandwidth, or both")
        _check_limits(given.get("downtime_ms", 1), given.get("bandwidth", 0))
        self._jobs.say(self._ours(name, "set"), "set", **given)

    def _ours(self, name: str, word: str) -> Job:
        """The migration of this machine, or of this name, that its caller may steer.

        :raises UsageError: if there is none.
        """
        job = self._jobs.find(name)
        if job is None:
            raise UsageError(f"no job of {name[:64]!r} goes on", remedy="see `ferry list`")
        machine = job.machine
        if job.kind is Kind.INCOMING:
            raise UsageError(
                f"{machine} is arriving from {job.to}",
                remedy=f"`ferry {word} {machine}` on the host it comes from",
            )
        if job.kind is Kind.RECOVER:
            raise UsageError(
                f"{machine} is in doubt, which nothing cancels"
                if word == "cancel"
                else f"{machine} is in doubt: nothing of it moves any more",
                phase=Phase.RECOVER,
                remedy=f"mend the link, or fence the other host and `ferry resolve {machine}`",
            )
        return job

    async def proceed(self, name: str) -> None:
        job = self._jobs.find(name)
        if job is not None and job.kind in (Kind.MIGRATE, Kind.CHECK):
            self._jobs.say(job, "continue")
        else:
            await self._incoming.proceed(job.machine if job is not None else name)

    async def job_events(self, job: str) -> list[str]:
        return self._jobs.events(job)


_STANDS: Final = frozenset({MachineState.RUNNING, MachineState.PAUSED})


async def _ended(job: Job) -> None:
    try:
        async with asyncio.timeout(GOODBYE_SECONDS):
            await job.ended.wait()
    except TimeoutError:
        pass  # who starts the next job says that this one goes on


def _check(options: MigrateOptions) -> None:
    """:raises UsageError: for a number out of bounds or a path that is not absolute."""
    if not 0 <= options.connections <= MAX_CONNECTIONS:
        raise UsageError(f"{options.connections} connections", remedy=f"0 to {MAX_CONNECTIONS}")
    _check_limits(options.downtime_ms, options.bandwidth)
    if options.timeout_seconds < 0:
        raise UsageError(f"a timeout of {options.timeout_seconds} s", remedy="seconds, or 0 for none")
    if options.on_stall not in ON_STALL:
        raise UsageError(f"{options.on_stall[:64]!r} is nothing to do on a stall", remedy=", ".join(ON_STALL))
    if options.keep and not options.keep.startswith("/"):
        raise UsageError(
            f"{options.keep!r} is not an absolute path", remedy="the daemon has another directory"
        )


def _check_limits(downtime_ms: int, bandwidth: int) -> None:
    """:raises UsageError: for one that no migration could keep."""
    if not 0 < downtime_ms <= MAX_DOWNTIME_MS:
        raise UsageError(f"a downtime of {downtime_ms} ms", remedy="1 ms to an hour")
    if bandwidth and bandwidth < MIN_BANDWIDTH:
        raise UsageError(f"a bandwidth of {bandwidth} bytes/s", remedy="at least 64 KiB/s, or 0 for no limit")
