"""The destination's coordinator: it takes one connection from HELLO to RUNNING, or to its end.

It holds nothing that could not be lost: until READY the incoming machine dies with it, after READY the supervisor keeps the copy
(held), and what was promised is in the supervisor's ledger. What the peer sends is checked before it is believed.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from migrate import __version__
from migrate.bus import Bus
from migrate.coordinator import disks, preflight, qemu_in
from migrate.coordinator.arrival import PATIENCE, Arrival
from migrate.coordinator.dialling import credentials_of
from migrate.coordinator.hold import Hold
from migrate.coordinator.link import Link, PeerRejected
from migrate.coordinator.outcome import Emit, wire_reasons
from migrate.coordinator.pages_in import PageReceiver, PageSink
from migrate.coordinator.participants import Participants
from migrate.coordinator.qemu_in import QemuReceiver
from migrate.errors import (
    FerryError,
    GuestEnded,
    IncompatibleError,
    Phase,
    Reason,
    RemoteProtocolError,
    TransportError,
)
from migrate.machine.hostconfig import HostConfig
from migrate.memory import GuestMemory
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.protocol.states import Did, Role
from migrate.qemu.facts import Facts
from migrate.transport.control import Endpoint, accept_control, accept_page
from migrate.transport.preamble import Kind, Preamble

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
HANDSHAKE_SECONDS = 15.0
JOIN_SECONDS = 20.0
#: Between READY and COMMIT the source may verify all of memory.
COMMIT_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Spec:
    """What the daemon tells at the start (one JSON object)."""

    host: str
    host_name: str
    incarnation: str
    peer: str
    session: str  #: of the preamble, 32 hexadecimal characters
    credentials: dict[str, Any] | None = None
    hold: list[str] = field(default_factory=list)


class Host(Protocol):
    """What the daemon does for us: it starts supervisors and knows the ledgers; we have the network."""

    @property
    def config(self) -> HostConfig: ...
    def offers(self, type_name: str) -> Reason | None: ...
    def free_bytes(self) -> int: ...
    async def incoming(self, machine: dict[str, Any], job: str, peer: str) -> str: ...
    async def ask(self, machine: str, job: str, epoch: int) -> str: ...
    async def next_page(self) -> tuple[int, list[int]]: ...


class DestinationMigration:
    def __init__(self, spec: Spec, descriptors: list[int], host: Host, emit: Emit, hold: Hold) -> None:
        self.spec = spec
        self.host = host
        self.emit = emit
        self.hold = hold
        self.credentials = credentials_of(spec.credentials)
        self._descriptors = descriptors
        self._link: Link | None = None
        self._versions: dict[str, int] = {}
        self._sink: PageSink | None = None
        self._bus: Bus | None = None
        self._parts: Participants | None = None
        self._memory: GuestMemory | None = None
        self._pages: PageReceiver | QemuReceiver | None = None
        self._facts: Facts | None = None  #: of a QEMU that waits here
        self._manifest: m.Manifest | None = None
        self._arrival: Arrival | None = None
        self._token = secrets.token_bytes(32)
        self._phase = Phase.PREFLIGHT
        self._begun = False
        self._ready = False
        self._committing = False
        self._task: asyncio.Task[Any] | None = None
        self._interrupted: FerryError | None = None  #: why the conversation was ended from outside of it

    async def run(self) -> dict[str, Any]:
        """Serve the connection to its end; the outcome as this side knows it."""
        self._task = asyncio.current_task()
        outcome: dict[str, Any] = {"event": "outcome", "peer": self.spec.peer, "role": "destination"}
        reasons: list[Reason] = []
        try:
            try:
                outcome |= await self._serve()
            except asyncio.CancelledError:
                if self._interrupted is None or self._task is None:
                    raise
                self._task.uncancel()
                raise self._interrupted from None
        except FerryError as error:
            if isinstance(error, TransportError):
                error.phase = str(self._phase)  # a channel does not know what it was used for
            reasons = error.reasons()
            log.warning("event=failed phase=%s error=%s", self._phase, error)
            outcome |= await self._give_up(error)
        finally:
            await self._clean_up()
        outcome |= {"reasons": [reason.to_wire() for reason in reasons]} if reasons else {}
        outcome.setdefault("reasons", [])
        if self._manifest is not None:
            outcome |= {"machine": self._manifest.machine, "job": self._manifest.job}
        return outcome

    def _machine_changed(self, state: str, detail: str) -> None:
        """The incoming machine is gone, as when a participant of it died: the source hears at once why, and of whom."""
        if state == "ended":
            device, why = self._parts.blame(detail) if self._parts is not None else (None, detail)
            remedy = "see the destination's logs"
            self._interrupt(GuestEnded(why, phase=self._phase, device=device, remedy=remedy))

    def _interrupt(self, error: FerryError) -> None:
        """There is nothing more to wait for; not where COMMIT has come, for then the ledger has the last word."""
        if not self._committing and self._interrupted is None and self._task is not None:
            self._interrupted = error
            self._task.cancel()

    # -- the conversation --------------------------------------------------------------------------------------------------

    async def _serve(self) -> dict[str, Any]:
        stream = await accept_control(
            endpoint(self._descriptors),
            self._preamble(Kind.CONTROL, 0),
            self.credentials,
            timeout=HANDSHAKE_SECONDS,
        )
        self._link = link = Link(stream, Role.DESTINATION, pages=self._inline)
        hello = await link.expect(m.Hello, timeout=HANDSHAKE_SECONDS)
        await link.send(
            m.Hello(
                (m.PROTOCOL_VERSION,), f"vmferry {__version__}", self.spec.host_name, self.spec.incarnation
            )
        )
        preflight.check_hello(hello)
        first = await link.receive(timeout=HANDSHAKE_SECONDS)
        if isinstance(first, m.Ask):
            return await self._answer(first)
        if not isinstance(first, m.Manifest):
            raise RemoteProtocolError(f"{first.name} where a manifest was due", phase=Phase.PREFLIGHT)
        self._manifest = first
        self.emit({"event": "incoming", "machine": first.machine, "job": first.job, "peer": stream.peer})
        reasons = await self._check(first, stream.peer)
        if reasons:
            await link.send(m.Refuse(tuple(reasons)))
            raise IncompatibleError(reasons)
        if first.check_only:
            await link.send(m.Accept(self._token, self._versions, MAX_CONNECTIONS))
            await link.expect(m.Bye, timeout=HANDSHAKE_SECONDS)
            self._task = None  # from here on its end is our own doing
            await self._discard("only a check was asked for")
            return {"outcome": "checked", "running_on": "source", "exit_code": 0}
        return await self._receive(first)

    def _preamble(self, kind: Kind, index: int) -> Preamble:
        """What the daemon read before it handed the connection on; inside TLS the peer has to confirm it."""
        return Preamble(kind, index, bytes.fromhex(self.spec.session))

    async def _answer(self, question: m.Ask) -> dict[str, Any]:
        """A source in doubt asks who runs its machine."""
        assert self._link is not None
        if question.incarnation != self.spec.incarnation:
            answer = m.Answer("unknown", f"this host's ledger was made anew ({self.spec.incarnation})")
        else:
            answer = m.Answer(await self.host.ask(question.machine, question.job, question.epoch), "")
        await self._link.send(answer)
        self.emit(
            {"event": "asked", "machine": question.machine, "job": question.job, "answer": answer.state}
        )
        return {"outcome": "answered", "answer": answer.state, "exit_code": 0}

    # -- preflight ---------------------------------------------------------------------------------------------------------

    async def _check(self, manifest: m.Manifest, peer: str) -> list[Reason]:
        """Every reason against this machine that this host can find; with none, its participants wait on the bus."""
        reasons = preflight.check_memory(manifest, self.host.free_bytes())
        offered = []
        images: dict[str, dict[str, str]] = {}
        for entry in manifest.devices:
            against = self.host.offers(entry.type)
            if against is not None:
                reasons.append(Reason(entry.id, str(Phase.PREFLIGHT), against.reason, against.remedy))
                continue
            images[entry.id], against_disks = disks.find(self.host.config, entry)
            reasons += against_disks
            if not against_disks:
                offered.append(entry.id)
        try:
            qemu = self.host.config.qemu_of(manifest.machine) if preflight.is_qemu(manifest) else None
            machine = preflight.incoming_config(manifest, offered, images, qemu)
            address = await self.host.incoming(preflight.as_json(machine), manifest.job, peer)
            self._bus = await Bus.connect(address)
            self._parts = await Participants.find(self._bus)
            await self._parts.supervisor.on_changed(self._machine_changed)
            if qemu is not None and self._parts.qemu is not None:
                self._facts, against_qemu = await qemu_in.compare(self._parts, manifest)
                reasons += against_qemu
        except FerryError as error:
            return [*reasons, Reason(error.device, str(Phase.PREFLIGHT), error.reason, error.remedy)]
        self._versions, against_versions = preflight.compare(manifest, self._parts)
        reasons += against_versions
        return reasons

    # -- pre-copy ----------------------------------------------------------------------------------------------------------

    async def _receive(self, manifest: m.Manifest) -> dict[str, Any]:
        link, parts = self._link, self._parts
        assert link is not None and parts is not None
        await link.send(m.Accept(self._token, self._versions, MAX_CONNECTIONS))
        start = await link.expect(m.Start, timeout=PATIENCE)
        self._enter(Phase.PRECOPY)
        await parts.supervisor.begin_incoming(manifest.job, manifest.epoch, link.stream.peer)
        self._begun = True
        self._memory = await parts.map_memory()
        if start.connections > MAX_CONNECTIONS:
            raise RemoteProtocolError(
                f"{start.connections} page channels were announced", phase=Phase.PRECOPY
            )
        if self._facts is not None:
            self._pages = receiver = QemuReceiver(parts, link, self._memory, self._interrupt)
            await receiver.listen(self._facts, start.connections)
        else:
            self._pages = pages = PageReceiver(self._memory, self._interrupt)
            self._prefault(start, pages)
        if start.connections == 0:
            self._sink = self._pages.join_inline()
        else:
            await link.during(self._join(start.connections), timeout=JOIN_SECONDS, what="a page channel")
        await link.send(m.Started())
        self._arrival = Arrival(parts, link, self._memory, self._pages, self._versions, self.emit, self.hold)
        return await self._load(self._arrival, await self._arrival.rounds())

    def _prefault(self, start: m.Start, pages: PageReceiver) -> None:
        assert self._memory is not None
        if start.extents:
            table = np.array(start.extents, np.uint64)
            pages.prefault(self._memory.from_table(table))

    async def _join(self, count: int) -> None:
        """Wait for the page channels; each proves by the token that it belongs to this control channel."""
        link = self._link
        assert link is not None and self._pages is not None
        seen: set[int] = set()
        while len(seen) < count:
            index, descriptors = await self.host.next_page()
            channel = await asyncio.to_thread(
                accept_page,
                endpoint(descriptors),
                self._preamble(Kind.PAGE, index),
                self.credentials,
                timeout=HANDSHAKE_SECONDS,
            )
            try:
                channel.set_deadline(HANDSHAKE_SECONDS)
                join = await asyncio.to_thread(read_join, channel.recv_into)
                if (
                    not hmac.compare_digest(join.token, self._token)
                    or channel.peer != link.stream.peer
                    or join.index in seen
                    or join.index >= count
                ):
                    raise RemoteProtocolError(
                        "a page channel joined that is not the source's", phase=Phase.PRECOPY
                    )
            except FerryError:
                channel.close()
                raise
            channel.set_deadline(
                PATIENCE
            )  # rounds pause; the control channel's pings tell of the peer's life
            self._pages.join(join.index, channel)
            seen.add(join.index)

    async def _inline(self, header: frames.Header, body: bytes) -> None:
        if self._sink is None:
            raise RemoteProtocolError("page frames came in line, which was not agreed", phase=Phase.PRECOPY)
        await self._sink(header, body)

    # -- the stop ------------------------------------------------------------------------------------------------------------

    async def _load(self, arrival: Arrival, stopped: m.Stopped) -> dict[str, Any]:
        """Have all validated and applied, say READY; then COMMIT, COMMITTED, RUNNING."""
        assert self._manifest is not None
        self._enter(Phase.LOAD)
        await self.hold.at("loading")
        times = await arrival.load(stopped)
        await arrival.parts.supervisor.ready(self._manifest.job)
        self._ready = True
        await arrival.link.send(m.Ready(times.devices, time.monotonic_ns() - arrival.began))
        self.emit({"event": "phase", "phase": "ready"})
        closing = asyncio.ensure_future(arrival.pages.close())
        await self.hold.at("ready")
        while True:
            message = await arrival.link.receive(timeout=COMMIT_SECONDS)
            await closing  # no page is written any more, whatever a source may still send
            if isinstance(message, m.Verify):
                await arrival.link.send(await arrival.verify(message))
            elif isinstance(message, m.Commit):
                return await self._commit(message)

    async def _commit(self, message: m.Commit) -> dict[str, Any]:
        link, parts, manifest = self._link, self._parts, self._manifest
        assert link is not None and parts is not None and manifest is not None
        self._enter(Phase.COMMIT)
        if message.job != manifest.job or message.epoch != manifest.epoch:
            raise RemoteProtocolError("COMMIT names another job or epoch", phase=Phase.COMMIT)
        self._committing = True
        try:
            times = await parts.supervisor.commit_incoming(
                message.job, message.epoch, message.stopped_ns, paused=message.paused
            )
        except FerryError as error:
            # Only the ledger knows whether COMMITTED was written before that; what it says is final.
            log.error("event=commit-failed error=%s", error)
            said = await self.host.ask(manifest.machine, manifest.job, manifest.epoch)
            if said == "aborted":
                await link.send(m.Aborted(tuple(error.reasons())))
                wire = [reason.to_wire() for reason in error.reasons()]
                return {"outcome": "aborted", "running_on": "source", "exit_code": 1, "reasons": wire}
            if said != "running":
                raise
            times = {"commit_ns": 0, "resume_ns": 0}
        link.conversation.did(Did.WROTE_COMMITTED)
        await self.hold.at("committed")
        try:
            await link.send(m.Running(times["commit_ns"], times["resume_ns"]))
            await link.closed(
                timeout=5.0
            )  # the source closes once it has heard; closing first could lose the message
        except FerryError as error:
            log.warning("event=running-not-heard error=%s", error)  # it will ask
        return {"outcome": "completed", "running_on": "destination", "exit_code": 0}

    # -- ending ------------------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self.emit({"event": "phase", "phase": str(phase)})

    async def _give_up(self, error: FerryError) -> dict[str, Any]:
        """Tell the source why, if it can still hear; end the incoming machine, unless it is READY and must be kept."""
        self._task = None  # from here on its end is our own doing
        reasons = error.reasons()
        refused = isinstance(error, IncompatibleError)
        lost = isinstance(error, TransportError)
        told = self._committing or isinstance(error, PeerRejected)
        if self._link is not None and not self._link.broken and not told:
            try:
                await self._link.send(m.Reject(tuple(reasons)))
                lost = False
            except FerryError:
                pass  # it may not be said in this stage: the source learns by the end of the channel
        if self._link is not None:
            self._link.lost()
        if self._committing:
            # The ledger has the last word, and the supervisor acts by it; the source will ask.
            return {"outcome": "in_doubt", "running_on": "destination", "exit_code": 4}
        if self._ready and lost:
            # The source may have written COMMIT: our supervisor sees us go and holds the copy until it is asked.
            return {"outcome": "held", "running_on": "neither", "exit_code": 4}
        await self._discard(wire_reasons(reasons))
        if refused:
            return {"outcome": "refused", "running_on": "source", "exit_code": 3}
        return {"outcome": "aborted", "running_on": "source", "exit_code": 1}

    async def _discard(self, why: str) -> None:
        """End the incoming machine; its ledger says ABORTED first where a job had begun."""
        if self._parts is None or self._manifest is None:
            return
        try:
            if self._begun:
                await self._parts.supervisor.abort_incoming(self._manifest.job, why)
            else:
                await self._parts.supervisor.quit(force=True)
        except FerryError as error:
            log.warning("event=discard error=%s reason=%s", error, why)

    async def _release_memory(self) -> None:
        if self._pages is not None:
            await self._pages.close()
            self._pages = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    async def _clean_up(self) -> None:
        if self._arrival is not None:
            await self._arrival.close()
        if self._link is not None:
            await self._link.close()
        await self._release_memory()
        if self._bus is not None:
            await self._bus.close()


def endpoint(descriptors: list[int]) -> Endpoint:
    """One socket, or the read and write ends of two pipes."""
    if len(descriptors) == 1:
        return socket.socket(fileno=descriptors[0])
    read_fd, write_fd = descriptors
    return read_fd, write_fd


def read_join(recv_into: Any) -> m.Join:
    """The one control frame of a page channel.

    :raises RemoteProtocolError: if it is anything else.
    """
    raw = bytearray(frames.HEADER_SIZE)
    recv_into(memoryview(raw))
    header = frames.decode_header(raw)
    if header.kind is not frames.Kind.CONTROL or header.length > 4096:
        raise RemoteProtocolError("a page channel did not begin with JOIN", phase=Phase.PRECOPY)
    body = bytearray(header.length)
    recv_into(memoryview(body))
    message = m.decode(frames.decode_control(bytes(body)))
    if not isinstance(message, m.Join):
        raise RemoteProtocolError(f"a page channel began with {message.name}", phase=Phase.PRECOPY)
    return message
