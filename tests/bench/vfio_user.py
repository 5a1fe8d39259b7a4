"""Register reads and DMA of a device behind our vfio-user server, beside one behind libvfio-user's (raw), by the same client.

libvfio-user is no package: FERRY_LIBVFIO_USER names a checkout of it that is built in build/. Without it there is no raw figure.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from devices.protocols.vfio_user.client import Client
from migrate.errors import DeviceGone
from migrate.memory.memfd import create_memfd
from tests.bench.figures import MIB, Figure, Scale
from tests.interop.libvfio.__main__ import build

_ROOT = Path(__file__).parents[2]
_WINDOW = 0x1000_0000
#: Reads that are sent ahead of their replies at a time.
_BATCH = 256


def run(scale: Scale) -> Iterator[Figure]:
    named = os.environ.get("FERRY_LIBVFIO_USER")
    with tempfile.TemporaryDirectory(prefix="vf-") as made, contextlib.ExitStack() as stack:
        directory = Path(made)
        ours = [sys.executable, "-m", "tests.interop.libvfio.ours", f"{made}/ours"]
        clients = [_client(stack, ours, f"{made}/ours", dict(os.environ))]
        if named:
            program, environment = build(Path(named), directory)
            clients.append(_client(stack, [str(program), f"{made}/s"], f"{made}/s", environment))
        note = "raw: libvfio-user" if named else "FERRY_LIBVFIO_USER names no libvfio-user to compare with"
        reads = 200 if scale.quick else 5000
        transfers = 4 if scale.quick else 200
        cases: list[tuple[str, str, Callable[[Client], float]]] = [
            ("region reads of 4 bytes, one by one", "1/s", lambda client: _reads(client, reads)),
            ("region reads of 4 bytes, pipelined", "1/s", lambda client: _pipelined(client, reads)),
            ("DMA writes of 4 KiB, a register write each", "MiB/s", lambda client: _dma(client, 4096, transfers)),
            ("DMA writes of 1 MiB, a register write each", "MiB/s", lambda client: _dma(client, MIB, transfers)),
        ]  # fmt: skip
        for case, unit, measure in cases:
            samples: list[list[float]] = [[] for _ in clients]
            for _ in range(scale.runs(7)):
                for client, found in zip(clients, samples, strict=True):
                    found.append(measure(client))
            yield Figure("vfio-user", case, unit, samples[0], samples[1] if named else (), note)


def _client(
    stack: contextlib.ExitStack, command: list[str], path: str, environment: dict[str, str]
) -> Client:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd=_ROOT)
    stack.callback(process.wait)
    stack.callback(process.kill)
    while True:
        try:
            client = Client.connect(path)
            break
        except DeviceGone:  # it does not listen yet
            if process.poll() is not None:
                raise
            time.sleep(0.01)
    stack.callback(client.close)
    memory = create_memfd("bench", MIB)
    client.dma_map(_WINDOW, MIB, memory, 0)
    os.close(memory)
    return client


def _reads(client: Client, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        client.region_read(0, 0, 4)
    return count / (time.perf_counter() - start)


def _pipelined(client: Client, count: int) -> float:
    batch = [(0, 0, 4)] * min(count, _BATCH)
    start, done = time.perf_counter(), 0
    while done < count:
        done += len(client.read_many(batch))
    return done / (time.perf_counter() - start)


def _dma(client: Client, size: int, count: int) -> float:
    client.region_write(0, 0, 4, size)
    start = time.perf_counter()
    for _ in range(count):
        client.region_write(0, 8, 8, _WINDOW)
    return size * count / MIB / (time.perf_counter() - start)
