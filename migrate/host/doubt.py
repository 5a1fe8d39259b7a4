"""Machines in doubt: whenever one is, and nobody asks its peer, a coordinator is started that does.

In doubt is a machine whose ledger ends with COMMIT, with a supervisor that holds it stopped, or without one (its host was
started again). `look` may be called at any time and any number of times.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from migrate.errors import FerryError, LedgerError, Phase, UsageError
from migrate.host.jobs import Job, Jobs, Kind
from migrate.host.machines import Machines
from migrate.machine import ledger
from migrate.machine.ledger import Entry, Ledger, Record
from migrate.machine.states import MachineState

log = logging.getLogger(__name__)

#: A recovery that ended and left the doubt (the peer's ledger is another; the coordinator crashed) is tried again after
#: this long, s, doubling.
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0  # fmt: skip
_S: Final = MachineState


class Doubt:
    def __init__(
        self,
        machines: Machines,
        jobs: Jobs,
        spec: Callable[[], dict[str, Any]],
        *,
        on_resolved: Callable[[str], None] = lambda _name: None,
    ) -> None:
        """
        :param spec: what every coordinator of this host is told.
        :param on_resolved: told the name of a machine without a supervisor that was resolved.
        """
        self._on_resolved = on_resolved
        self._machines, self._jobs, self._spec = machines, jobs, spec
        self._pauses: dict[str, float] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._looking = False

    def look_everywhere(self) -> None:
        """At the daemon's start, when machines and jobs have been found again; `look` does nothing before."""
        self._looking = True
        for name in ledger.machines(self._machines.host.directory):
            self.look(name)

    def look(self, name: str) -> None:
        """Something about a machine has changed: start asking, if it is in doubt and nobody does."""
        if not self._looking or name in self._timers or self._jobs.active_of(name) is not None:
            return
        try:
            if self.commit_of(name) is not None:
                self.ask(name)
            else:
                self._pauses.pop(name, None)
        except FerryError as error:
            log.error("event=recover-not-started machine=%s error=%s", name, error)

    def ended(self, job: Job) -> None:
        """A job ended; one that leaves a doubt which was asked about is tried again later."""
        if job.kind is not Kind.RECOVER or not self._looking:
            self.look(job.machine)
            return
        pause = self._pauses.get(job.machine, FIRST_PAUSE)
        self._pauses[job.machine] = min(pause * 2, LONGEST_PAUSE)

        def again() -> None:
            self._timers.pop(job.machine, None)
            self.look(job.machine)

        if job.machine not in self._timers:
            self._timers[job.machine] = asyncio.get_running_loop().call_later(pause, again)

    def without_supervisor(self) -> list[dict[str, Any]]:
        """What `ferry list` says of machines that are in doubt and have no supervisor any more."""
        found = [self.of_ledger(name) for name in ledger.machines(self._machines.host.directory)]
        return [machine for machine in found if machine is not None]

    def of_ledger(self, name: str) -> dict[str, Any] | None:
        """The same of one machine; None where it has a supervisor, or is not in doubt."""
        if self._machines.get(name) is not None:
            return None
        try:
            commit = self.commit_of(name)
        except LedgerError as error:
            return {"name": name, "state": "unknown", "detail": str(error), "pid": 0}
        if commit is None:
            return None
        detail = f"COMMIT was sent to {commit.peer}; it has not answered. The machine's memory is gone here"
        return {
            "name": name, "state": str(_S.IN_DOUBT), "detail": detail, "pid": 0,
            "job": commit.job, "epoch": commit.epoch, "peer": commit.peer,
        }  # fmt: skip

    def commit_of(self, name: str) -> Record | None:
        """The COMMIT that a machine is in doubt about; None where it is not.

        :raises LedgerError: if its ledger cannot be read.
        """
        machine = self._machines.get(name)
        if machine is not None and machine.state != _S.IN_DOUBT:
            return None
        found = ledger.decisive(ledger.read(self._machines.host.directory, name))
        return found if found is not None and found.entry is Entry.COMMIT else None

    def ask(self, name: str) -> Job:
        """Start a coordinator that asks for ever, or find the one that does.

        :raises UsageError: if the machine is not in doubt, or another job of it goes on.
        """
        active = self._jobs.active_of(name)
        if active is not None and active.kind is Kind.RECOVER:
            return active
        commit = self.commit_of(name)
        if commit is None:
            machine = self._machines.get(name)
            state = f"it is {machine.state}" if machine is not None else "nothing is known of it here"
            raise UsageError(
                f"{name} is not in doubt: {state}", phase=Phase.RECOVER, remedy="see `ferry list`"
            )
        records = ledger.read(self._machines.host.directory, name)
        peers = [r.detail for r in records if r.entry is Entry.PEER and r.job == commit.job]
        machine = self._machines.get(name)
        log.info("event=recover machine=%s job=%s peer=%s", name, commit.job, commit.peer)
        spec = {
            **self._spec(),
            "machine": name,
            "bus": machine.address if machine is not None else "",
            "to": commit.peer,
            "epoch": commit.epoch,
            "peer_incarnation": peers[-1] if peers else "",
            "host": str(self._machines.host.directory),
            "doubt_seconds": 0,
        }
        return self._jobs.start(Kind.RECOVER, name, commit.peer, spec, of=commit.job)

    async def resolve(self, name: str, keep: str) -> str:
        """The operator's word, after fencing the other host; answers with the machine's state.

        :raises UsageError: if there is no doubt to resolve.
        """
        if keep not in ("source", "destination"):
            raise UsageError(f"{keep!r} is no side of a migration", remedy="keep source or destination")
        machine = self._machines.get(name)
        if machine is not None:
            state = await machine.supervisor.resolve(keep)
            await self._stop_asking(name)
            if state == _S.ENDED:
                await self._machines.settle(name, 30.0)
            return state
        commit = self.commit_of(name)
        if commit is None:
            raise UsageError(f"{name} is not in doubt here", phase=Phase.RECOVER, remedy="see `ferry list`")
        await self._stop_asking(name)
        entry = Entry.RESUMED if keep == "source" else Entry.RELEASED
        await asyncio.to_thread(self._write, name, commit, entry, f"the operator keeps the {keep}")
        self._on_resolved(name)
        return str(_S.ENDED)

    def _write(self, name: str, commit: Record, entry: Entry, why: str) -> None:
        written = Ledger(self._machines.host.directory, name)
        try:
            written.write(entry, commit.job, commit.epoch, peer=commit.peer, detail=why)
        finally:
            written.close()

    async def _stop_asking(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
        active = self._jobs.active_of(name)
        if active is not None and active.kind is Kind.RECOVER:
            await self._jobs.end(active)

    def stop(self) -> None:
        self._looking = False
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()


def answer_of_ledger(host: Machines, machine: str, job: str, epoch: int) -> str:
    """What a host says of a job of which no supervisor is left: `running`, `committed`, or `aborted`, which is written first.

    `unknown` where the ledger has never heard of the job: nobody asks before its INCOMING was synced, so some of it is lost.

    :raises LedgerError: if its supervisor holds the ledger after all, or it cannot be written.
    """
    if not ledger.heard_of(ledger.read(host.host.directory, machine), job, epoch):
        return "unknown"
    written = Ledger(host.host.directory, machine)
    try:
        if written.said(Entry.COMMITTED, job, epoch):
            # Whoever sent it on had it running.
            went_on = any(r.entry is Entry.OUTGOING and r.epoch > epoch for r in written.records)
            return "running" if went_on else "committed"
        if not written.said(Entry.ABORTED, job, epoch):
            written.write(Entry.ABORTED, job, epoch, detail="asked by a source in doubt")
        return "aborted"
    finally:
        written.close()
