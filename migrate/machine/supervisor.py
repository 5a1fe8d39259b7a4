"""The supervisor of one machine: the only one that may stop, resume or destroy it, and the only writer of its ledger.

It has no network. A coordinator (one process a migration) asks it over the machine's private bus; when a coordinator dies the
bus says so, and what happens then is decided here, by the machine's state (`_coordinator_gone`). The process around it, with its
bus and its children, is process.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable

from migrate.errors import FerryError, LedgerError, LocalProtocolError, Phase, Reason, UsageError
from migrate.machine.children import Adopted, Child
from migrate.machine.config import VCPU_ID, MachineConfig
from migrate.machine.ledger import Entry, Ledger, heard_of
from migrate.machine.roster import Roster
from migrate.machine.states import HAS_RUN, MACHINE, REMEDIES, Job, MachineState
from migrate.machine.vigil import Ping, logged, silent
from migrate.memory import GuestMemory

log = logging.getLogger(__name__)

#: How long a READY copy without a connection is kept, s: an operator needs time. What ends it writes ABORTED first.
HOLD_SECONDS = 86400.0
RETRY_SECONDS = 1.0  #: how often a committed machine that does not start is tried again

POWERED_OFF = "the guest powered off"  #: what `Changed` says then

S = MachineState


class Supervisor:
    """One machine. Every public coroutine runs under one lock: what is asked is done whole before the next is looked at."""

    def __init__(
        self,
        machine: MachineConfig,
        roster: Roster,
        memory: GuestMemory,
        ledger: Ledger,
        *,
        changed: Callable[[str, str], None],
        watch: Callable[[str, Callable[[], None]], Callable[[], None]],
        ping: Ping,
    ) -> None:
        """:param changed: told (state, detail). :param watch: calls back when a bus name vanishes. :param ping: see vigil.py."""
        self.machine = machine
        self.roster = roster
        self.memory = memory
        self.ledger = ledger
        self.state = S.STARTING
        self.detail = ""
        self.job: Job | None = None
        self.ended = asyncio.Event()
        self._changed = changed
        self._watch, self._ping = watch, ping
        self._unwatch: Callable[[], None] | None = None
        self._lock = asyncio.Lock()
        self._stopped_at: int | None = None  #: monotonic ns of the first participant's stop
        self._tasks: set[asyncio.Task[None]] = set()

    # -- the table ------------------------------------------------------------------------------------------------------

    def _enter(self, state: MachineState, detail: str = "") -> None:
        if state is not self.state and state not in MACHINE[self.state]:
            raise LocalProtocolError(
                f"the machine cannot go from {self.state} to {state}",
                phase=Phase.RUNNING,
                remedy="this is a defect of vmferry; report it with supervisor.log",
            )
        log.info(
            "event=state machine=%s from=%s to=%s detail=%s", self.machine.name, self.state, state, detail
        )
        self.state, self.detail = state, detail
        self._changed(str(state), detail)
        if state is S.ENDED:
            self.ended.set()

    def _require(self, *states: MachineState) -> None:
        if self.state not in states:
            raise UsageError(
                f"the machine {self.machine.name} is {self.state}"
                + (f" ({self.detail})" if self.detail else ""),
                phase=Phase.SETUP,
                remedy=REMEDIES.get(self.state, "wait until what goes on has ended; see `ferry list`"),
            )

    def _require_job(self, name: str, *states: MachineState) -> Job:
        if self.job is None or self.job.name != name:
            raise UsageError(f"job {name} is not this machine's, or not any more", remedy="see `ferry list`")
        self._require(*states)
        return self.job

    # -- an operator's words ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        async with self._lock:
            self._require(S.STARTING)
            if not (self.machine.qemu and self.machine.qemu.qmp):  # what is adopted runs
                await self.roster.resume(0)
            self._enter(S.RUNNING)

    async def pause(self) -> None:
        async with self._lock:
            self._require(S.RUNNING)
            self._stopped_at = time.monotonic_ns()
            try:
                await self.roster.quiesce()
            except FerryError as error:
                await self._resume_or_stop(str(error))
                raise
            self._enter(S.PAUSED)

    async def run(self) -> None:
        """Also where a participant hung until the machine was given up, and has come back since."""
        async with self._lock:
            self._require(S.PAUSED, *([] if self._dead() else [S.FAILED]))
            await self._resume_or_stop("")

    async def quit(self, *, force: bool) -> None:
        """End the machine. :raises UsageError: between COMMIT and its end, unless forced."""
        async with self._lock:
            if self.state in (S.IN_DOUBT, S.COMMITTED, S.READY, S.HELD) and not force:
                self._require()
            if self.state in (S.INCOMING, S.READY, S.HELD) and self.job is not None:
                self._write_aborted(self.job)
            self._enter(S.ENDED, "ended by the operator")

    # -- outgoing --------------------------------------------------------------------------------------------------------

    async def begin_outgoing(self, job: str, peer: str, coordinator: str) -> int:
        """:returns: the epoch of this attempt. :raises UsageError: if something else goes on."""
        async with self._lock:
            self._require(S.RUNNING, S.PAUSED)
            made = Job(job, self.ledger.next_epoch(), peer, coordinator, was_paused=self.state is S.PAUSED)
            self.ledger.write(Entry.OUTGOING, job, made.epoch, peer=peer)
            self.job = made
            self._follow(coordinator)
            self._enter(S.OUTGOING, f"to {peer}")
            if self.machine.qemu:  # it stops its guest by itself, before anybody asks for that here
                self._background(self._watch_over(made))
            return made.epoch

    async def peer_is(self, job: str, incarnation: str) -> None:
        async with self._lock:
            found = self._require_job(job, S.OUTGOING)
            self.ledger.write(Entry.PEER, job, found.epoch, peer=found.peer, detail=incarnation)

    async def quiesce(self, job: str) -> dict[str, object]:
        """Stop everything. When a participant fails, the machine is resumed before the error is raised."""
        async with self._lock:
            found = self._require_job(job, S.OUTGOING)
            if found.was_paused:
                self._enter(S.STOPPED)
                return {"began_ns": time.monotonic_ns(), "total_ns": 0, "devices": {}, "paused": True}
            began = self._stopped_at = time.monotonic_ns()
            try:
                times = await self.roster.quiesce()
            except FerryError:
                await self._end_outgoing("a participant did not stop")
                raise
            self._enter(S.STOPPED)
            if not self.machine.qemu:
                self._background(self._watch_over(found))
            return {"began_ns": began, "total_ns": times.total_ns, "devices": times.devices, "paused": False}

    async def abort_outgoing(self, job: str, reasons: str) -> None:
        async with self._lock:
            if self.job is None or self.job.name != job:
                return  # already over: an abort is never an error
            self._require_job(job, S.OUTGOING, S.STOPPED)
            await self._end_outgoing(reasons)

    async def commit(self, job: str, epoch: int) -> int:
        """COMMIT into the ledger; from now on the machine does not resume by itself. :returns: how long it has stood still, ns."""
        async with self._lock:
            found = self._require_job(job, S.STOPPED)
            if epoch != found.epoch:
                raise UsageError(f"epoch {epoch} is not this job's ({found.epoch})", phase=Phase.COMMIT)
            await self.roster.release_locks()  # the destination takes them; a failure here aborts
            self.ledger.write(Entry.COMMIT, job, epoch, peer=found.peer)
            self._enter(S.IN_DOUBT, f"COMMIT was sent to {found.peer}; it has not answered")
            return self.stopped_ns()

    async def peer_said(self, job: str, epoch: int, answer: str, reasons: str) -> None:
        """What the destination answered after COMMIT: `running` ends the machine here, `aborted` resumes it.

        :raises UsageError: for any other word, which changes nothing.
        """
        async with self._lock:
            found = self._require_job(job, S.IN_DOUBT)
            if epoch != found.epoch or answer not in ("running", "aborted"):
                raise UsageError(f"{answer!r} at epoch {epoch} ends no doubt", phase=Phase.RECOVER)
            if answer == "running":
                await self._release(found)
            else:
                await self._end_outgoing(reasons)

    async def _release(self, job: Job) -> None:
        self.ledger.write(Entry.RELEASED, job.name, job.epoch, peer=job.peer)
        await self.roster.end_migration("completed")
        self._enter(S.ENDED, f"runs at {job.peer}")

    async def _end_outgoing(self, why: str) -> None:
        """The machine goes on here: resume it if it was stopped by the job, and tell everybody.

        :raises LedgerError: after COMMIT, if the end of the doubt cannot be written: it goes on then.
        :raises FerryError: if a participant does not resume; the machine is then PAUSED, or FAILED.
        """
        job = self.job
        assert job is not None
        stopped = self._stopped_at is not None and not job.was_paused
        if self.state is S.IN_DOUBT:
            self.ledger.write(Entry.RESUMED, job.name, job.epoch, peer=job.peer, detail=why[:500])
        else:
            self._note(Entry.RESUMED, job, why)
        self._unfollow()
        self.job = None
        try:
            if stopped:
                await self._resume_or_stop(why)
        finally:
            await self.roster.end_migration("aborted")
        if job.was_paused:
            await self._halt(why[:500])  # out of STOP_COPY, where a participant is still there
        elif not stopped:
            await self._resume_or_stop(why)  # it runs; but some may be in PRE_COPY

    async def _resume_or_stop(self, why: str) -> None:
        """RUNNING; or else all stopped for sure, so that somebody can mend what is wrong and try again.

        :raises FerryError: what kept it from running.
        """
        try:
            await self._resume_here()
        except FerryError as error:
            self._stopped_at = self._stopped_at or time.monotonic_ns()
            await self._halt(f"{error}; so it could not be resumed: `ferry resume` tries again")
            raise
        self._enter(S.RUNNING, why[:500])

    async def _halt(self, why: str) -> None:
        try:
            await self.roster.halt()
        except FerryError as error:
            self._enter(S.FAILED, f"{why}; {error}")
            raise
        self._enter(S.PAUSED, why)

    async def _resume_here(self) -> None:
        if self._stopped_at is None:
            await self.roster.end_copying()
            return
        await self.roster.resume(self.stopped_ns())
        self._stopped_at = None

    def stopped_ns(self) -> int:
        """How long the machine has stood still, ns."""
        return 0 if self._stopped_at is None else time.monotonic_ns() - self._stopped_at

    # -- incoming --------------------------------------------------------------------------------------------------------

    async def begin_incoming(self, job: str, epoch: int, peer: str, coordinator: str) -> None:
        async with self._lock:
            self._require(S.STARTING)
            if self.ledger.highest(Entry.COMMITTED) >= max(epoch, 1):
                raise LedgerError(
                    f"this host has already committed an epoch as high as {epoch} of this machine",
                    phase=Phase.PREFLIGHT,
                    remedy="the source's ledger is older than this one: find out where the machine runs",
                )
            self.ledger.write(Entry.INCOMING, job, epoch, peer=peer)
            self.job = Job(job, epoch, peer, coordinator)
            self._follow(coordinator)
            self._enter(S.INCOMING, f"from {peer}")

    async def ready(self, job: str) -> None:
        async with self._lock:
            found = self._require_job(job, S.INCOMING)
            self.ledger.write(Entry.READY, job, found.epoch, peer=found.peer)
            self._enter(S.READY)

    async def commit_incoming(self, job: str, epoch: int, stopped_ns: int, *, paused: bool) -> dict[str, int]:
        """Take the machine over. Until COMMITTED is written a failure writes ABORTED; after it, only retry.

        :raises DeviceError: (ABORTED is then written and the machine ended) if a participant cannot enter RUNNING_P2P.
        """
        heard = time.monotonic_ns()
        async with self._lock:
            found = self._require_job(job, S.READY)
            if epoch != found.epoch:
                raise UsageError(f"epoch {epoch} is not this job's ({found.epoch})", phase=Phase.COMMIT)

            def still() -> int:
                return stopped_ns + time.monotonic_ns() - heard

            try:
                if not paused:
                    await self.roster.prepare(still())
                self.ledger.write(Entry.COMMITTED, job, epoch, peer=found.peer)
            except FerryError as error:
                await self.roster.take_back(error)
                # What answers too late begins to run all the same. Until nothing is left that could, the source is told nothing,
                # is in doubt, and stands still.
                await self.roster.stop_all()
                self._write_aborted(found, str(error))
                self._enter(S.ENDED, str(error))
                raise
            self._enter(S.COMMITTED)
            self._unfollow()
            committed = time.monotonic_ns()
            if paused:
                self._stopped_at = heard - stopped_ns
                self._enter(S.PAUSED)
            else:
                await self._start_committed(still)
            self.job = None
            self._background(self.roster.end_migration("completed"))
            return {"commit_ns": committed - heard, "resume_ns": time.monotonic_ns() - committed}

    async def _start_committed(self, still: Callable[[], int]) -> None:
        """After COMMITTED there is no way back: try until it runs, or a participant is dead."""
        while True:
            try:
                await self.roster.release(still())
            except FerryError as error:
                log.error("event=start-after-commit machine=%s error=%s", self.machine.name, error)
                if dead := self._dead():
                    self._enter(S.FAILED, str(dead.obituary(Phase.RESUME)))
                    raise
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self._enter(S.RUNNING)
                return

    def _dead(self) -> Child | Adopted | None:
        return next((child for child in self.roster.children.values() if not child.alive), None)

    async def abort_incoming(self, job: str, reasons: str) -> None:
        async with self._lock:
            if self.job is None or self.job.name != job:
                return
            found = self._require_job(job, S.INCOMING, S.READY, S.HELD)
            self._write_aborted(found, reasons)
            self._enter(S.ENDED, reasons[:500])

    async def ask(self, job: str, epoch: int) -> str:
        """A source in doubt asks. What has not committed writes ABORTED before it answers, and never commits that epoch."""
        async with self._lock:
            if self.ledger.said(Entry.COMMITTED, job, epoch):
                return "running" if self.state in HAS_RUN else "committed"
            if not heard_of(self.ledger.records, job, epoch):
                return "unknown"
            if not self.ledger.said(Entry.ABORTED, job, epoch):
                self.ledger.write(Entry.ABORTED, job, epoch, detail="asked by a source in doubt")
            if self.job is not None and self.job.name == job and self.state in (S.INCOMING, S.READY, S.HELD):
                self._enter(S.ENDED, "the source asked before anything was committed, and keeps the machine")
            return "aborted"

    async def resolve(self, keep: str) -> str:
        """The operator's word, after fencing the other host."""
        async with self._lock:
            if self.state is S.IN_DOUBT and self.job is not None:
                if keep == "source":
                    await self._end_outgoing("the operator keeps the source")
                else:
                    await self._release(self.job)
            elif self.state is S.HELD and self.job is not None:
                if keep == "destination":
                    job, since = self.job, time.monotonic_ns()
                    try:
                        await self.roster.prepare(0)
                        self.ledger.write(
                            Entry.COMMITTED, job.name, job.epoch, detail="the operator keeps the destination"
                        )
                    except FerryError:
                        await self.roster.take_back()
                        raise
                    self._enter(S.COMMITTED)
                    await self._start_committed(lambda: time.monotonic_ns() - since)
                    self.job = None
                    self._background(self.roster.end_migration("completed"))
                else:
                    self._write_aborted(self.job, "the operator keeps the source")
                    self._enter(S.ENDED, "the operator keeps the source")
            else:
                raise UsageError(
                    f"the machine {self.machine.name} is {self.state}, not in doubt",
                    phase=Phase.RECOVER,
                    remedy="there is nothing to resolve",
                )
            return str(self.state)

    def _write_aborted(self, job: Job, why: str = "") -> None:
        if not self.ledger.said(Entry.ABORTED, job.name, job.epoch):
            self._note(Entry.ABORTED, job, why)

    def _note(self, entry: Entry, job: Job, why: str) -> None:
        """What nobody waits for: a full disk keeps no guest still and no copy. What has ended without COMMITTED never runs."""
        try:
            self.ledger.write(entry, job.name, job.epoch, peer=job.peer, detail=why[:500])
        except LedgerError as error:
            log.error("event=not-written machine=%s entry=%s error=%s", self.machine.name, entry, error)

    # -- what happens by itself --------------------------------------------------------------------------------------------

    def _follow(self, coordinator: str) -> None:
        self._unwatch = self._watch(
            coordinator, lambda: self._background(self._coordinator_gone(coordinator))
        )

    def _unfollow(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def bus_was_lost(self) -> None:
        """The machine's bus died and is back: no coordinator is on it any more."""
        if self.job is not None:
            self._background(self._coordinator_gone(self.job.coordinator))

    async def _watch_over(self, job: Job) -> None:
        watched = {S.STOPPED, S.OUTGOING} if self.machine.qemu else {S.STOPPED}
        if await silent(job.coordinator, self._ping, lambda: self.job is job and self.state in watched):
            await self._coordinator_gone(job.coordinator, "does not answer")

    async def _coordinator_gone(self, coordinator: str, how: str = "died") -> None:
        async with self._lock:
            job = self.job
            if job is None or job.coordinator != coordinator:
                return
            what = f"the coordinator of the migration {how}"
            reason = Reason(None, str(Phase.STOP), what, "start the migration again")
            if self.state in (S.OUTGOING, S.STOPPED):
                await self._end_outgoing(json.dumps([reason.to_wire()]))
            elif self.state is S.INCOMING:
                self._write_aborted(job, "the connection was lost")
                self._enter(S.ENDED, "the connection was lost before READY")
            elif self.state is S.READY:
                self._enter(S.HELD, f"the connection to {job.peer} was lost after READY")
                self._background(self._hold(job))

    async def _hold(self, job: Job) -> None:
        await asyncio.sleep(HOLD_SECONDS)
        async with self._lock:
            if self.state is S.HELD and self.job is job:
                self._write_aborted(job, f"nobody asked for {HOLD_SECONDS:.0f} s")
                self._enter(S.ENDED, f"nobody asked for {HOLD_SECONDS:.0f} s")

    def participant_died(self, child: Child | Adopted) -> None:
        """A participant of this machine is gone: the machine's failure. Called by the process around us."""
        self._background(self._participant_died(child))

    async def _participant_died(self, child: Child | Adopted) -> None:
        if child.name == VCPU_ID and child.powered_off:
            await self._powered_off()
            return
        why = child.obituary(Phase.RUNNING)
        log.error("event=participant-died device=%s reason=%s", child.name, why)
        async with self._lock:
            if self.state in (S.ENDED, S.FAILED):
                return
            if self.state in (S.INCOMING, S.READY, S.HELD) and self.job is not None:
                self._write_aborted(self.job, str(why))
                self._enter(S.ENDED, str(why))
            elif self.state in (S.STARTING, S.IN_DOUBT):
                # In doubt: the peer may well run the machine, so a death here does not end the doubt.
                self.detail = str(why)
                self._changed(str(self.state), self.detail)
            else:
                if self.state in (S.OUTGOING, S.STOPPED) and self.job is not None:
                    self._note(Entry.RESUMED, self.job, str(why))
                    self._unfollow()
                    self.job = None
                self._enter(S.FAILED, str(why))

    async def _powered_off(self) -> None:
        """The guest switched the machine off: it ends, and with it the job, whatever it was doing."""
        async with self._lock:
            if self.state in (S.RUNNING, S.OUTGOING):
                if self.job is not None:
                    self._note(Entry.RESUMED, self.job, POWERED_OFF)
                    self._unfollow()
                self._enter(S.ENDED, POWERED_OFF)

    def _background(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
