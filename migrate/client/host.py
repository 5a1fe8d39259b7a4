"""A host: its machines, its jobs, and everything that happens there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from migrate.bus.addresses import address_of
from migrate.bus.host import INTERFACE, PATH, SLOW, RunOptions, options_to_bus
from migrate.bus.job import INTERFACE as JOB
from migrate.bus.machine import INTERFACE as MACHINE
from migrate.bus.objects import MANAGER
from migrate.bus.status import ROOT, JobStatus, MachineStatus, from_bus
from migrate.client.job import Job
from migrate.client.machine import Machine
from migrate.client.peer import Peer
from migrate.errors import BusError, UsageError

#: What happened: an event of a job with its "job", or {"event": "machine", "name", "state", "detail"}.
Event = dict[str, Any]


def directory_address(directory: Path) -> str:
    """The address of the bus of the daemon that has this directory, an absolute path."""
    return "unix:path=" + quote(str(directory / "bus"), safe="/-_.")


class Host:
    """Make one with `Host.connect`; an async context manager that closes it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    @classmethod
    async def connect(cls, where: Path | str) -> Self:
        """
        :param where: the directory of a daemon, or a bus: "system", "session" or an address.
        :raises BusError: if no daemon is there. :raises UsageError: for a bus that cannot be meant.
        """
        if isinstance(where, str):
            return cls(await Peer.connect(address_of(where)))
        try:
            return cls(await Peer.connect(directory_address(where)))
        except BusError:
            raise BusError(
                f"no `ferry host` runs in {where}",
                remedy="start it, or name its directory by --dir or FERRY_DIR",
            ) from None

    async def close(self) -> None:
        await self._peer.bus.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- machines --------------------------------------------------------------------------------------------------------

    async def run(self, path: Path, options: RunOptions | None = None) -> Machine:
        """Start the machine of a machine.toml, an absolute path on that host."""
        given = options_to_bus(options or RunOptions())
        name = await self._peer.call(
            PATH, INTERFACE, "RunMachine", "sa{sv}", str(path), given, gives="s", timeout=SLOW
        )
        return self.machine(str(name))

    def machine(self, name: str) -> Machine:
        """Whether there is one of this name shows when it is asked something."""
        return Machine(self._peer, name)

    async def machines(self) -> list[MachineStatus]:
        """All machines, by name."""
        found = await self._objects(MACHINE)
        return sorted((from_bus(MachineStatus, values) for values in found), key=lambda machine: machine.name)

    # -- jobs ------------------------------------------------------------------------------------------------------------

    def job(self, name: str) -> Job:
        return Job(self._peer, name)

    async def jobs(self) -> list[JobStatus]:
        """All jobs that are kept, the oldest first."""
        found = await self._objects(JOB)
        return sorted(
            (from_bus(JobStatus, values) for values in found), key=lambda job: (job.started_at, job.id)
        )

    async def find_job(self, name: str) -> JobStatus:
        """The job of this id or beginning of one; of a machine's name, its newest.

        :raises UsageError: if there is none, or the beginning is that of several.
        """
        jobs = await self.jobs()
        named = [job for job in jobs if job.machine == name][-1:] or [
            job for job in jobs if job.id.startswith(name)
        ]
        if len(named) != 1:
            raise UsageError(
                f"there is no job {name[:64]!r}" if not named else f"{len(named)} jobs begin with {name!r}",
                remedy="see `ferry jobs`",
            )
        return named[0]

    async def _objects(self, interface: str) -> list[dict[str, Any]]:
        objects = await self._peer.call(ROOT, MANAGER, "GetManagedObjects", gives="a{oa{sa{sv}}}")
        return [interfaces[interface] for interfaces in objects.values() if interface in interfaces]

    # -- everything ------------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens from now on, for ever. :raises BusError: when the daemon goes."""
        wanted = ((INTERFACE, "JobEvent"), (INTERFACE, "MachineChanged"))
        async with contextlib.aclosing(self._peer.signals(*wanted)) as signals:
            await anext(signals)
            yield {"event": "following"}
            async for heard in signals:
                if heard is None:
                    continue
                _path, member, body = heard
                if member == "JobEvent":
                    yield {**json.loads(body[2]), "job": body[0]}
                else:
                    yield {"event": "machine", **dict(zip(("name", "state", "detail"), body, strict=True))}
