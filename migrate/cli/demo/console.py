"""What the guest said: the lines of its UART on both hosts, joined byte for byte, and what they prove.

The format is the guest's (devices/vcpu/guest/README.md): `T <tick> <now µs> <longest gap µs> <gap µs> <pages rewritten>` each tick,
`CORRUPT <what> …` where one thing is off; `B`, `V` and `L` at the start, `D` and `F` after a flush of a disk. A line that began on
one host ends on the other: nothing may be lost between them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

#: Every line that is not CORRUPT: start, its disk, a tick, sectors that are durable.
LINE = re.compile(rb"B( \d+){3,4}|V( \d+){4}|L( \d+){3}|T( \d+){5}|[DF]( \d+){2}")
TICK = re.compile(rb"^T (\d+) (\d+) (\d+) (\d+) (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class GuestReport:
    """What the guest proves. Gaps are milliseconds on the guest's own clock."""

    ticks_before: int  #: the last tick that the first host printed before the machine moved, or the job began
    ticks_after: int  #: the last tick of all
    corrupt: int  #: CORRUPT lines, and lines that are no line of this guest
    missed: int  #: places where the numbering of ticks skips or repeats
    longest_gap_ms: float
    strange: str = ""  #: the first of the lines that are counted as corrupt

    def to_json(self) -> dict[str, int | float]:
        return {
            "ticks_before": self.ticks_before,
            "ticks_after": self.ticks_after,
            "corrupt": self.corrupt,
            "missed": self.missed,
            "longest_gap_ms": self.longest_gap_ms,
        }


def last_tick(output: Path) -> int:
    """The number of the last whole tick line in a UART's output; 0 where there is none."""
    try:
        with output.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            data = file.read()
    except FileNotFoundError:
        return 0
    found = TICK.findall(data)
    return int(found[-1][0]) if found else 0


def read(before: bytes, after: bytes | None, at_start: int) -> GuestReport:
    """:param before: all that the UARTs put out until the machine moved. :param after: on the other host, if it ran there.
    :param at_start: the last tick before the migration was asked for."""
    data = before + (after or b"")
    whole = data[: data.rfind(b"\n") + 1]
    ticks = TICK.findall(whole)
    numbers = [int(match[0]) for match in ticks]
    missed = sum(1 for one, next_one in pairwise(numbers) if next_one != one + 1)
    strange = [line for line in whole.splitlines() if not LINE.fullmatch(line)]
    until = TICK.findall(before)
    return GuestReport(
        ticks_before=int(until[-1][0]) if until and after is not None else at_start,
        ticks_after=numbers[-1] if numbers else 0,
        corrupt=len(strange),
        missed=missed,
        longest_gap_ms=max((int(match[2]) for match in ticks), default=0) / 1000,
        strange=strange[0].decode(errors="replace")[:200] if strange else "",
    )


def output_of(path: Path) -> bytes:
    """What a UART has put out; nothing where it was never there."""
    return path.read_bytes() if path.exists() else b""
