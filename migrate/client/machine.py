"""One machine: what it is, and what can be done with it."""

from __future__ import annotations

from migrate.bus.host import SLOW, MigrateOptions, options_to_bus
from migrate.bus.machine import INTERFACE
from migrate.bus.status import MachineStatus, from_bus, machine_path
from migrate.client.job import Job
from migrate.client.peer import Peer, last_parts


class Machine:
    """Holds nothing: each question is asked of the daemon."""

    def __init__(self, peer: Peer, name: str) -> None:
        self._peer = peer
        self.name = name
        self.path = machine_path(name)

    async def status(self) -> MachineStatus:
        return from_bus(MachineStatus, await self._peer.properties(self.path, INTERFACE))

    async def pause(self) -> None:
        await self._peer.call(self.path, INTERFACE, "Pause", timeout=SLOW)

    async def resume(self) -> None:
        await self._peer.call(self.path, INTERFACE, "Resume", timeout=SLOW)

    async def stop(self, *, force: bool = False) -> None:
        await self._peer.call(self.path, INTERFACE, "Stop", "b", force, timeout=SLOW)

    async def check(self, to: str, options: MigrateOptions | None = None) -> Job:
        """Could it go there? The outcome of the job says so."""
        return await self._job("Check", "sa{sv}", to, options_to_bus(options or MigrateOptions()))

    async def migrate(self, to: str, options: MigrateOptions | None = None) -> Job:
        """:raises UsageError: for wrong words, or while another job of this machine goes on."""
        return await self._job("Migrate", "sa{sv}", to, options_to_bus(options or MigrateOptions()))

    async def recover(self) -> Job:
        """Ask the other host who runs it. :raises UsageError: if it is not in doubt."""
        return await self._job("Recover", "a{sv}", {})

    async def resolve(self, keep: str) -> str:
        """An operator's word, after fencing the other host; answers with the state afterwards."""
        return str(await self._peer.call(self.path, INTERFACE, "Resolve", "s", keep, gives="s", timeout=SLOW))

    async def _job(self, member: str, signature: str, *body: object) -> Job:
        # Starting one may wait for the coordinator of the last one to say goodbye.
        path = await self._peer.call(self.path, INTERFACE, member, signature, *body, gives="o", timeout=SLOW)
        return Job(self._peer, last_parts(path)[1])
