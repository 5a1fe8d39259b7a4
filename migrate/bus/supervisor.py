"""`org.vmferry.Supervisor1` (docs/dbus/org.vmferry.Supervisor1.xml): what the supervisor serves, and its typed client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, Protocol

from migrate.bus.connection import Bus
from migrate.bus.service import Call, Interface, Method, Property, Signal
from migrate.errors import Phase

INTERFACE: Final = "org.vmferry.Supervisor1"
NAME: Final = "org.vmferry.Supervisor"
PATH: Final = "/org/vmferry/Supervisor1"

#: Seconds a call may take. Those that stop, start or end participants wait for each of them in turn.
QUICK, SLOW = 5.0, 60.0


class SupervisorService(Protocol):
    """What is behind the interface; every error is a FerryError."""

    def state(self) -> str: ...
    async def describe(self) -> str: ...
    async def region(self, index: int) -> tuple[int, int, int, int]: ...
    async def pause(self) -> None: ...
    async def run(self) -> None: ...
    async def quit(self, force: bool) -> None: ...
    async def begin_outgoing(self, sender: str, job: str, peer: str) -> int: ...
    async def peer_is(self, job: str, incarnation: str) -> None: ...
    async def quiesce(self, job: str) -> str: ...
    async def abort_outgoing(self, job: str, reasons: str) -> None: ...
    async def commit(self, job: str, epoch: int) -> int: ...
    async def peer_said(self, job: str, epoch: int, answer: str, reasons: str) -> None: ...
    async def begin_incoming(self, sender: str, job: str, epoch: int, peer: str) -> None: ...
    async def ready(self, job: str) -> None: ...
    async def commit_incoming(self, job: str, epoch: int, stopped_ns: int, paused: bool) -> str: ...
    async def abort_incoming(self, job: str, reasons: str) -> None: ...
    async def ask(self, job: str, epoch: int) -> str: ...
    async def resolve(self, keep: str) -> str: ...


def supervisor_interface(service: SupervisorService) -> Interface:
    def method(
        name: str, takes: str, gives: str, names: str, out: str, handler: Any, sender: bool = False
    ) -> Method:
        async def serve(call: Call, *args: Any) -> Any:
            return await (handler(call.sender, *args) if sender else handler(*args))

        return Method(name, takes, gives, names.split(), out.split(), serve)

    s = service
    return Interface(
        INTERFACE,
        methods=[
            method("Describe", "", "s", "", "machine", s.describe),
            method("Region", "u", "ttht", "index", "gpa size memory offset", s.region),
            method("Pause", "", "", "", "", s.pause),
            method("Run", "", "", "", "", s.run),
            method("Quit", "b", "", "force", "", s.quit),
            method("BeginOutgoing", "ss", "t", "job peer", "epoch", s.begin_outgoing, True),
            method("PeerIs", "ss", "", "job incarnation", "", s.peer_is),
            method("Quiesce", "s", "s", "job", "times", s.quiesce),
            method("AbortOutgoing", "ss", "", "job reasons", "", s.abort_outgoing),
            method("Commit", "st", "t", "job epoch", "stopped_ns", s.commit),
            method("PeerSaid", "stss", "", "job epoch answer reasons", "", s.peer_said),
            method("BeginIncoming", "sts", "", "job epoch peer", "", s.begin_incoming, True),
            method("Ready", "s", "", "job", "", s.ready),
            method("CommitIncoming", "sttb", "s", "job epoch stopped_ns paused", "times", s.commit_incoming),
            method("AbortIncoming", "ss", "", "job reasons", "", s.abort_incoming),
            method("Ask", "st", "s", "job epoch", "answer", s.ask),
            method("Resolve", "s", "s", "keep", "state", s.resolve),
        ],
        properties=[Property("State", "s", s.state)],
        signals=[Signal("Changed", "ss", ["state", "detail"])],
    )


class SupervisorClient:
    """One machine's supervisor, over its private bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def _call(
        self, member: str, signature: str = "", *body: Any, timeout: float = QUICK, phase: Phase = Phase.SETUP
    ) -> list[Any]:
        return await self._bus.call(
            NAME, PATH, INTERFACE, member, signature, body, timeout=timeout, phase=phase
        )

    async def on_changed(self, callback: Callable[[str, str], None]) -> Callable[[], None]:
        """Have `callback(state, detail)` called at every change of the machine's state; returns how to stop."""
        return await self._bus.on_signal(INTERFACE, "Changed", lambda _sender, _path, body: callback(*body))

    async def describe(self) -> dict[str, Any]:
        [text] = await self._call("Describe")
        found: dict[str, Any] = json.loads(text)
        return found

    async def region(self, index: int) -> tuple[int, int, int, int]:
        """:returns: gpa, size, a descriptor that is the caller's to close, offset."""
        gpa, size, fd, offset = await self._call("Region", "u", index)
        return gpa, size, fd, offset

    async def pause(self) -> None:
        await self._call("Pause", timeout=SLOW)

    async def run(self) -> None:
        await self._call("Run", timeout=SLOW)

    async def quit(self, *, force: bool) -> None:
        await self._call("Quit", "b", force, timeout=SLOW)

    async def begin_outgoing(self, job: str, peer: str) -> int:
        [epoch] = await self._call("BeginOutgoing", "ss", job, peer)
        return int(epoch)

    async def peer_is(self, job: str, incarnation: str) -> None:
        await self._call("PeerIs", "ss", job, incarnation)

    async def quiesce(self, job: str) -> dict[str, Any]:
        [text] = await self._call("Quiesce", "s", job, timeout=SLOW, phase=Phase.STOP)
        found: dict[str, Any] = json.loads(text)
        return found

    async def abort_outgoing(self, job: str, reasons: str) -> None:
        await self._call("AbortOutgoing", "ss", job, reasons, timeout=SLOW)

    async def commit(self, job: str, epoch: int) -> int:
        [stopped_ns] = await self._call("Commit", "st", job, epoch, phase=Phase.COMMIT)
        return int(stopped_ns)

    async def peer_said(self, job: str, epoch: int, answer: str, reasons: str) -> None:
        await self._call("PeerSaid", "stss", job, epoch, answer, reasons, timeout=SLOW, phase=Phase.RECOVER)

    async def begin_incoming(self, job: str, epoch: int, peer: str) -> None:
        await self._call("BeginIncoming", "sts", job, epoch, peer, phase=Phase.PREFLIGHT)

    async def ready(self, job: str) -> None:
        await self._call("Ready", "s", job, phase=Phase.LOAD)

    async def commit_incoming(self, job: str, epoch: int, stopped_ns: int, *, paused: bool) -> dict[str, int]:
        [text] = await self._call(
            "CommitIncoming", "sttb", job, epoch, stopped_ns, paused, timeout=SLOW, phase=Phase.COMMIT
        )
        found: dict[str, int] = json.loads(text)
        return found

    async def abort_incoming(self, job: str, reasons: str) -> None:
        await self._call("AbortIncoming", "ss", job, reasons, timeout=SLOW)

    async def ask(self, job: str, epoch: int) -> str:
        [answer] = await self._call("Ask", "st", job, epoch, timeout=SLOW, phase=Phase.RECOVER)
        return str(answer)

    async def resolve(self, keep: str) -> str:
        [state] = await self._call("Resolve", "s", keep, timeout=SLOW, phase=Phase.RECOVER)
        return str(state)
