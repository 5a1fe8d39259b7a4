"""Downtime of an idle and of a busy guest, by `ferry demo` as a user runs it; and the prices that it is made of.

The raw limit of a downtime is what its steps cost if nothing else did: so many round trips on a machine's bus, so many syncs of a
ledger, so many crossings between two hosts, one after the other (STEPS says where they come from). `base` measures those prices.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from migrate.bus import Bus, PrivateBus, discover
from migrate.machine.ledger import Ledger
from tests.bench.figures import Figure, Scale

ROOT = Path(__file__).resolve().parents[2]
RUNS = 9
PARTS = ("stop", "pages", "save", "send", "load", "commit", "resume", "network")
#: What follows one another between the first participant's stop and RUNNING, by DESIGN 2.3 and 2.6:
#: - on the bus: quiesce of the supervisor, and in it vCPU, devices, all; collecting or saving; at the destination staging,
#:   applying, STOP, ready; commit; at the destination commit_incoming, and in it all, devices, vCPU;
#: - syncs: READY, COMMIT and COMMITTED;
#: - crossings: STOPPED, READY, COMMIT and RUNNING are two round trips.
STEPS = {"bus": 14, "sync": 3, "loopback": 2}

CASES: Sequence[tuple[str, list[str]]] = (
    ("idle", ["--dirty-rate", "0"]),
    ("25 MB/s", []),
    ("storm", ["--dirty-rate", "max"]),
)


def run_base(scale: Scale) -> Iterator[Figure]:
    count = 20 if scale.quick else 500
    for name, samples in _prices(count).items():
        yield Figure("base", name, "µs", [seconds * 1e6 for seconds in samples])


def run(scale: Scale) -> Iterator[Figure]:
    memory = "16M" if scale.quick else "256M"
    for case, words in CASES[:1] if scale.quick else CASES:
        found, floors = [], []
        for _ in range(scale.runs(RUNS)):
            prices = _prices(20)
            floors.append(1e3 * sum(count * statistics.median(prices[name]) for name, count in STEPS.items()))
            found.append(_demo([*words, "--memory", memory]))
        yield Figure(
            "downtime", f"{case}, {memory}", "ms", [float(each["downtime_ms"]) for each in found], floors,
            note=", ".join(sorted({str(each["slowest_device"]) for each in found})),
        )  # fmt: skip
        for part in PARTS:
            yield Figure(
                "downtime", f"{case}: {part}", "ms", [float(each["downtime"][part]) for each in found]
            )
        gaps = [float(each["guest"]["longest_gap_ms"]) for each in found]
        yield Figure("downtime", f"{case}: longest gap in the guest (verifies, too)", "ms", gaps)


def _demo(words: list[str]) -> dict[str, Any]:
    """The last line of a run."""
    done = subprocess.run(
        [sys.executable, "-m", "migrate.cli", "demo", "--json", *words],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if done.returncode or last.get("outcome") != "completed":
        raise RuntimeError(
            f"ferry demo {' '.join(words)} ended with {done.returncode}: {last or done.stderr}"
        )
    return last


# -- prices --------------------------------------------------------------------------------------------------------------------


def _prices(count: int) -> dict[str, list[float]]:
    """Seconds of each, so many times: a call to a device process on a private bus, a sync, a round trip over loopback."""
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    try:
        return {
            "bus": asyncio.run(_bus_round_trips(directory, count)),
            "sync": _syncs(directory, count),
            "loopback": _loopback(count),
        }
    finally:
        shutil.rmtree(directory)


async def _bus_round_trips(directory: Path, count: int) -> list[float]:
    private = PrivateBus(directory / "bus")
    await private.start()
    command = [sys.executable, "-m", "devices.rtc", "--id", "rtc0", "--bus", private.address]
    process = await asyncio.create_subprocess_exec(*command, "--paused", cwd=ROOT, stderr=subprocess.DEVNULL)
    bus = await Bus.connect(private.address)
    try:
        while "rtc0" not in (found := await discover(bus)):
            await asyncio.sleep(0.02)
        samples = []
        for _ in range(count + 5):
            start = time.perf_counter()
            await found["rtc0"].ping()
            samples.append(time.perf_counter() - start)
        return samples[5:]
    finally:
        await bus.close()
        process.kill()
        await process.wait()
        await private.stop()


def _syncs(directory: Path, count: int) -> list[float]:
    """Where the demo's hosts have their ledgers, too: below /tmp."""
    ledger = Ledger(directory, "bench")
    samples = []
    for _ in range(count):
        os.write(ledger._fd, b"\n")
        samples.append(ledger.sync_cost_ns() / 1e9)
    ledger.close()
    return samples


def _loopback(count: int) -> list[float]:
    server = socket.create_server(("127.0.0.1", 0))
    mine = socket.create_connection(server.getsockname())
    theirs, _ = server.accept()
    for sock in (mine, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def echo() -> None:
        while data := theirs.recv(64):
            theirs.send(data)

    threading.Thread(target=echo, daemon=True).start()
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        mine.send(b"x")
        mine.recv(1)
        samples.append(time.perf_counter() - start)
    mine.close()
    server.close()
    return samples
