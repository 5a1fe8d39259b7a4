"""The receiving process of the pre-copy bench: PageReceiver with its threads, or the raw loop, told by a pipe what comes next."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from migrate.coordinator.pages_in import PageReceiver
from migrate.memory import PAGE_SIZE, GuestAddress, GuestMemory, PageRuns, RegionSpec
from tests.bench import raw, wires

#: How the destination's memory is before the pages come.
TOUCHED = "touched"  #: allocated and mapped, as after a prefault that had the time
BACKGROUND = "background"  #: empty; prefaulted beside the receiving, as a migration does
EMPTY = "empty"  #: empty, and never prefaulted


def serve(pipe: Connection, directory: str, size: int) -> None:
    """Until the pipe closes. Answers each command with "joined", then "done", then (first words, last words) XORed together."""
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), size)], "destination")
    everything = PageRuns([(0, memory.page_count)])
    place, bound = wires.listen(Path(directory))
    pipe.send(place)
    while True:
        try:
            what, transport, count, state = pipe.recv()
        except EOFError:
            os._exit(0)  # nothing of this process is worth a clean end
        if state == TOUCHED:
            memory.prefault(everything, lambda: False)
            memory.regions[0].pages[:, (0, 511)] = 0  # so that a page that does not come is seen
        else:
            memory.punch(everything)
        gc.collect()
        pipe.send("ready")
        sockets = wires.accept(place, transport, count, bound[transport])
        if what == "raw":
            pipe.send("joined")
            raw.receive(memory, sockets)
            pipe.send("done")
            for sock in sockets:
                sock.close()
        else:
            asyncio.run(_receive(pipe, memory, sockets, everything if state == BACKGROUND else None))
        edges = memory.regions[0].pages[:, (0, 511)]
        pipe.send(tuple(int(word) for word in np.bitwise_xor.reduce(edges, axis=0)))


async def _receive(
    pipe: Connection, memory: GuestMemory, sockets: list[socket.socket], prefault: PageRuns | None
) -> None:
    pages = PageReceiver(memory)
    channels = [wires.channel(sock) for sock in sockets]
    for index, channel in enumerate(channels):
        channel.set_deadline(60.0)  # as the destination: some deadline, so that the socket is polled
        pages.join(index, channel)
    pipe.send("joined")
    if prefault is not None:
        pages.prefault(prefault)
    await pages.round_ended(1)
    pipe.send("done")
    await pages.close()


def first_touch(size: int) -> GuestMemory:
    """Empty memory of `size` bytes, for measuring what touching it costs."""
    return GuestMemory.create([RegionSpec(GuestAddress(0), size // PAGE_SIZE * PAGE_SIZE)], "touch")
