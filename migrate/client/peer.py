"""One daemon on one bus: calls to its objects, and what they signal. Host, Machine and Job speak through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from migrate.bus import Bus
from migrate.bus.failures import UNKNOWN_OBJECT
from migrate.bus.host import NAME, QUICK
from migrate.bus.objects import PROPERTIES
from migrate.errors import BusError, DeviceRefused, UsageError

#: path, member and body of a signal
Heard = tuple[str, str, list[Any]]


class Peer:
    """:param owner: the daemon's unique name: another process that takes its name later is not it."""

    def __init__(self, bus: Bus, owner: str) -> None:
        self.bus, self.owner = bus, owner
        self._listening: set[asyncio.Queue[Heard | None]] = set()
        bus.on_disconnect(self._gone)

    def _gone(self) -> None:
        for queue in self._listening:
            queue.put_nowait(None)

    @classmethod
    async def connect(cls, address: str) -> Peer:
        """:raises BusError: if there is no bus, or no daemon on it."""
        bus = await Bus.connect(address)
        try:
            owners = await bus.queued_owners(NAME)
            if not owners:
                raise BusError(f"no `ferry host` is on the bus {address}", remedy="start it with this --bus")
        except BaseException:
            await bus.close()
            raise
        return cls(bus, owners[0])

    async def call(
        self, path: str, interface: str, member: str, signature: str = "", *body: Any,
        gives: str = "", timeout: float = QUICK,
    ) -> Any:  # fmt: skip
        """The value of the answer; None where it has none. :raises FerryError: what the daemon raised."""
        try:
            answer = await self.bus.call(
                self.owner, path, interface, member, signature, body, timeout=timeout, reply_signature=gives
            )
        except DeviceRefused as error:
            if UNKNOWN_OBJECT not in error.reason:
                raise
            kind, name = last_parts(path)
            raise UsageError(
                f"there is no {kind} {name!r} here", remedy="see `ferry list`, `ferry jobs`"
            ) from None
        return answer[0] if answer else None

    async def properties(self, path: str, interface: str) -> dict[str, Any]:
        found = await self.call(path, PROPERTIES, "GetAll", "s", interface, gives="a{sv}")
        return dict(found)

    async def signals(self, *wanted: tuple[str, str]) -> AsyncGenerator[Heard | None, None]:
        """Signals of the daemon, each (interface, member) that is wanted, in their order. The first item is None, once
        none is missed any more.

        :raises BusError: when the daemon goes.
        """
        queue: asyncio.Queue[Heard | None] = asyncio.Queue()
        self._listening.add(queue)
        stops = [self.bus.watch_name(self.owner, self._gone)]
        try:
            for interface, member in wanted:
                stops.append(await self._hear(interface, member, queue))
            yield None
            while (heard := await queue.get()) is not None:
                yield heard
        finally:
            self._listening.discard(queue)
            for stop in stops:
                stop()
        raise BusError(
            "the daemon of this host ended; what goes on there goes on without it",
            remedy="start `ferry host` again and look at `ferry list`",
        )

    async def _hear(self, interface: str, member: str, queue: asyncio.Queue[Heard | None]) -> Any:
        return await self.bus.on_signal(
            interface,
            member,
            lambda _sender, path, body: queue.put_nowait((path, member, body)),
            sender=self.owner,
        )


def last_parts(path: str) -> tuple[str, str]:
    """Of an object's path: what it is (job, machine), and its name as it stands there."""
    kind, name = path.rsplit("/", 2)[-2:]
    return kind, name
