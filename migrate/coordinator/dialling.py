"""From a destination's URI to channels: one control stream, and the page channels that join it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from migrate.coordinator.link import Link
from migrate.coordinator.pages_out import Channel
from migrate.errors import ChannelClosed, FerryError, Phase, TransportError, UsageError
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.transport import tls
from migrate.transport.control import dial_control, dial_page
from migrate.transport.stream import ControlStream
from migrate.transport.uri import LocalDestination, parse

DIAL_SECONDS = 15.0
#: A page channel on which nothing moves for this long is broken, s.
STALL_SECONDS = 30.0


def credentials_of(spec: dict[str, Any] | None) -> tls.Credentials | None:
    """A host's certificates, as the daemon names them: {"directory", "allow"}."""
    return None if spec is None else tls.load(Path(spec["directory"]), spec.get("allow", ()))


class Dialler:
    """:param job: 32 hexadecimal characters; the session that routes every connection of one migration together."""

    def __init__(self, to: str, credentials: dict[str, Any] | None, job: str) -> None:
        """:raises UsageError: for a URI that is none, or a kind that does not work yet."""
        self.destination = parse(to)
        if isinstance(self.destination, LocalDestination):
            raise UsageError(
                "local: does not work yet",
                remedy="run a second `ferry host` and use unix:/PATH of its accept.sock",
            )
        self.credentials = credentials_of(credentials)
        self.session = bytes.fromhex(job)

    async def control(self) -> ControlStream:
        return await dial_control(self.destination, self.credentials, self.session, timeout=DIAL_SECONDS)

    async def pages(self, count: int, token: bytes, link: Link) -> Sequence[Channel]:
        """`count` channels that have joined; with none, one that goes in line on the control channel.

        :raises FerryError: for the first that cannot be had; the others are closed.
        """
        if count == 0:
            return [InlineChannel(link)]
        results = await asyncio.gather(
            *(asyncio.to_thread(self._page, index, token) for index in range(count)), return_exceptions=True
        )
        made = [result for result in results if not isinstance(result, BaseException)]
        if len(made) < count:
            for channel in made:
                channel.close()
            raise next(result for result in results if isinstance(result, BaseException))
        return made

    def _page(self, index: int, token: bytes) -> Channel:
        channel = dial_page(self.destination, self.credentials, self.session, index, timeout=DIAL_SECONDS)
        try:
            channel.set_deadline(STALL_SECONDS)
            channel.send(frames.encode_control(m.encode(m.Join(token, index))))
        except FerryError:
            channel.close()
            raise
        return channel


class InlineChannel:
    """Page frames on the control channel, for a command that gives one connection only. Used by one page thread."""

    def __init__(self, link: Link) -> None:
        self.peer = link.stream.peer
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._aborted = False

    def send(self, data: memoryview | bytes) -> None:
        if self._aborted:
            raise ChannelClosed("the channel was closed here", phase=Phase.PRECOPY)
        writing = asyncio.run_coroutine_threadsafe(self._link.write(bytes(data)), self._loop)
        try:
            writing.result(STALL_SECONDS)
        except TimeoutError:
            raise TransportError(
                f"{self.peer} has taken nothing for {STALL_SECONDS:g} s",
                phase=Phase.PRECOPY,
                remedy="look at the load and the log of that host",
            ) from None

    def send_runs(self, views: Sequence[memoryview], places: Sequence[tuple[int, int]] = ()) -> None:
        self.send(b"".join(views))

    def recv_into(self, view: memoryview) -> None:
        raise ChannelClosed("nothing is received on this channel", phase=Phase.PRECOPY)

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        self._aborted = True
