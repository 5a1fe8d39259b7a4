"""The supervisor's process: `python -m migrate.machine SPEC.json`. Builds the machine around a Supervisor and takes it down.

It is started by the host's daemon in a session of its own and survives it. On the descriptor named in the spec it writes one JSON
line when the machine stands (or why not), and nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from migrate.bus import Bus, PrivateBus
from migrate.bus.daemon import AdoptedBus
from migrate.bus.qemu import QemuClient
from migrate.bus.supervisor import NAME, PATH, supervisor_interface
from migrate.errors import FerryError, Phase, UsageError
from migrate.machine import hostconfig
from migrate.machine.children import Adopted, Child
from migrate.machine.config import VCPU_ID, MachineConfig, RegionConfig
from migrate.machine.ledger import Entry, Ledger, Verdict, decisive
from migrate.machine.roster import Roster
from migrate.machine.service import SupervisorFace
from migrate.machine.states import MachineState
from migrate.machine.supervisor import Supervisor
from migrate.memory import GuestAddress, GuestMemory, RegionSpec

log = logging.getLogger(__name__)

#: How long an incoming machine waits for the first word of its coordinator, s: one that died before it spoke leaves no orphan.
UNCLAIMED_SECONDS = 60.0
#: Between two attempts to bring a bus back, s.
BUS_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Spec:
    """What the daemon asks for."""

    host: Path
    machine: MachineConfig
    incoming: bool
    fresh: bool  #: start although the ledger says it has moved away

    @classmethod
    def from_json(cls, text: str) -> Spec:
        raw = json.loads(text)
        return cls(
            Path(raw["host"]),
            MachineConfig.from_json(json.dumps(raw["machine"])),
            raw["incoming"],
            raw["fresh"],
        )


def check_ledger(ledger: Ledger, machine: str, *, incoming: bool, fresh: bool) -> None:
    """May this machine be started here, by what the ledger says?

    :raises UsageError: if it is in doubt, or was moved away and nobody said `--fresh`.
    """
    verdict = ledger.verdict()
    last = decisive(ledger.records)
    peer = last.peer if last else ""
    if verdict is Verdict.IN_DOUBT:
        raise UsageError(
            f"{machine} is in doubt: COMMIT was sent to {peer}, which has not answered",
            phase=Phase.RECOVER,
            remedy=f"run `ferry recover {machine}`, or `ferry resolve {machine}` after fencing that host",
        )
    if verdict is Verdict.RELEASED and not incoming and not fresh:
        raise UsageError(
            f"{machine} was moved to {peer} and may run there",
            remedy="start it with --fresh if that one is gone for good",
        )


class MachineProcess:
    """Everything of one machine that has to be taken down again, in the order it was built."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.host = hostconfig.load(spec.host)
        self.directory = self.host.machine_directory(spec.machine.name)
        qemu = spec.machine.qemu
        self.private_bus: PrivateBus | AdoptedBus = (
            AdoptedBus(self.directory / "bus", qemu.bus)
            if qemu and qemu.qmp
            else PrivateBus(self.directory / "bus")
        )
        self.bus: Bus | None = None
        self.supervisor: Supervisor | None = None
        self.roster: Roster | None = None
        self.ledger: Ledger | None = None
        self.memory: GuestMemory | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def build(self) -> Supervisor:
        spec, machine = self.spec, self.spec.machine
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ledger = Ledger(spec.host, machine.name)
        check_ledger(self.ledger, machine.name, incoming=spec.incoming, fresh=spec.fresh)
        for stale in self.directory.glob("d*.sock"):
            stale.unlink(missing_ok=True)
        adopted = machine.qemu is not None and bool(machine.qemu.qmp)
        if adopted:
            self.memory = GuestMemory()  # QEMU has its own
        else:
            regions = [RegionSpec(GuestAddress(r.gpa), r.size) for r in machine.regions]
            self.memory = GuestMemory.create(regions, machine.name)
        await self.private_bus.start()
        self.bus = await Bus.connect(self.private_bus.address)
        self.roster = Roster(machine, self.host, self._died)
        await self.roster.start(self.bus, self.private_bus.address, self.memory, incoming=spec.incoming)
        machine = self.roster.machine
        if adopted:
            machine = await self._measured(self.bus, machine)
        self.supervisor = Supervisor(
            machine,
            self.roster,
            self.memory,
            self.ledger,
            changed=self._changed,
            watch=self._watch,
            ping=self._ping,
        )
        await self._serve(self.bus, self.supervisor)
        self._keeper = asyncio.create_task(self._keep_bus(self.roster, self.supervisor))
        if not spec.incoming:
            if self.ledger.verdict() is Verdict.RELEASED:
                self.ledger.write(Entry.RESUMED, "fresh", self.ledger.next_epoch(), detail="started afresh")
            await self.supervisor.start()
        return self.supervisor

    async def _measured(self, bus: Bus, machine: MachineConfig) -> MachineConfig:
        """With the size of the memory that an adopted QEMU has."""
        assert self.roster is not None and self.roster.vcpu is not None
        client = QemuClient(bus, self.roster.vcpu.client.unique_name, VCPU_ID)
        facts = await client.facts(phase=Phase.SETUP)
        return replace(machine, regions=[RegionConfig(0, int(facts["ram"]))])

    async def _serve(self, bus: Bus, supervisor: Supervisor) -> None:
        bus.export(PATH, supervisor_interface(SupervisorFace(supervisor)))
        await bus.request_name(NAME, queue=False)

    async def _keep_bus(self, roster: Roster, supervisor: Supervisor) -> None:
        """A bus that dies is brought back at the same path; the participants find it, and so does whoever wants something.

        No coordinator outlives it: what was asked of us may have been lost, so the machine's state decides, as when one dies.
        """
        while True:
            status = await self.private_bus.wait_died()
            log.error("event=bus-died machine=%s status=%s", self.spec.machine.name, status)
            try:
                await self.private_bus.restart()
                self.bus = await Bus.connect(self.private_bus.address)
                await self._serve(self.bus, supervisor)
                await roster.find(self.bus)
            except FerryError as error:  # a participant may be dead as well: that is told by its own death
                log.error("event=bus-not-whole machine=%s error=%s", self.spec.machine.name, error)
                await asyncio.sleep(BUS_AGAIN_SECONDS)
            supervisor.bus_was_lost()

    def _changed(self, state: str, detail: str) -> None:
        if self.bus is not None and not self.bus.closed.is_set():
            self.bus.emit(PATH, "org.vmferry.Supervisor1", "Changed", "ss", [state, detail])

    def _watch(self, name: str, gone: Callable[[], None]) -> Callable[[], None]:
        assert self.bus is not None
        return self.bus.watch_name(name, gone)

    async def _ping(self, name: str, seconds: float) -> None:
        assert self.bus is not None
        await self.bus.call(name, "/", "org.freedesktop.DBus.Peer", "Ping", timeout=seconds)

    def _died(self, child: Child | Adopted) -> None:
        if self.supervisor is not None:
            self.supervisor.participant_died(child)

    async def tear_down(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self.roster is not None:
            await self.roster.stop_all()
        if self.bus is not None:
            await self.bus.close()
        await self.private_bus.stop()
        for leftover in [*self.directory.glob("*.sock"), self.directory / "platform.json"]:
            leftover.unlink(missing_ok=True)
        if self.memory is not None:
            self.memory.close()
        if self.ledger is not None:
            self.ledger.close()


async def supervise(spec: Spec, ready_fd: int) -> int:
    """Run one machine to its end. Answers with the exit code."""
    loop = asyncio.get_running_loop()
    process = MachineProcess(spec)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        try:
            supervisor = await process.build()
        except FerryError as error:
            log.error("event=start-failed error=%s", error)
            _tell(
                ready_fd, {"error": error.as_reason().to_wire(), "code": error.code, "exit": error.exit_code}
            )
            return error.exit_code
        gc.freeze()  # no collection walks what is there by now, least of all while the machine stands still
        _tell(ready_fd, {"bus": process.private_bus.address, "pid": os.getpid()})
        waits = [asyncio.create_task(supervisor.ended.wait()), asyncio.create_task(stop.wait())]
        if spec.incoming:
            await asyncio.wait(waits, timeout=UNCLAIMED_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if supervisor.state is MachineState.STARTING:
                log.warning("event=unclaimed machine=%s", spec.machine.name)
                stop.set()
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if stop.is_set() and not supervisor.ended.is_set():
            with contextlib.suppress(FerryError):
                await supervisor.quit(force=True)
        return 0
    finally:
        await process.tear_down()


def _tell(fd: int, what: dict[str, object]) -> None:
    try:
        os.write(fd, json.dumps(what).encode() + b"\n")
        os.close(fd)
    except OSError as error:  # the daemon went away while we started; the machine does not need it
        log.warning("event=ready-not-heard error=%s", error)
