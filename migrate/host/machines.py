"""The machines of this host: their supervisors, started or found running, and what each says of itself.

A supervisor is never this daemon's to lose: it lives in a session of its own, and a daemon that starts looks for those that
run (`adopt`). Which job may do what with a machine is jobs.py's and doubt.py's.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from migrate.bus import Bus
from migrate.bus.supervisor import INTERFACE, NAME, SupervisorClient
from migrate.errors import BusError, DeviceGone, DeviceTimeout, FerryError, Phase, UsageError
from migrate.host.watched import Watched
from migrate.machine import launcher
from migrate.machine.children import last_line
from migrate.machine.config import MachineConfig, nearest
from migrate.machine.hostconfig import HostConfig
from migrate.machine.states import MachineState

log = logging.getLogger(__name__)

S = MachineState
#: States that end by themselves: what follows on the end of a job is not decided yet.
UNSETTLED: Final = frozenset({S.OUTGOING, S.STOPPED, S.READY, S.COMMITTED, S.STARTING, S.INCOMING, S.ENDED})
#: How long a supervisor may take to end all of its processes once it is told to, s.
QUIT_SECONDS: Final = 30.0
#: How long a supervisor whose bus was lost is looked for between two attempts, s.
LOOK_AGAIN_SECONDS: Final = 0.5
#: How long an adopted supervisor may wait for the coordinator that it was started for, s.
ORPHAN_SECONDS: Final = 120.0


@dataclass(slots=True, eq=False)
class Machine:
    name: str
    address: str  #: of its private bus
    bus: Bus
    supervisor: SupervisorClient
    process: Watched
    state: str = ""
    detail: str = ""
    #: What its supervisor said of itself when it was found, or had started; its memory and devices do not change.
    description: dict[str, Any] = field(default_factory=dict)


class Machines:
    """All machines whose supervisor answers."""

    def __init__(
        self,
        host: HostConfig,
        on_change: Callable[[str, str, str], None],
        on_described: Callable[[str], None] = lambda _name: None,
    ) -> None:
        """
        :param on_change: told name, state and detail at every change; the last is `ended`, after the process is gone.
        :param on_described: told the name of a machine whose `description` is new, when no change says so.
        """
        self.host = host
        self._on_described = on_described
        self._on_change = on_change
        self._machines: dict[str, Machine] = {}
        self._starting: dict[str, asyncio.Lock] = {}
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- looking ---------------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Machine | None:
        return self._machines.get(name)

    def require(self, name: str) -> Machine:
        """:raises UsageError: if it does not run here."""
        machine = self._machines.get(name)
        if machine is None or machine.state == S.ENDED:
            raise UsageError(
                f"no machine {name[:64]!r} runs here{nearest(name, sorted(self._machines))}",
                remedy="see `ferry list`",
            )
        return machine

    async def describe(self) -> list[dict[str, Any]]:
        """What every supervisor says of itself, but for those that are being taken down.

        One that does not answer in time is `unknown`, with the reason.
        """

        async def one(machine: Machine) -> dict[str, Any] | None:
            try:
                found = await machine.supervisor.describe()
            except FerryError as error:
                if machine.state == S.ENDED or await machine.process.wait(LOOK_AGAIN_SECONDS):
                    return None
                found = {"name": machine.name, "state": "unknown", "detail": str(error)}
            return {**found, "pid": machine.process.pid} if found["state"] != S.ENDED else None

        found = await asyncio.gather(*(one(machine) for machine in self._machines.values()))
        return [machine for machine in found if machine is not None]

    async def settle(self, name: str, timeout: float) -> Machine | None:
        """After the end of a job: wait until its consequences are seen; None where the machine has ended."""

        def settled() -> bool:
            machine = self._machines.get(name)
            return machine is None or machine.state not in UNSETTLED

        machine = self._machines.get(name)
        if machine is not None:
            try:
                await (
                    machine.supervisor.describe()
                )  # what it signalled before is heard before this is answered
            except FerryError as error:
                log.info("event=settle machine=%s why=%s", name, error)
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(settled)
        except TimeoutError:
            log.warning("event=not-settled machine=%s", name)
        return self._machines.get(name)

    # -- starting and finding --------------------------------------------------------------------------------------------

    def alone(self, name: str) -> asyncio.Lock:
        """Held by whoever starts a machine of this name."""
        return self._starting.setdefault(name, asyncio.Lock())

    async def launch(self, config: MachineConfig, *, incoming: bool, fresh: bool = False) -> Machine:
        """Start a machine; the caller holds `alone(name)`. Answers when it runs, or waits for its state when incoming.

        :raises FerryError: why it does not start; nothing is left behind then.
        """
        await self.vacate(config.name)
        there = self._machines.get(config.name)
        if there is not None:
            raise UsageError(
                f"a machine {config.name} is here already; it is {there.state}",
                remedy="stop that one first, or give this one another name",
            )
        launched = await launcher.launch(self.host, config, incoming=incoming, fresh=fresh)
        try:
            return await self._connect(config.name, launched.address, launched.child)
        except BaseException:  # also where the daemon ends at this moment
            launched.child.terminate()
            raise

    async def vacate(self, name: str) -> None:
        """Where a machine of this name is being taken down, wait until nothing of it is left.

        :raises DeviceTimeout: it does not end.
        """
        machine = self._machines.get(name)
        if machine is None:
            return
        try:
            if (await machine.supervisor.describe())["state"] != S.ENDED:
                return
        except FerryError as error:
            log.info("event=vacate machine=%s why=%s", name, error)
        if not await machine.process.wait(QUIT_SECONDS):
            raise DeviceTimeout(
                f"what was left of {name} here does not end",
                phase=Phase.SETUP,
                remedy=f"`ferry stop {name} --force` on that host; see its supervisor.log",
            )

    async def adopt(self) -> None:
        """Find the supervisors that an earlier daemon left running."""
        found = launcher.running(self.host)
        await asyncio.gather(*(self._adopt(name, socket) for name, socket in found.items()))

    async def _adopt(self, name: str, socket: Path) -> None:
        try:
            machine = await self._connect(name, _address(socket), None)
        except DeviceGone:  # its bus is there and it is not on it: it is being built
            self._spawn(self._adopt_later(name, socket))
        except FerryError as error:  # the socket of a supervisor that was killed
            log.info("event=not-adopted machine=%s why=%s", name, error)
        else:
            log.info("event=adopted machine=%s", name)
            if machine.state == S.STARTING:
                self._spawn(self._end_if_orphaned(machine))

    async def _adopt_later(self, name: str, socket: Path) -> None:
        await asyncio.sleep(LOOK_AGAIN_SECONDS)
        await self._adopt(name, socket)

    async def _end_if_orphaned(self, machine: Machine) -> None:
        """One that was started to receive a machine, and whose coordinator died with the daemon before it said so."""
        if not await machine.process.wait(ORPHAN_SECONDS) and machine.state == S.STARTING:
            log.warning("event=orphan machine=%s", machine.name)
            await self.stop(machine.name, force=True)

    async def _connect(self, name: str, address: str, child: subprocess.Popen[bytes] | None) -> Machine:
        bus = await Bus.connect(address)
        try:
            pid = await bus.pid_of(NAME)
            process = Watched(pid, child if child is not None and child.pid == pid else None)
        except ProcessLookupError:
            await bus.close()
            raise BusError(f"the supervisor of {name} has just ended") from None
        except FerryError:
            await bus.close()
            raise
        machine = Machine(name, address, bus, SupervisorClient(bus), process)
        self._machines[name] = machine
        self._spawn(self._watch(machine))
        await self._listen(machine)
        return machine

    async def _listen(self, machine: Machine) -> None:
        """Hear of every change from now on, and learn the state as it is."""

        def changed(_sender: str, _path: str, body: list[Any]) -> None:
            self._enter(machine, str(body[0]), str(body[1]))

        bus = machine.bus
        await bus.on_signal(INTERFACE, "Changed", changed)
        bus.on_disconnect(lambda: self._spawn(self._reconnect(machine, bus)))
        try:
            found = await machine.supervisor.describe()
        except FerryError as error:  # it lives, so it is shown; a change will tell its state
            self._enter(machine, "unknown", str(error))
        else:
            machine.description = found
            self._enter(machine, str(found["state"]), str(found["detail"]))

    async def _reconnect(self, machine: Machine, lost: Bus) -> None:
        """The bus went and the supervisor did not: it will bring the bus back at the same path."""
        while not machine.process.ended.is_set() and self._machines.get(machine.name) is machine:
            if machine.bus is lost and machine.state != S.ENDED:
                try:
                    bus = await Bus.connect(machine.address)
                    machine.bus, machine.supervisor = bus, SupervisorClient(bus)
                    await self._listen(machine)
                    return
                except FerryError as error:
                    log.info("event=bus-lost machine=%s why=%s", machine.name, error)
            await machine.process.wait(LOOK_AGAIN_SECONDS)

    async def _watch(self, machine: Machine) -> None:
        await machine.process.ended.wait()
        if self._machines.get(machine.name) is not machine:
            return
        detail = machine.detail
        if machine.state != S.ENDED:
            last = last_line(self.host.machine_directory(machine.name) / "supervisor.log")
            detail = f"its supervisor {machine.process.how()}: {last}"
            log.error("event=supervisor-died machine=%s how=%s", machine.name, detail)
        self._forget(machine)
        await machine.bus.close()
        self._tell(machine.name, S.ENDED, detail)

    def _forget(self, machine: Machine) -> None:
        if self._machines.get(machine.name) is machine:
            del self._machines[machine.name]
        machine.process.close()

    def _enter(self, machine: Machine, state: str, detail: str) -> None:
        if (state, detail) == (machine.state, machine.detail):
            return
        machine.state, machine.detail = state, detail
        log.info("event=machine machine=%s state=%s detail=%s", machine.name, state, detail)
        if state != S.ENDED:  # the process is still there; its end is told by _watch
            self._tell(machine.name, state, detail)
            if not machine.description.get("devices"):
                self._spawn(self._describe_late(machine))

    async def _describe_late(self, machine: Machine) -> None:
        """It was found before its devices were there."""
        machine.description = await machine.supervisor.describe()
        self._on_described(machine.name)

    def _tell(self, name: str, state: str, detail: str) -> None:
        self._spawn(self._wake())
        self._on_change(name, state, detail)

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # -- ending ----------------------------------------------------------------------------------------------------------

    async def stop(self, name: str, *, force: bool) -> None:
        """End a machine and wait until no process of it is left.

        :raises UsageError: between COMMIT and its end, unless forced. :raises DeviceTimeout: it does not end.
        """
        machine = self.require(name)
        try:
            await machine.supervisor.quit(force=force)
        except UsageError:
            raise
        except FerryError as error:  # it may have ended before it could answer
            log.info("event=quit machine=%s error=%s", name, error)
            if force:
                machine.process.signal(signal.SIGTERM)
        if await machine.process.wait(QUIT_SECONDS):
            return
        if not force:
            raise DeviceTimeout(
                f"the supervisor of {name} did not end within {QUIT_SECONDS:.0f} s",
                phase=Phase.RUNNING,
                remedy=f"`ferry stop {name} --force`; see its supervisor.log",
            )
        machine.process.signal(signal.SIGKILL)  # its children and its bus die with it
        await machine.process.wait(QUIT_SECONDS)

    async def close(self) -> None:
        """The daemon ends; the machines go on."""
        machines, self._machines = list(self._machines.values()), {}
        for machine in machines:
            machine.process.close()
            await machine.bus.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def logged() -> None:
            try:
                await work
            except FerryError as error:
                log.error("event=background error=%s", error)

        task = asyncio.get_running_loop().create_task(logged())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _address(socket: Path) -> str:
    return "unix:path=" + quote(str(socket), safe="/-_.")
