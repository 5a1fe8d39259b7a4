"""Two ends of a control channel over a real socket: a Link at one or both, or raw bytes at one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from migrate.coordinator.link import Link, PageSink
from migrate.protocol import frames, messages
from migrate.protocol.messages import Hello, Message
from migrate.protocol.states import Role, Stage
from migrate.transport.channel import SocketChannel
from migrate.transport.stream import ControlStream

HELLO = Hello((messages.PROTOCOL_VERSION,), "vmferry test", "a", "incarnation")


class Raw:
    """A peer that says bytes, and keeps what it hears."""

    def __init__(self, stream: ControlStream) -> None:
        self.stream = stream

    async def say(self, *said: bytes | Message) -> None:
        for each in said:
            data = each if isinstance(each, bytes) else frames.encode_control(messages.encode(each))
            await self.stream.write(data, timeout=5)

    async def hear(self) -> Message:
        """The next message but PING and PONG."""
        while isinstance(message := await self.hear_any(), messages.Ping | messages.Pong):
            pass
        return message

    async def hear_any(self) -> Message:
        header = frames.decode_header(await self.stream.read_exactly(16, timeout=5))
        return messages.decode(
            frames.decode_control(await self.stream.read_exactly(header.length, timeout=5))
        )

    async def hang_up(self) -> None:
        await self.stream.close()


def streams() -> tuple[ControlStream, ControlStream]:
    a, b = socket.socketpair()
    return ControlStream(SocketChannel(a, "unix", "a")), ControlStream(SocketChannel(b, "unix", "b"))


@contextlib.asynccontextmanager
async def against_raw(
    role: Role = Role.SOURCE, stage: Stage = Stage.START, pages: PageSink | None = None
) -> AsyncIterator[tuple[Link, Raw]]:
    """A Link in a stage, and a peer that may say anything."""
    ours, theirs = streams()
    link, raw = Link(ours, role, pages=pages), Raw(theirs)
    link.conversation.stage = stage
    try:
        yield link, raw
    finally:
        await link.close()
        await theirs.close()


@contextlib.asynccontextmanager
async def both(stage: Stage = Stage.START) -> AsyncIterator[tuple[Link, Link]]:
    """A source's Link and a destination's, each in the same stage."""
    ours, theirs = streams()
    source, destination = Link(ours, Role.SOURCE), Link(theirs, Role.DESTINATION)
    source.conversation.stage = destination.conversation.stage = stage
    try:
        yield source, destination
    finally:
        await asyncio.gather(source.close(), destination.close())
