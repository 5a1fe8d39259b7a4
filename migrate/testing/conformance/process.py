"""The process that is looked at: found on a bus, asked with deadlines, and how what it says is told from what it should say."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final, TypeVar

from migrate.bus import Bus, DeviceClient
from migrate.bus.device import DEVICE, PATH, VMSTATE
from migrate.errors import DeviceGone, FerryError

T = TypeVar("T")
_PROPERTIES: Final = "org.freedesktop.DBus.Properties"
#: What no reader of an error wants to see.
_TRACEBACK: Final = re.compile(r'Traceback|File ".*", line [0-9]+|\.py:[0-9]+')


@dataclass(frozen=True, slots=True)
class Found:
    """A process that has one of the two names, or answers for the interface."""

    name: str  #: on the bus, unique
    id: str | None  #: None: it tells none
    why: str  #: it tells none
    queued: bool  #: for org.qemu.VMState1
    typed: bool  #: it has org.vmferry.Device1


async def find(bus: Bus, timeout: float) -> list[Found]:
    """All processes that queue for one of the names. :raises BusError: the bus is gone."""
    carried, typed = await bus.queued_owners(VMSTATE), await bus.queued_owners(DEVICE)
    found = []
    for name in dict.fromkeys((*typed, *carried)):
        device_id, why = await _id_of(bus, name, timeout)
        found.append(Found(name, device_id, why, name in carried, name in typed))
    return found


async def _id_of(bus: Bus, name: str, timeout: float) -> tuple[str | None, str]:
    try:
        (properties,) = await bus.call(
            name, PATH, _PROPERTIES, "GetAll", "s", [VMSTATE], timeout=timeout, reply_signature="a{sv}"
        )
    except FerryError as error:
        return None, error.reason
    found = properties.get("Id")
    if not isinstance(found, str):
        return None, "its property Id is missing, or no text"
    if not 1 <= len(found.encode(errors="replace")) <= 255:
        return None, f"its Id has {len(found.encode(errors='replace'))} bytes"
    return found, ""


class Process:
    """One process under test, and how long it may take."""

    def __init__(self, bus: Bus, found: Found, timeout: float) -> None:
        assert found.id is not None
        self.found = found
        self.client = DeviceClient(bus, found.name, found.id, opaque=not found.typed)
        self.timeout = timeout
        #: Errors that it answered with where it was right to refuse; looked at once, at the end.
        self.refusals: list[FerryError] = []

    async def save(self) -> bytes:
        return await self.client.save(timeout=self.timeout)

    async def load(self, data: bytes) -> None:
        await self.client.load(data, timeout=self.timeout)

    async def refuses(self, call: Awaitable[object]) -> bool:
        """Whether it answers with an error; one that is gone, or does not answer, refuses nothing.

        :raises DeviceGone, DeviceTimeout: that.
        """
        from migrate.errors import DeviceTimeout

        try:
            await call
        except (DeviceGone, DeviceTimeout):
            raise
        except FerryError as error:
            self.refusals.append(error)
            return True
        return False

    def bad_words(self) -> str:
        """What is wrong with the words of its refusals; "" where nothing is."""
        for error in self.refusals:
            if _TRACEBACK.search(error.reason):
                return f"a refusal has a traceback or a source file in it: {error.reason[:120]!r}"
            if len(error.reason.strip()) < 4:
                return "a refusal says nothing"
        return ""
