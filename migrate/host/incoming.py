"""Machines that arrive: one coordinator's process a control connection, and what such a process may ask of this daemon.

The coordinator faces the network. It gets the connection's descriptors, never a handle on a running machine: what it wants
(a supervisor that waits for a machine, a word of the ledger) is checked here again before it is done.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from migrate.errors import FerryError, Phase, RemoteProtocolError, TransportError, UsageError
from migrate.host.doubt import answer_of_ledger
from migrate.host.jobs import COORDINATOR, END_SECONDS, Job, Jobs
from migrate.host.machines import Machine, Machines
from migrate.host.packets import Packets, close_all
from migrate.host.received import machine_of
from migrate.host.watched import Watched
from migrate.machine.states import MachineState
from migrate.transport.preamble import Kind, Preamble, encode

log = logging.getLogger(__name__)

#: Coordinators at one time. Whoever reaches the port can make us start one, before it has shown any certificate.
MAX_SESSIONS: Final = 16
#: Seconds that a coordinator may take to read what it is told.
TELL_SECONDS: Final = 10.0
#: How long what an older job left of a machine may take to end, s.
SUPERSEDE_SECONDS: Final = 30.0

_S: Final = MachineState


@dataclass(slots=True, eq=False)
class Session:
    """One control connection and the coordinator that serves it."""

    id: str
    peer: str  #: where it came from, for people
    process: Watched
    packets: Packets
    callers: list[socket.socket] = field(default_factory=list)  #: `ferry accept`s that wait for its end
    job: Job | None = None
    launched: Machine | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Incoming:
    def __init__(
        self,
        machines: Machines,
        jobs: Jobs,
        spec: dict[str, Any],
        *,
        hold: Sequence[str] = (),
        command: Sequence[str] = COORDINATOR,
    ) -> None:
        """:param spec: what every coordinator is told of this host. :param hold: points at which to wait, for tests."""
        self._machines, self._jobs = machines, jobs
        self._spec = {**spec, "hold": list(hold), "host": str(machines.host.directory)}
        self._command = tuple(command)
        self._sessions: dict[str, list[Session]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    # -- connections -----------------------------------------------------------------------------------------------------

    async def connection(
        self, first: Preamble, fds: Sequence[int], peer: str, caller: socket.socket | None = None
    ) -> None:
        """Serve a connection whose preamble was read. Its descriptors stay the caller's, and may be closed at once.

        :param caller: taken over, and closed when the session has ended.
        :raises FerryError: why it is not served.
        """
        if self._stopping:
            raise TransportError("this host's daemon is ending", remedy="try again later")
        serve = self._page(first, fds) if first.kind is Kind.PAGE else self._control(first, fds, peer)
        session = await serve
        if caller is not None:
            session.callers.append(caller)

    async def _page(self, first: Preamble, fds: Sequence[int]) -> Session:
        # The oldest that is there: nobody can take pages away by a control connection with the same session.
        sessions = self._sessions.get(first.session.hex())
        if not sessions:
            raise RemoteProtocolError(
                "a page channel came for a session that is not here", remedy="its migration has ended"
            )
        packet = {"page": first.index, "preamble": encode(first).hex()}
        await sessions[0].packets.send(packet, fds, timeout=TELL_SECONDS)
        return sessions[0]

    async def _control(self, first: Preamble, fds: Sequence[int], peer: str) -> Session:
        count = sum(len(sessions) for sessions in self._sessions.values())
        if count >= MAX_SESSIONS:
            raise TransportError(
                f"{count} connections are being served, which is the most",
                remedy="see in the log who connects",
            )
        session = self._spawn(first.session.hex(), peer)
        self._sessions.setdefault(session.id, []).append(session)
        self._start(self._serve(session))
        packet = {"spec": {**self._spec, "peer": peer}, "preamble": encode(first).hex()}
        await session.packets.send(packet, fds, timeout=TELL_SECONDS)
        return session

    def _spawn(self, name: str, peer: str) -> Session:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            child = subprocess.Popen(
                [*self._command, "destination", "--host-fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], process_group=0,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise FerryError(
                f"the coordinator cannot be started: {error.strerror}", remedy="check memory and processes"
            ) from None
        finally:
            theirs.close()
        log.info("event=incoming session=%s peer=%r pid=%s", name, peer, child.pid)
        return Session(name, peer, Watched(child.pid, child), Packets(ours))

    # -- a coordinator's life --------------------------------------------------------------------------------------------

    async def _serve(self, session: Session) -> None:
        """Do what the coordinator wants until it has ended, then see that nothing of it is left."""
        try:
            while (received := await session.packets.receive()) is not None:
                packet, fds = received
                close_all(fds)  # it has none to give
                self._take(session, packet)
        except FerryError as error:
            log.error("event=coordinator-broke session=%s error=%s", session.id, error)
            await session.process.end(patience=END_SECONDS)
        if not await session.process.wait(END_SECONDS):
            await session.process.end(patience=END_SECONDS)
        await self._after(session)

    def _take(self, session: Session, packet: dict[str, Any]) -> None:
        event = packet.get("event")
        if isinstance(event, dict):
            self._hear(session, event)
        elif "want" in packet:
            task = asyncio.get_running_loop().create_task(self._answer(session, packet))
            session.tasks.add(task)
            task.add_done_callback(session.tasks.discard)

    def _hear(self, session: Session, event: dict[str, Any]) -> None:
        """Keep an event; those of a connection that names no job (a question, a port scan) are for the log only."""
        job, machine = event.get("job"), event.get("machine")
        try:
            if event.get("event") == "incoming" and isinstance(job, str) and isinstance(machine, str):
                self._open(session, job, machine, str(event.get("peer", "")))
        except UsageError as error:
            log.warning("event=no-journal session=%s why=%s", session.id, error)
        if session.job is not None:
            session.job.journal.append(event)
        else:
            log.info("event=said session=%s what=%s", session.id, event)

    def _open(self, session: Session, job: str, machine: str, peer: str) -> None:
        if session.job is None:
            if job != session.id:
                raise UsageError("the job of the manifest is not that of the connection")
            session.job = self._jobs.open_incoming(job, machine, peer or session.peer, session.process)

    async def _answer(self, session: Session, packet: dict[str, Any]) -> None:
        try:
            answer = await self._do(session, packet)
        except FerryError as error:
            answer = {"error": error.as_reason().to_wire(), "code": error.code}
        except Exception:
            log.exception("event=want-failed session=%s", session.id)
            reason = FerryError("this host's daemon hit an error of its own", remedy="see its log")
            answer = {"error": reason.as_reason().to_wire(), "code": reason.code}
        try:
            await session.packets.send(answer, timeout=TELL_SECONDS)
        except FerryError as error:
            log.warning("event=answer-not-heard session=%s error=%s", session.id, error)

    async def _do(self, session: Session, packet: dict[str, Any]) -> dict[str, Any]:
        want, job = packet.get("want"), packet.get("job")
        if want == "incoming" and isinstance(job, str):
            return {"bus": await self._incoming(session, job, packet)}
        machine, epoch = packet.get("machine"), packet.get("epoch")
        if want == "ask" and isinstance(job, str) and isinstance(machine, str) and isinstance(epoch, int):
            return {"answer": await self._ask(machine, job, epoch)}
        raise RemoteProtocolError("the coordinator wants what cannot be had", phase=Phase.PREFLIGHT)

    # -- what it may want ------------------------------------------------------------------------------------------------

    async def _incoming(self, session: Session, job: str, packet: dict[str, Any]) -> str:
        """The bus of a supervisor that waits for a machine."""
        config = machine_of(packet.get("machine"), self._machines.host)
        if session.launched is not None:
            raise RemoteProtocolError("one machine a connection", phase=Phase.PREFLIGHT)
        async with self._machines.alone(config.name):
            await self._supersede(config.name, job)
            self._open(session, job, config.name, str(packet.get("peer", "")))
            machine = await self._machines.launch(config, incoming=True)
            session.launched = machine
        return machine.address

    async def _supersede(self, name: str, job: str) -> None:
        """A new manifest ends what an older job left of this machine, unless it has been committed.

        :raises UsageError: if the machine runs here.
        """
        await self._machines.vacate(name)
        there = self._machines.get(name)
        if there is None:
            return
        found = await there.supervisor.describe()
        if found["state"] not in (_S.INCOMING, _S.READY, _S.HELD) or found["job"] == job:
            raise UsageError(
                f"a machine {name} is on that host already; it is {found['state']}",
                phase=Phase.PREFLIGHT,
                remedy="stop that one first, or choose another host",
            )
        log.info("event=superseded machine=%s old=%s new=%s", name, found["job"], job)
        # Writes ABORTED, so that the older job can never be committed.
        await there.supervisor.abort_incoming(found["job"], "a new migration of it has begun")
        if not await there.process.wait(SUPERSEDE_SECONDS):
            raise UsageError(
                f"what an older migration left of {name} does not end",
                remedy=f"`ferry stop {name} --force` there",
            )
        older = self._jobs.active_of(name)
        if older is not None and older.id != job:
            await self._jobs.end(older)

    async def _ask(self, machine: str, job: str, epoch: int) -> str:
        """The word of this host on a job: by the supervisor, else by the ledger."""
        machine_of_name = self._machines.get(machine)
        if machine_of_name is not None:
            try:
                return await machine_of_name.supervisor.ask(job, epoch)
            except FerryError:
                if not await machine_of_name.process.wait(SUPERSEDE_SECONDS):
                    raise
                # It was ending: what it has written is its word.
        async with self._machines.alone(machine):
            return await asyncio.to_thread(answer_of_ledger, self._machines, machine, job, epoch)

    # -- its end ---------------------------------------------------------------------------------------------------------

    async def _after(self, session: Session) -> None:
        for task in list(session.tasks):
            task.cancel()
        await asyncio.gather(*session.tasks, return_exceptions=True)
        session.packets.close()
        for caller in session.callers:
            caller.close()
        self._sessions[session.id].remove(session)
        if not self._sessions[session.id]:
            del self._sessions[session.id]
        machine = session.launched
        if machine is not None and machine.state == _S.STARTING:
            # Its supervisor was never told of a job, so it knows of no coordinator that has gone.
            try:
                await self._machines.stop(machine.name, force=True)
            except FerryError as error:
                log.error("event=incoming-not-ended machine=%s error=%s", machine.name, error)
        if session.job is not None:
            await self._jobs.finish_incoming(session.job)
        log.info("event=incoming-ended session=%s how=%r", session.id, session.process.how())

    async def proceed(self, machine: str) -> None:
        """Let a held coordinator go on. :raises UsageError: if no machine of this name arrives."""
        for session in [one for sessions in self._sessions.values() for one in sessions]:
            if session.job is not None and session.job.machine == machine:
                await session.packets.send({"cmd": "continue"}, timeout=TELL_SECONDS)
                return
        raise UsageError(f"no machine {machine[:64]!r} arrives here", remedy="see `ferry list`")

    async def stop(self) -> None:
        """End every coordinator. A machine that is not READY ends with it; one that is, is held by its supervisor."""
        self._stopping = True
        sessions = [one for sessions in self._sessions.values() for one in sessions]
        await asyncio.gather(*(session.process.end(patience=END_SECONDS) for session in sessions))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
