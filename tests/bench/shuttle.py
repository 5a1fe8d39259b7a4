"""A machine that works on its disk goes to and fro between two hosts, 200 times: what it lost (nothing may be), what its downtime
was, what the daemons grew by, and what it costs that somebody follows the migration.

The world is that of the histories, and so are its checks after every move: every tick and every line of the guest, every sector
that it was told lasts. A run that fails one of them has no figures.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.bench.figures import Figure, Scale
from tests.histories.world import World

MOVES = 200
#: Moves until daemons have grown to what they need: what comes later is growth.
WARM = 20


def run(scale: Scale) -> Iterator[Figure]:
    followed, alone, grown, lasting = asyncio.run(
        _moves(4 if scale.quick else MOVES, 2 if scale.quick else WARM)
    )
    every = [*followed, *alone]
    p99 = float(np.percentile(every, 99))
    note = f"99th percentile {p99:.1f}; {lasting} operations on the disk lasted, none lost"
    yield Figure("shuttle", f"downtime, {len(every)} moves", "ms", every, note=note)
    yield Figure("shuttle", "downtime, followed", "ms", followed, alone, "raw: nobody listens")
    for name, values in grown.items():
        yield Figure("shuttle", f"growth of both daemons: {name}", "", [float(value) for value in values])


async def _moves(count: int, warm: int) -> tuple[list[float], list[float], dict[str, list[int]], int]:
    world = World()
    try:
        await world.begin()
        runs = await world.settle()
        downtime: tuple[list[float], list[float]] = ([], [])
        before: dict[str, dict[str, int]] = {}
        for number in range(count):
            if number == warm:
                before = {name: _size_of(world.daemon(name)) for name in world.hosts}
            follow = number // 2 % 2 == 0  # each way as often
            outcome = await world.migrate(runs, follow=follow)
            if outcome["outcome"] != "completed" or outcome["verified"] != {"ram": True, "devices": True}:
                raise RuntimeError(f"move {number + 1} ended otherwise: {outcome}")
            downtime[not follow].append(float(outcome["downtime_ms"]))
            runs = await world.settle()
        after = {name: _size_of(world.daemon(name)) for name in world.hosts}
        grown = {
            what: [after[name][what] - before[name][what] for name in world.hosts] for what in after["hosta"]
        }
        return *downtime, grown, world.lasting
    finally:
        await world.end()


def _size_of(pid: int) -> dict[str, int]:
    """Resident memory in KiB, and descriptors."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")))
    return {"KiB": kib, "descriptors": len(os.listdir(f"/proc/{pid}/fd"))}
