"""A supervisor with a real ledger, and a roster that is made up: participants without processes that fail when they are told to."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from migrate.errors import DeviceGone, DeviceRefused, FerryError, Phase
from migrate.machine import ledger
from migrate.machine.children import Child
from migrate.machine.config import MachineConfig, RegionConfig
from migrate.machine.ledger import Ledger, Verdict
from migrate.machine.roster import Roster, Times
from migrate.machine.states import MachineState as S
from migrate.machine.supervisor import Supervisor
from migrate.memory import GuestMemory

JOB, EPOCH, PEER = "a" * 32, 1, "unix:/run/other"


@dataclass
class MadeUpChild:
    name: str = "uart0"
    alive: bool = True
    powered_off: bool = False

    def obituary(self, phase: Phase) -> DeviceGone:
        return DeviceGone(
            "its process was killed by SIGKILL", device=self.name, phase=phase, remedy="see its log"
        )


@dataclass
class MadeUpRoster:
    """What the supervisor asks of a Roster. `guest` is where the vCPU is: running, p2p or stopped."""

    guest: str = "stopped"
    locked: bool = False
    finished: list[str] = field(default_factory=list)
    fail: dict[str, list[FerryError]] = field(default_factory=dict)  #: by method, one a call
    children: dict[str, MadeUpChild] = field(default_factory=lambda: {"uart0": MadeUpChild()})
    gate: asyncio.Event | None = None  #: waited for in `release`

    def will_fail(self, method: str, times: int = 1, device: str = "disk0") -> None:
        self.fail[method] = [DeviceRefused(f"{method} failed", device=device) for _ in range(times)]

    def _maybe_fail(self, method: str) -> None:
        if self.fail.get(method):
            raise self.fail[method].pop(0)

    async def quiesce(self) -> Times:
        if self.fail.get("quiesce"):
            self.guest = "p2p"  # half-way
        self._maybe_fail("quiesce")
        self.guest = "stopped"
        return Times(5, {"uart0": 5})

    async def prepare(self, stopped_ns: int) -> Times:
        self.locked = True
        self._maybe_fail("prepare")
        self.guest = "p2p"
        return Times(1)

    async def release(self, stopped_ns: int) -> Times:
        if self.gate is not None:
            await self.gate.wait()
        self._maybe_fail("release")
        self.guest = "running"
        return Times(1)

    async def resume(self, stopped_ns: int) -> None:
        await self.prepare(stopped_ns)
        await self.release(stopped_ns)

    async def halt(self) -> None:
        self._maybe_fail("halt")
        self.guest = "stopped"

    async def end_copying(self) -> None:
        self._maybe_fail("end_copying")
        assert self.guest == "running", "it is asked of a machine that runs"

    async def release_locks(self) -> None:
        self._maybe_fail("release_locks")
        assert self.guest == "stopped", "locks are let go by what stands still"
        self.locked = False

    async def take_back(self, why: FerryError | None = None) -> None:
        with suppress(FerryError):
            await self.halt()
            await self.release_locks()

    async def stop_all(self) -> None:
        self.guest, self.locked = "stopped", False  # with the processes

    async def end_migration(self, outcome: str) -> None:
        self.finished.append(outcome)


@contextmanager
def full_disk(path: Path, spare: int = 0) -> Iterator[None]:
    """No file of this process grows beyond `spare` bytes more than `path` has: a write is cut there, or fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class OneMachine:
    """One host's supervisor; use inside an event loop."""

    def __init__(self, directory: Path, name: str = "web1") -> None:
        self.directory = directory
        self.roster = MadeUpRoster()
        self.ledger = Ledger(directory, name)
        self.changes: list[tuple[str, str]] = []
        self.watched: dict[str, Callable[[], None]] = {}
        self.it = Supervisor(
            MachineConfig(name, [RegionConfig(0, 4096)], []),
            cast(Roster, self.roster),
            GuestMemory(),
            self.ledger,
            changed=lambda state, detail: self.changes.append((state, detail)),
            watch=self._watch,
            ping=self._ping,
        )

    async def _ping(self, name: str, seconds: float) -> None:
        """The coordinators of these tests live until they are said to be gone."""

    def _watch(self, name: str, gone: Callable[[], None]) -> Callable[[], None]:
        self.watched[name] = gone
        return lambda: (self.watched.pop(name, None), None)[1]

    # -- what is seen -----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> S:
        return self.it.state

    @property
    def executes(self) -> bool:
        return self.roster.guest == "running"

    @property
    def verdict(self) -> Verdict:
        return self.ledger.verdict()

    def entries(self) -> list[str]:
        """As the next reader of the file finds them."""
        return [str(record.entry) for record in ledger.read(self.directory, "web1")]

    # -- what happens -----------------------------------------------------------------------------------------------------

    async def to(self, state: S) -> OneMachine:
        """Bring it there by the way that a migration goes."""
        outgoing = {S.OUTGOING: 1, S.STOPPED: 2, S.IN_DOUBT: 3}
        incoming = {S.INCOMING: 1, S.READY: 2, S.HELD: 3}
        if state is S.STARTING:
            return self
        if state in incoming:
            await self.it.begin_incoming(JOB, EPOCH, PEER, ":1.7")
            if incoming[state] > 1:
                await self.it.ready(JOB)
            if incoming[state] > 2:
                await self.coordinator_goes()
        else:
            await self.it.start()
            if state is S.PAUSED:
                await self.it.pause()
            elif state is S.FAILED:
                await self.dies()
            elif state is S.ENDED:
                await self.it.quit(force=False)
            elif state in outgoing:
                await self.it.begin_outgoing(JOB, PEER, ":1.7")
                if outgoing[state] > 1:
                    await self.it.quiesce(JOB)
                if outgoing[state] > 2:
                    await self.it.commit(JOB, EPOCH)
        assert self.state is state
        return self

    async def coordinator_goes(self) -> None:
        """The bus says that the coordinator's name is gone, if anybody listens."""
        gone = self.watched.get(":1.7")
        if gone is not None:
            gone()
        await self.settle()

    async def dies(self, name: str = "uart0") -> None:
        child = self.roster.children.setdefault(name, MadeUpChild(name))
        child.alive = False
        self.it.participant_died(cast(Child, child))
        await self.settle()

    async def settle(self) -> None:
        """Until what happens in the background has happened, but for what waits for time to pass."""
        for _ in range(20):
            await asyncio.sleep(0)

    def close(self) -> None:
        for task in self.it._tasks:
            task.cancel()
        self.ledger.close()
