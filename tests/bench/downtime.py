"""Downtime of an idle and of a busy guest, by `ferry demo` as a user runs it; beside it what its steps alone cost (prices.py)."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tests.bench.figures import Figure, Scale
from tests.bench.prices import ROOT, prices

RUNS = 9
PARTS = ("stop", "pages", "save", "send", "load", "commit", "resume", "network")
#: Words for `ferry demo`. A storm rewrites all the time and as fast as it can.
CASES: Sequence[tuple[str, list[str]]] = (
    ("idle", ["--dirty-rate", "0"]),
    ("25 MB/s", []),
    ("storm", ["--dirty-rate", "max"]),
)


def run_base(scale: Scale) -> Iterator[Figure]:
    """The prices."""

    async def measure() -> list[dict[str, float]]:
        async with prices() as price:
            return [await price.sample() for _ in range(scale.runs(300))]

    samples = asyncio.run(measure())
    for name in samples[0]:
        yield Figure("base", name, "µs", [each[name] * 1e6 for each in samples])


def run(scale: Scale) -> Iterator[Figure]:
    memory = "16M" if scale.quick else "256M"
    for case, words in CASES[:1] if scale.quick else CASES:
        found, floors = asyncio.run(_runs([*words, "--memory", memory], scale.runs(RUNS)))
        slowest = ", ".join(sorted({str(each["slowest_device"]) for each in found}))
        total = [float(each["downtime_ms"]) for each in found]
        yield Figure("downtime", f"{case}, {memory}", "ms", total, floors, f"slowest: {slowest}")
        for part in PARTS:
            yield Figure(
                "downtime", f"{case}: {part}", "ms", [float(each["downtime"][part]) for each in found]
            )
        gaps = [float(each["guest"]["longest_gap_ms"]) for each in found]
        yield Figure("downtime", f"{case}: gap in the guest", "ms", gaps, note="with the demo's full compare")


async def _runs(words: list[str], count: int) -> tuple[list[dict[str, Any]], list[float]]:
    """Last lines, and the floor in ms before each run."""
    found, floors = [], []
    async with prices() as price:
        for _ in range(count):
            floors.append(await price.floor() * 1e3)
            found.append(await asyncio.to_thread(_demo, words))
    return found, floors


def _demo(words: list[str]) -> dict[str, Any]:
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
