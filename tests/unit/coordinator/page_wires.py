"""Two memories of one layout, and page channels between them over real sockets."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from migrate.coordinator.pages_in import PageReceiver
from migrate.coordinator.pages_out import PageSender, Sent
from migrate.memory import PAGE_SIZE, CompareTracker, DirtyBitmap, GuestAddress, GuestMemory, RegionSpec
from migrate.transport.channel import SocketChannel

HIGH = GuestAddress(1 << 32)
#: Two regions with a hole between them, neither a multiple of a frame, a compare block or a bitmap's byte.
LAYOUT = [RegionSpec(GuestAddress(0), 2100 * PAGE_SIZE), RegionSpec(HIGH, 53 * PAGE_SIZE)]
PAGES = 2153


def pair(name: str = "peer") -> tuple[SocketChannel, SocketChannel]:
    a, b = socket.socketpair()
    return SocketChannel(a, "unix", name), SocketChannel(b, "unix", name)


@dataclass
class Wires:
    """A sender, its receiver, and both memories."""

    source: GuestMemory
    destination: GuestMemory
    sender: PageSender
    receiver: PageReceiver
    number: int = 0

    async def round(self, dirty: DirtyBitmap, *, last: bool = False) -> tuple[Sent, tuple[bytes, ...]]:
        """Send one round and wait for its end over there."""
        self.number += 1
        sent = await self.sender.send_round(self.number, dirty, last=last)
        return sent, await self.receiver.round_ended(self.number)

    def same(self) -> bool:
        return self.source.equal_to(self.destination)


@contextlib.asynccontextmanager
async def wires(channels: int, *, compare: CompareTracker | None = None) -> AsyncIterator[Wires]:
    source, destination = GuestMemory.create(LAYOUT, "source"), GuestMemory.create(LAYOUT, "destination")
    if compare is not None:
        compare.attach(source)
        compare.start()
    ends = [pair() for _ in range(channels)]
    receiver = PageReceiver(destination)
    for index, (_, theirs) in enumerate(ends):
        receiver.join(index, theirs)
    sender = PageSender(source, [ours for ours, _ in ends], compare)
    try:
        yield Wires(source, destination, sender, receiver)
    finally:
        sender.close()
        await receiver.close()
        if compare is not None:
            compare.close()
        source.close()
        destination.close()


def fill(memory: GuestMemory, page: int, value: int) -> None:
    """Make every word of a page `value`."""
    region, local = memory.locate(page)
    region.pages[local] = value


def dirty_of(pages: Sequence[int]) -> DirtyBitmap:
    dirty = DirtyBitmap(PAGES)
    for page in pages:
        dirty.set_range(page, 1)
    return dirty
