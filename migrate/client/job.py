"""One job: what it is, its progress, and the words that steer it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace

from migrate.bus.host import Limits, options_to_bus
from migrate.bus.job import INTERFACE
from migrate.bus.objects import PROPERTIES
from migrate.bus.status import JobStatus, from_bus, job_path, update
from migrate.client.peer import Peer


class Job:
    """Holds nothing: each question is asked of the daemon."""

    def __init__(self, peer: Peer, name: str) -> None:
        self._peer = peer
        self.id = name
        self.path = job_path(name)

    async def status(self) -> JobStatus:
        return from_bus(JobStatus, await self._peer.properties(self.path, INTERFACE))

    async def cancel(self) -> None:
        """Take it back; nothing after COMMIT. :raises UsageError: if it has ended, or arrives here."""
        await self._peer.call(self.path, INTERFACE, "Cancel")

    async def set_limits(self, limits: Limits) -> None:
        """:raises UsageError: if it has ended, or a limit is none."""
        await self._peer.call(self.path, INTERFACE, "SetLimits", "a{sv}", options_to_bus(limits))

    async def proceed(self) -> None:
        """Go on from a point of `hold`."""
        await self._peer.call(self.path, INTERFACE, "Continue")

    async def progress(self) -> AsyncGenerator[JobStatus, None]:
        """The status as it is, then at every change (at most ten a second), up to the one that has ended.

        :raises BusError: when the daemon goes.
        """
        async with contextlib.aclosing(self._peer.signals((PROPERTIES, "PropertiesChanged"))) as signals:
            await anext(signals)
            status = await self.status()
            yield status
            while status.state != "ended":
                heard = await anext(signals)
                if heard is not None and heard[0] == self.path and heard[2][0] == INTERFACE:
                    status = update(replace(status), heard[2][1])
                    yield status

    async def outcome(self) -> JobStatus:
        """Wait for its end."""
        async with contextlib.aclosing(self.progress()) as progress:
            async for status in progress:
                if status.state == "ended":
                    return status
        raise AssertionError("progress ends with the end, or an error")
