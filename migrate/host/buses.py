"""The buses that the daemon is on: its own, which it starts and brings back, and one that others share, if it was told to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from migrate.bus import Bus, PrivateBus
from migrate.bus.addresses import address_of
from migrate.bus.host import NAME
from migrate.bus.objects import Objects
from migrate.errors import BusError, FerryError

log = logging.getLogger(__name__)

#: Pause between attempts to come back to a bus, s.
AGAIN_SECONDS: Final = 1.0


class Buses:
    """Make it, fill `objects`, then `join`; `leave` in any case."""

    def __init__(self, directory: Path, objects: Objects, shared: str = "") -> None:
        """
        :param shared: "system", "session" or an address; "": none.
        :raises UsageError: for a shared bus that cannot be meant.
        """
        self._private = PrivateBus(directory / "bus")
        self._shared = address_of(shared) if shared else ""
        self._objects = objects
        self._connections: dict[str, Bus] = {}
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        """Of the daemon's own bus."""
        return self._private.address

    async def start(self) -> None:
        """The own bus comes up; nothing is on it yet. :raises FerryError: why not."""
        await self._private.start()

    async def join(self) -> None:
        """:raises BusError: a bus does not have us; another daemon is on it."""
        await self._join(self.address)
        self._keep(self._keep_private())
        if self._shared:
            await self._join(self._shared)
            self._keep(self._keep_shared())

    async def _join(self, address: str) -> None:
        bus = await Bus.connect(address)
        try:
            self._objects.attach(bus)
            await bus.request_name(NAME, queue=False)
        except BusError as error:
            await bus.close()
            raise BusError(
                f"this daemon cannot be {NAME} on {address}: {error.reason}",
                remedy="is another `ferry host` on that bus? May this user own the name (docs/how-to-manage.md)?",
            ) from None
        self._connections[address] = bus

    def _keep(self, work: Awaitable[None]) -> None:
        self._keepers.append(asyncio.ensure_future(work))

    async def _keep_private(self) -> None:
        """A dbus-daemon that dies is replaced at the same path."""
        while True:
            status = await self._private.wait_died()
            log.error("event=bus-died status=%s", status)
            await self._try(self._bring_back)

    async def _bring_back(self) -> None:
        await self._private.restart()
        await self._join(self.address)

    async def _keep_shared(self) -> None:
        """One that goes, and may come back, is looked for."""
        while True:
            await self._connections[self._shared].closed.wait()
            log.error("event=shared-bus-lost address=%s", self._shared)
            await self._try(lambda: self._join(self._shared))

    async def _try(self, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await act()
                return
            except FerryError as error:
                log.error("event=bus-not-back error=%s", error)
                await asyncio.sleep(AGAIN_SECONDS)

    async def leave(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for bus in self._connections.values():
            await bus.close()
        await self._private.stop()
