"""Pre-copy of incompressible pages from one process into another: PageSender, real channels, PageReceiver; beside the raw limit."""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from migrate.coordinator.pages_out import PageSender
from migrate.memory import DirtyBitmap, GuestAddress, GuestMemory, PageRuns, RegionSpec
from migrate.transport.channel import ByteChannel
from tests.bench import raw, receiving, wires
from tests.bench.figures import Figure, Scale

CONNECTIONS = (1, 2, 4)
RUNS = 7


def run(scale: Scale) -> Iterator[Figure]:
    with _pair(scale.size) as pair:
        for transport in wires.TRANSPORTS:
            for count in CONNECTIONS:
                case = f"{transport}, {count} connection{'s' if count > 1 else ''}"
                yield pair.measure(case, transport, count, receiving.TOUCHED, scale.runs(RUNS))
        for transport in ("unix", "tls"):
            for state, words in (
                (receiving.BACKGROUND, "prefault beside it"),
                (receiving.EMPTY, "no prefault"),
            ):
                case = f"{transport}, 1 connection, {words}"
                yield pair.measure(case, transport, 1, state, scale.runs(RUNS))


def run_touch(scale: Scale) -> Iterator[Figure]:
    """What the first touch of memory costs: prefault in its small steps, beside storing one word a page."""
    prefault: list[float] = []
    store: list[float] = []
    for _ in range(scale.runs(RUNS)):
        for samples in (store, prefault):
            memory = receiving.first_touch(scale.size)
            start = time.perf_counter()
            if samples is prefault:
                memory.prefault(PageRuns([(0, memory.page_count)]), lambda: False)
            else:
                memory.regions[0].pages[:, 0] = 1
            samples.append(scale.size / (time.perf_counter() - start) / 1e9)
            memory.close()
    yield Figure("touch", "prefault; raw: a store a page", "GB/s", prefault, store)


class _Pair:
    """This process with the source's memory, and the receiving one."""

    def __init__(self, pipe: Connection, place: wires.Place, size: int) -> None:
        self._pipe = pipe
        self._place = place
        self.memory = incompressible(size)
        edges = self.memory.regions[0].pages[:, (0, 511)]
        self._edges = tuple(int(word) for word in np.bitwise_xor.reduce(edges, axis=0))

    def measure(self, case: str, transport: str, count: int, state: str, runs: int) -> Figure:
        """In turn, so that what disturbs one disturbs the other. The raw limit beside a prefault is that of touched memory."""
        rates: dict[str, list[float]] = {"pages": [], "raw": []}
        raw_state = receiving.TOUCHED if state == receiving.BACKGROUND else state
        for _ in range(runs):
            for what in ("raw", "pages"):
                took = self._once(what, transport, count, raw_state if what == "raw" else state)
                rates[what].append(self.memory.size / took / 1e9)
        return Figure("precopy", case, "GB/s", rates["pages"], rates["raw"])

    def _once(self, what: str, transport: str, count: int, state: str) -> float:
        """Seconds from the first byte to the word that everything has come."""
        self._pipe.send((what, transport, count, state))
        self._expect("ready")
        sockets = wires.connect(self._place, transport, count)
        self._expect("joined")
        if what == "raw":
            start = time.perf_counter()
            raw.send(self.memory, sockets)
            self._expect("done")
            took = time.perf_counter() - start
            for sock in sockets:
                sock.close()
        else:
            took = asyncio.run(self._send([wires.channel(sock) for sock in sockets]))
        if self._pipe.recv() != self._edges:
            raise AssertionError(f"{what} over {transport}: not every page came")
        return took

    async def _send(self, channels: list[ByteChannel]) -> float:
        sender = PageSender(self.memory, channels)
        dirty = DirtyBitmap(self.memory.page_count)
        dirty.set_range(0, self.memory.page_count)
        start = time.perf_counter()
        await sender.send_round(1, dirty)
        self._expect("done")
        took = time.perf_counter() - start
        sender.close()
        return took

    def _expect(self, word: str) -> None:
        if not self._pipe.poll(wires.SECONDS * 3) or (said := self._pipe.recv()) != word:
            raise AssertionError(f"the receiving process did not say {word}")
        del said


@contextmanager
def _pair(size: int) -> Iterator[_Pair]:
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))  # sockets need short paths
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=receiving.serve, args=(theirs, str(directory), size), daemon=True
    )
    try:
        wires.certify(directory)
        process.start()
        theirs.close()
        pair = _Pair(mine, mine.recv(), size)
        yield pair
        pair.memory.close()
    finally:
        mine.close()
        process.join(5.0)
        process.kill()
        shutil.rmtree(directory)


def incompressible(size: int) -> GuestMemory:
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), size)], "source")
    pages = memory.regions[0].pages
    random = np.random.default_rng()
    for low in range(0, len(pages), 4096):
        part = pages[low : low + 4096]
        part[:] = random.integers(0, 1 << 64, part.shape, np.uint64)
    return memory
