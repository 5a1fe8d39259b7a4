"""A peer that has a valid certificate and means no good: it speaks vmferry's protocol up to a point, then says what it likes.

Built on the project's own transport and messages, with frames that its encoders would refuse to make.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from migrate.coordinator.link import Link
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.protocol.states import Role
from migrate.transport import tls
from migrate.transport.channel import Channel
from migrate.transport.control import accept_control, dial_control, dial_page
from migrate.transport.listener import Arrival, listen
from migrate.transport.stream import ControlStream
from migrate.transport.uri import TlsDestination
from tests.faults.rig import Host

T = TypeVar("T")
SECONDS = 60.0
REGION = 16 << 20


def header(kind: frames.Kind, length: int) -> bytes:
    """A frame's header that claims any length, with a right checksum (docs/protocol.md)."""
    head = struct.pack(">4sBBHI", b"VMF1", kind, 0, 0, length)
    return head + struct.pack(">I", zlib.crc32(head))


HUGE = 0xFFFF_FFFF  # 4 GiB, less a byte: the most that the field can say


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(SECONDS):
            return await work()

    return asyncio.run(bounded())


@dataclass(slots=True)
class Caller:
    """Mallory as a source."""

    host: Host
    keys: Path
    job: str

    @property
    def _where(self) -> TlsDestination:
        return TlsDestination("127.0.0.1", self.host.port, self.host.name)

    async def control(self) -> ControlStream:
        return await dial_control(self._where, tls.load(self.keys), bytes.fromhex(self.job), timeout=SECONDS)

    async def page(self, token: bytes, index: int = 0) -> Channel:
        """A page channel that has joined."""
        channel = await asyncio.to_thread(
            dial_page, self._where, tls.load(self.keys), bytes.fromhex(self.job), index, timeout=SECONDS
        )
        channel.set_deadline(SECONDS)
        await asyncio.to_thread(channel.send, frames.encode_control(m.encode(m.Join(token, index))))
        return channel


@asynccontextmanager
async def greeted(host: Host, keys: Path) -> AsyncIterator[tuple[Caller, Link]]:
    """A conversation in which both have said HELLO."""
    caller = Caller(host, keys, secrets.token_hex(16))
    link = Link(await caller.control(), Role.SOURCE)
    try:
        await link.send(m.Hello((m.PROTOCOL_VERSION,), "mallory", "mallory", "0"))
        await link.expect(m.Hello, timeout=SECONDS)
        yield caller, link
    finally:
        await link.close()


async def started(
    caller: Caller, link: Link, *, devices: tuple[m.DeviceEntry, ...] = (), machine: str = "mallory"
) -> Channel:
    """On, up to pre-copy, with one page channel."""
    regions = (m.RegionEntry(0, REGION),)
    await link.send(m.Manifest(machine, caller.job, 1, False, regions, devices, ()))
    accept = await link.expect(m.Accept, timeout=SECONDS)
    await link.send(m.Start(1, ()))
    channel = await caller.page(accept.token)
    await link.expect(m.Started, timeout=SECONDS)
    return channel


@asynccontextmanager
async def destination(keys: Path, talk: Callable[[ControlStream], Awaitable[None]]) -> AsyncIterator[int]:
    """Mallory as a destination: `talk` has every control connection, after TLS. The port."""
    credentials = tls.load(keys, ["*"])

    async def arrived(arrival: Arrival) -> None:
        stream = await accept_control(arrival.sock, arrival.first, credentials, timeout=SECONDS)
        try:
            await talk(stream)
        finally:
            await stream.close()

    listener = await listen(TlsDestination("127.0.0.1", 0), arrived, credentials)
    try:
        [address] = listener.addresses
        assert isinstance(address, TlsDestination)
        yield address.port
    finally:
        await listener.close()
