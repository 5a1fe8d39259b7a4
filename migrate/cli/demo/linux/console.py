"""What the Linux guest said (init.c): the lines of its serial port on both hosts, joined byte for byte, and what they prove.

A line that began on one host ends on the other: nothing may be lost between them. Lines of the kernel begin with `[`.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from migrate.cli.demo.console import GuestReport

#: Every line of the guest's that is not CORRUPT, and the kernel's.
LINE = re.compile(rb"ready|tick \d+ \d+|synced \d+|checked( \w+=\d+){4}|\[.*|")
TICK = re.compile(rb"^tick (\d+) (\d+)$", re.MULTILINE)
SYNCED = re.compile(rb"^synced (\d+)$", re.MULTILINE)


def last_tick(output: Path) -> int:
    """The number of the last whole tick line; 0 where there is none."""
    try:
        with output.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            data = file.read()
    except FileNotFoundError:
        return 0
    found = TICK.findall(data[: data.rfind(b"\n") + 1])
    return int(found[-1][0]) if found else 0


def last_synced(said: bytes) -> int:
    """The highest generation of which the guest was told that it lasts."""
    found = SYNCED.findall(said[: said.rfind(b"\n") + 1])
    return int(found[-1]) if found else 0


def read(before: bytes, after: bytes | None, at_start: int) -> GuestReport:
    """As migrate.cli.demo.console.read."""
    data = before + (after or b"")
    whole = data[: data.rfind(b"\n") + 1].replace(b"\r", b"")
    ticks = TICK.findall(whole)
    numbers = [int(number) for number, _ in ticks]
    times = [int(time) for _, time in ticks]
    strange = [line for line in whole.splitlines() if not LINE.fullmatch(line)]
    until = TICK.findall(before[: before.rfind(b"\n") + 1])
    return GuestReport(
        ticks_before=int(until[-1][0]) if until and after is not None else at_start,
        ticks_after=numbers[-1] if numbers else 0,
        corrupt=len(strange),
        missed=sum(1 for one, following in pairwise(numbers) if following != one + 1),
        longest_gap_ms=float(max((two - one for one, two in pairwise(times)), default=0)),
        strange=strange[0].decode(errors="replace")[:200] if strange else "",
    )
