"""The source's coordinator: one migration from the manifest to RUNNING, or back.

It may die at any moment: the supervisor sees it go and, with no COMMIT in the ledger, resumes the machine. Every failure before
COMMIT takes the road of `_give_up`; after COMMIT nothing resumes by itself (doubt.py). What moves is in transfer.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

from migrate import __version__
from migrate.bus import Bus
from migrate.coordinator import disks, doubt, preflight, qemu_out
from migrate.coordinator.convergence import Convergence
from migrate.coordinator.dialling import Dialler
from migrate.coordinator.hold import Hold
from migrate.coordinator.kept import Kept
from migrate.coordinator.limits import OnStall, RateLimit
from migrate.coordinator.link import Link, PeerRejected
from migrate.coordinator.outcome import Downtime, Emit, Outcome, slowest, wire_reasons
from migrate.coordinator.pages_out import PageSender, coarse_extents
from migrate.coordinator.participants import Participants
from migrate.coordinator.qemu_out import QemuTransfer
from migrate.coordinator.spec import Agreed, Committed, Spec
from migrate.coordinator.transfer import READY_SECONDS, PageTransfer, Transfer
from migrate.errors import (
    CancelledByUser,
    FerryError,
    GuestEnded,
    IncompatibleError,
    InDoubtError,
    NotConvergingError,
    Phase,
    Reason,
    RemoteProtocolError,
    TransportError,
    UsageError,
)
from migrate.machine.states import REMEDIES, MachineState
from migrate.memory import CompareTracker, DirtyBitmap, GuestMemory
from migrate.protocol import messages as m
from migrate.protocol.states import Did, Role
from migrate.qemu.facts import Facts
from migrate.qemu.monitor import Qemu

log = logging.getLogger(__name__)

#: Deadlines of answers, s. The destination starts every device process before it answers a manifest.
ACCEPT_SECONDS = 120.0
JOIN_SECONDS = 30.0
#: The destination's participants may be slow to start; a dead peer is noticed sooner, by its pings.
RUNNING_SECONDS = 60.0


class SourceMigration:
    """Run it once. `cancel` may be called at any time and does nothing after COMMIT."""

    def __init__(self, spec: Spec, emit: Emit, hold: Hold) -> None:
        """:raises UsageError: for a destination that is none."""
        self.spec = spec
        self.emit = emit
        self.hold = hold
        self.outcome = Outcome(spec.job, spec.machine, spec.to)
        self.policy = Convergence(spec.downtime_ms, OnStall(spec.on_stall))
        self.limit = RateLimit(spec.bandwidth)
        self._dialler = Dialler(spec.to, spec.credentials, spec.job)
        self._phase = Phase.PREFLIGHT
        self._parts: Participants | None = None
        self._link: Link | None = None
        self._blobs: dict[str, bytes] = {}
        self._kept = Kept(spec.keep, emit)
        self._begun = False
        self._committing = False
        self._epoch = 0
        self._heard_at = 0  #: monotonic ns of RUNNING: the end of the downtime
        self._task: asyncio.Task[Any] | None = None
        self._guest_ended: GuestEnded | None = None
        self._qemu: Qemu | None = None
        self._facts: Facts | None = None

    def cancel(self) -> None:
        if self._task is not None and not self._committing:
            self._task.cancel()

    def _machine_changed(self, state: str, detail: str) -> None:
        """The supervisor says that there is nothing to move any more."""
        if state in ("ended", "failed") and not self._committing and self._guest_ended is None:
            name, _, rest = detail.partition(": ")
            known = self._parts is not None and name in self._parts.by_id
            self._guest_ended = GuestEnded(
                rest if known else detail,
                phase=self._phase,
                device=name if known else None,
                remedy="there is nothing left to move here"
                if state == "ended"
                else REMEDIES[MachineState.FAILED],
            )
            self.cancel()

    def change(self, *, downtime_ms: float | None = None, bandwidth: float | None = None) -> None:
        """Other limits, from now on; refused by nobody, for what is past is past."""
        if downtime_ms is not None:
            self.policy.set_limit(downtime_ms)
        if bandwidth is not None:
            self.limit.set(bandwidth)
        self.emit({"event": "limits", "downtime_ms": self.policy.limit_ms, "bandwidth": self.limit.rate})

    # -- the whole way -----------------------------------------------------------------------------------------------------

    async def run(self) -> Outcome:
        """The outcome; never raises for what goes wrong with a migration."""
        self._task = asyncio.current_task()
        assert self._task is not None
        async with AsyncExitStack() as stack:
            try:
                try:
                    await self._migrate(stack)
                except asyncio.CancelledError:
                    self._task.uncancel()
                    if self._guest_ended is not None:
                        raise self._guest_ended from None
                    raise CancelledByUser(
                        "cancelled by the user", phase=self._phase, remedy="the machine runs on here"
                    ) from None
            except FerryError as error:
                self._task = None  # a second word to cancel changes nothing: it is being taken back
                await _to_its_end(self._give_up(self._guest_ended or error))
        self._kept.blobs(self._blobs)
        return self.outcome

    async def _migrate(self, stack: AsyncExitStack) -> None:
        spec = self.spec
        self._enter(Phase.PREFLIGHT)
        bus = await Bus.connect(spec.bus)
        stack.push_async_callback(bus.close)
        self._parts = parts = await Participants.find(bus)
        await parts.supervisor.on_changed(self._machine_changed)
        against: list[Reason] = []
        if parts.qemu is not None:
            self._qemu = Qemu(parts.qemu)
            self._facts, against = await qemu_out.inspect(self._qemu, parts)
        preflight.check_source(parts, against)
        if spec.verify and not parts.description["mapped"]:
            raise UsageError(
                "--verify needs memory that ferry gave QEMU, and this one was adopted", phase=Phase.PREFLIGHT,
                remedy="leave it out; QEMU's own migration is digested from the stop on",
            )  # fmt: skip
        tokens = disks.Tokens()
        stack.callback(tokens.remove)
        tokens.write(parts)
        self._epoch = parts.description["next_epoch"]
        if not spec.check_only:
            self._epoch = await parts.supervisor.begin_outgoing(spec.job, spec.to)
            self._begun = True
        self._link = link = Link(await self._dialler.control(), Role.SOURCE)
        stack.push_async_callback(link.close)
        agreed = await self._offer(parts, link, tokens)
        if spec.check_only:
            await self._say(m.Bye())
            self._finish("checked", "source", 0)
            return
        transfer = await self._start(stack, parts, link, agreed)
        await self._in_time(transfer.precopy())
        await self._switch_over(transfer, agreed)

    async def _offer(self, parts: Participants, link: Link, tokens: disks.Tokens) -> Agreed:
        """HELLO and the manifest; every reason against it comes back at once."""
        spec = self.spec
        await link.send(
            m.Hello((m.PROTOCOL_VERSION,), f"vmferry {__version__}", spec.host_name, spec.incarnation)
        )
        hello = await link.expect(m.Hello, timeout=ACCEPT_SECONDS)
        preflight.check_hello(hello)
        await link.send(
            preflight.manifest(parts, spec.job, self._epoch, tokens.by_disk, check_only=spec.check_only)
        )
        answer = await link.receive(timeout=ACCEPT_SECONDS)
        if isinstance(answer, m.Refuse):
            raise IncompatibleError(
                answer.reasons or [Reason(None, str(Phase.PREFLIGHT), "refused", "see its log")]
            )
        if not isinstance(answer, m.Accept):
            raise RemoteProtocolError(f"{answer.name} answers no manifest", phase=Phase.PREFLIGHT)
        versions = preflight.check_accept(parts, answer)
        most = answer.max_connections
        return Agreed(versions, answer.token, min(spec.connections, most), hello.incarnation, most)

    async def _start(
        self, stack: AsyncExitStack, parts: Participants, link: Link, agreed: Agreed
    ) -> Transfer:
        """Page channels, trackers, streams; and what the first round has to send."""
        self._enter(Phase.PRECOPY)
        await parts.supervisor.peer_is(self.spec.job, agreed.incarnation)
        memory = await parts.map_memory()
        stack.callback(memory.close)
        self.outcome.ram_bytes = sum(region["size"] for region in parts.description["regions"])
        if self._qemu is not None and self._facts is not None:
            return await self._start_qemu(stack, parts, link, memory, agreed, self._qemu, self._facts)
        await link.send(m.Start(agreed.connections, coarse_extents(memory)))
        channels = await self._dialler.pages(agreed.connections, agreed.token, link)
        compare = self._compare(parts, memory)
        sender = PageSender(memory, channels, compare, self.limit)
        stack.push_async_callback(asyncio.to_thread, sender.close)
        await link.expect(m.Started, timeout=JOIN_SECONDS)
        # Tracking starts before anything is read: a page written from now on is sent again.
        await parts.start_tracking()
        await parts.start_streams()
        dirty = DirtyBitmap.from_runs(memory.data_extents(), memory.page_count)
        return PageTransfer(
            parts,
            link,
            memory,
            agreed.versions,
            self.policy,
            self.outcome,
            self.emit,
            self.hold,
            self._kept,
            sender,
            dirty,
        )

    async def _start_qemu(
        self,
        stack: AsyncExitStack,
        parts: Participants,
        link: Link,
        memory: GuestMemory,
        agreed: Agreed,
        qemu: Qemu,
        facts: Facts,
    ) -> Transfer:
        await qemu.watch()
        stack.callback(qemu.close)
        multifd = qemu_out.multifd_of(agreed.connections, agreed.most)
        count = multifd + 1 if agreed.connections else 0
        await link.send(m.Start(count, ()))
        transfer = QemuTransfer(
            parts, link, memory, agreed.versions, self.policy, self.outcome, self.emit, self.hold,
            self._kept, qemu, facts, self.limit, multifd,
        )  # fmt: skip
        transfer.open(stack, await self._dialler.pages(count, agreed.token, link))
        await link.expect(m.Started, timeout=JOIN_SECONDS)
        await parts.start_streams()
        return transfer

    def _compare(self, parts: Participants, memory: GuestMemory) -> CompareTracker | None:
        """The tracker for participants that have none, with a warning of what it costs."""
        if not (untracked := parts.needs_compare()):
            return None
        compare = CompareTracker()
        compare.attach(memory)
        compare.start()
        self.emit(
            {
                "event": "warning",
                "warning": f"{', '.join(untracked)}: tracked by comparing all of memory, the last time while stopped",
                "cost_bytes": memory.size,
            }
        )
        return compare

    async def _in_time(self, precopy: Coroutine[Any, Any, None]) -> None:
        """:raises NotConvergingError: when pre-copy takes longer than `timeout_seconds`."""
        seconds = self.spec.timeout_seconds
        try:
            async with asyncio.timeout(seconds or None):
                await precopy
        except TimeoutError:
            raise NotConvergingError(
                f"pre-copy did not end within the {seconds:g} s that were given",
                phase=Phase.PRECOPY,
                remedy="raise --timeout, --downtime or --bandwidth, or use --on-stall extend-downtime",
            ) from None

    # -- the stop ----------------------------------------------------------------------------------------------------------

    async def _switch_over(self, transfer: Transfer, agreed: Agreed) -> None:
        parts, link = transfer.parts, transfer.link
        self._enter(Phase.STOP)
        stopping = await parts.supervisor.quiesce(self.spec.job)
        began = await transfer.stopped_since(stopping["began_ns"])
        link.check()
        link.conversation.did(Did.QUIESCED)
        quiesced = time.monotonic_ns()
        await link.during(self.hold.at("quiesced"))
        self._enter(Phase.SAVE)
        number = len(self.outcome.rounds) + 1
        (blobs, saves), sent = await link.during(transfer.last_pass(number))
        self._blobs = blobs
        saved = time.monotonic_ns()
        await link.send(preflight.stopped(number, sent, blobs))
        sent_at = time.monotonic_ns()
        self._enter(Phase.LOAD)
        await self.hold.at("stopped")
        ready = await link.expect(m.Ready, timeout=READY_SECONDS)
        await link.during(self.hold.at("ready"))
        verified_ns = await transfer.verify() if self.spec.verify else 0
        await transfer.before_commit()
        committed = await self._commit(parts, link)
        await self.hold.at("committed")
        running = await self._hand_over(parts, link, agreed, committed, paused=stopping["paused"])
        if running is None:
            return
        total = (self._heard_at - began - verified_ns) / 1e6
        downtime = Downtime(
            stop=(quiesced - began) / 1e6,
            pages=max(0, saved - quiesced - saves.total_ns) / 1e6,
            save=saves.total_ns / 1e6,
            send=(sent_at - saved) / 1e6,
            load=ready.total_ns / 1e6,
            commit=(committed.took_ns + running.commit_ns) / 1e6,
            resume=running.resume_ns / 1e6,
        )
        downtime.settle(total)
        self.outcome.downtime_ms, self.outcome.downtime = total, downtime
        self.outcome.slowest_device = slowest(stopping["devices"], saves.devices, ready.load_ns)

    # -- commit ------------------------------------------------------------------------------------------------------------

    async def _commit(self, parts: Participants, link: Link) -> Committed:
        """COMMIT into the ledger. From here on there is no way back but the peer's word or an operator's."""
        self._enter(Phase.COMMIT)
        self._committing = True
        start = time.monotonic_ns()
        try:
            stopped_ns = await parts.supervisor.commit(self.spec.job, self._epoch)
        except FerryError:
            # Was it written? Only the supervisor knows; while it cannot be asked, nothing is certain.
            now = await parts.supervisor.describe()
            if now["state"] != "in-doubt":
                self._committing = False
                raise
            stopped_ns = int(now["stopped_ns"])
        at = time.monotonic_ns()
        return Committed(stopped_ns, at, at - start)

    async def _hand_over(
        self, parts: Participants, link: Link, agreed: Agreed, committed: Committed, *, paused: bool
    ) -> m.Running | None:
        """Send COMMIT and hear RUNNING; else ask until somebody knows. None when RUNNING was not heard directly."""
        spec = self.spec
        self._enter(Phase.RESUME)
        try:
            link.check()  # the peer's REJECT may have crossed it
            link.conversation.did(Did.WROTE_COMMIT)
            stopped_ns = committed.stopped_ns + time.monotonic_ns() - committed.at
            await link.send(m.Commit(spec.job, self._epoch, stopped_ns, paused))
            answer = await link.receive(timeout=RUNNING_SECONDS)
        except FerryError as error:
            error.phase = str(Phase.COMMIT)
            link.lost()
            await self._doubt(parts, agreed, error)
            return None
        if isinstance(answer, m.Aborted):
            await self._peer_said(parts, "aborted", list(answer.reasons))
            return None
        assert isinstance(answer, m.Running)
        self._heard_at = time.monotonic_ns()
        await self._peer_said(parts, "running", [])
        return answer

    async def _doubt(self, parts: Participants, agreed: Agreed, error: FerryError) -> None:
        """COMMIT is written and the peer is silent: ask again, and say so."""
        spec = self.spec
        self.emit({"event": "in_doubt", "reason": error.reason})
        question = doubt.Question(spec.machine, spec.job, self._epoch, agreed.incarnation)
        try:
            answer = await doubt.ask_until(
                self._dialler, question, spec.host_name, spec.incarnation, spec.doubt_seconds, self.emit
            )
        except InDoubtError as silent:
            self.outcome.reasons = [error.as_reason(), silent.as_reason()]
            self._finish("in_doubt", "neither", silent.exit_code)
            return
        what = "the peer gave up" if isinstance(error, PeerRejected) else "contact was lost"
        reason = Reason(
            error.device,
            str(Phase.COMMIT),
            f"{what} after COMMIT ({error.reason}); asked, it said: {answer}",
            error.remedy if answer == "aborted" else "",
        )
        await self._peer_said(parts, answer, [reason])

    async def _peer_said(self, parts: Participants, answer: str, reasons: list[Reason]) -> None:
        """The doubt has an end, and the outcome is known whatever the supervisor can make of it."""
        self.outcome.reasons = reasons
        if answer == "running":
            self._finish("completed", "destination", 0)
        else:
            self._finish("aborted", "source", 1)
        try:
            await parts.supervisor.peer_said(self.spec.job, self._epoch, answer, wire_reasons(reasons))
        except FerryError as failure:
            self.outcome.reasons.append(failure.as_reason())
            if answer != "running":
                self.outcome.running_on = "neither"

    # -- ending ------------------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self.emit({"event": "phase", "phase": str(phase)})

    def _finish(self, outcome: str, running_on: str, exit_code: int) -> None:
        self.outcome.outcome, self.outcome.running_on, self.outcome.exit_code = outcome, running_on, exit_code

    async def _say(self, message: m.Message) -> None:
        """Best effort: the peer notices our going away as well."""
        try:
            if self._link is not None and not self._link.broken:
                await self._link.send(message)
        except FerryError:
            pass  # it is gone, or this may not be said any more

    async def _give_up(self, error: FerryError) -> None:
        """Before COMMIT: tell the peer, and let the machine go on here."""
        if isinstance(error, TransportError):
            error.phase = str(self._phase)  # a channel does not know what it was used for
        reasons = error.reasons()
        self.outcome.reasons = reasons
        if self._committing:
            self.outcome.reasons.append(
                InDoubtError(
                    "whether COMMIT was written is not known",
                    phase=Phase.COMMIT,
                    remedy=f"run `ferry recover {self.spec.machine}`",
                ).as_reason()
            )
            self._finish("in_doubt", "neither", InDoubtError.exit_code)
            return
        if isinstance(error, GuestEnded):
            self._finish("guest-ended", "neither", error.exit_code)
        else:
            refused = isinstance(error, IncompatibleError)
            # Wrong words are the user's only before anything has begun.
            code = 1 if self._begun and error.exit_code == UsageError.exit_code else error.exit_code
            self._finish("refused" if refused else "aborted", "source", code)
        await self._say(m.Abort(tuple(reasons)))
        if self._begun and self._parts is not None and not isinstance(error, GuestEnded):
            try:
                await self._parts.supervisor.abort_outgoing(self.spec.job, wire_reasons(reasons))
                await self._see_that_it_runs(self._parts)
            except FerryError as failure:
                # The machine itself failed: named beside the reason, never instead of it.
                self.outcome.reasons.append(failure.as_reason())
                self.outcome.running_on = "neither"

    async def _see_that_it_runs(self, parts: Participants) -> None:
        """The abort came to an end; did the machine? A supervisor that could not resume it says why."""
        now = await parts.supervisor.describe()
        if now["state"] not in ("running", parts.description["state"]):
            device, why = parts.blame(now["detail"])
            why = f"the machine is {now['state']}: {why}"
            self.outcome.reasons.append(
                Reason(device, str(Phase.STOP), why, "`ferry resume` it, or see its logs")
            )
            self.outcome.running_on = "neither"


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await it whole, whoever cancels us meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
    task.result()
