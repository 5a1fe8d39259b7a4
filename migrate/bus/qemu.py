"""`org.vmferry.Qemu1` (docs/dbus/org.vmferry.Qemu1.xml): a machine's QEMU, as the process that owns its monitor shows it.

QEMU's monitor takes one client at a time, and the one that stops and resumes the machine must be that client. So whoever migrates
it asks here: commands of QMP in, what QEMU answers out, and its events as signals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from migrate.bus.connection import Bus
from migrate.bus.service import Call, Interface, Method, Signal
from migrate.errors import Phase, RemoteProtocolError

INTERFACE: Final = "org.vmferry.Qemu1"
PATH: Final = "/org/vmferry/Qemu1"
#: Seconds that QEMU may take to answer one command, unless the caller says otherwise; and what the bus may take on top.
ANSWER_SECONDS: Final = 5.0
_ON_TOP: Final = 2.0


class QemuService(Protocol):
    """What is behind the interface; every error is a FerryError."""

    async def execute(self, command: str, arguments: dict[str, Any], seconds: float) -> Any: ...
    async def facts(self) -> dict[str, Any]: ...


def qemu_interface(service: QemuService) -> Interface:
    async def execute(_call: Call, command: str, arguments: str, seconds: float) -> str:
        return json.dumps(await service.execute(command, _object(arguments), seconds))

    async def facts(_call: Call) -> str:
        return json.dumps(await service.facts())

    return Interface(
        INTERFACE,
        methods=[
            Method("Execute", "ssd", "s", ("command", "arguments", "seconds"), ("result",), execute),
            Method("Facts", "", "s", (), ("facts",), facts),
        ],
        signals=[Signal("Event", "sst", ("name", "data", "monotonic_ns"))],
    )


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise RemoteProtocolError("a command's arguments are no JSON object", phase=Phase.RUNNING)
    return found


class QemuClient:
    """One machine's QEMU, over its private bus. Errors name the participant that shows it."""

    def __init__(self, bus: Bus, owner: str, device: str) -> None:
        """:param owner: its unique name. :param device: the participant's Id."""
        self._bus = bus
        self.owner = owner
        self.device = device

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        seconds: float = ANSWER_SECONDS,
        phase: Phase = Phase.PRECOPY,
    ) -> Any:
        """What QEMU answers. :raise DeviceRefused: with QEMU's own words. :raise DeviceTimeout, DeviceGone:"""
        body = [command, json.dumps(dict(arguments or {})), seconds]
        [text] = await self._call("Execute", "ssd", body, seconds + _ON_TOP, phase)
        return json.loads(text)

    async def facts(self, *, phase: Phase = Phase.PREFLIGHT) -> dict[str, Any]:
        """What is compared before anything moves: see migrate.qemu.facts."""
        [text] = await self._call("Facts", "", [], 4 * ANSWER_SECONDS, phase)
        return _object(text)

    async def on_event(self, callback: Callable[[str, dict[str, Any], int], None]) -> Callable[[], None]:
        """Have `callback(name, data, monotonic_ns)` called for each of QEMU's events; returns how to stop."""
        return await self._bus.on_signal(
            INTERFACE,
            "Event",
            lambda _sender, _path, body: callback(body[0], _object(body[1]), body[2]),
            sender=self.owner,
        )

    async def _call(self, member: str, signature: str, body: list[Any], timeout: float, phase: Phase) -> Any:
        return await self._bus.call(
            self.owner,
            PATH,
            INTERFACE,
            member,
            signature,
            body,
            timeout=timeout,
            device=self.device,
            phase=phase,
        )
