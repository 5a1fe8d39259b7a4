"""When to stop the guest: pure arithmetic over rounds, with the clock and the channel left outside.

The guest is stopped when what is left, at the rate that was measured, plus the *measured* time to save, load and commit, fits the
downtime limit. QEMU's estimate leaves the second part out (reference/qemu-migration.md §4), and so exceeds its limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from migrate.coordinator.limits import EXTEND_AT_MOST, OnStall

#: Rounds that send less say nothing about the channel's rate: they are all latency.
RATE_SAMPLE_BYTES = 4 << 20
#: Rounds in a row in which the remainder did not fall below its minimum: then it never will.
STALLED_ROUNDS = 6
MAX_ROUNDS = 60
#: A remainder this small is sent in less time than another round takes.
TRIFLE_BYTES = 256 << 10


class Verdict(StrEnum):
    GO_ON = "go on"
    SWITCH_OVER = "switch over"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class Decision:
    verdict: Verdict
    expected_downtime_ms: float
    why: str = ""


class Convergence:
    """:param limit_ms: the longest downtime that is allowed."""

    def __init__(self, limit_ms: float, on_stall: OnStall = OnStall.ABORT) -> None:
        self.limit_ms = limit_ms
        self.on_stall = on_stall
        self._asked_ms = limit_ms
        self.rate = 0.0  #: bytes/s, of the newest round that is a measure
        self.overhead_ms = 0.0  #: saving, loading, committing: measured in the rehearsal
        self.slowest: str | None = None  #: the participant with the longest save and load
        self._rounds = 0
        self._least: int | None = None
        self._stalled = 0

    def set_limit(self, limit_ms: float) -> None:
        """Another downtime limit, from the next decision on."""
        self.limit_ms = self._asked_ms = limit_ms
        self._stalled = 0

    def sent(self, size: int, seconds: float) -> None:
        """A round sent `size` bytes in `seconds`."""
        if seconds > 0 and (size >= RATE_SAMPLE_BYTES or not self.rate):
            self.rate = size / seconds

    def decide(self, remaining: int, dirty_rate: float) -> Decision:
        """After a round: `remaining` bytes are dirty again; `dirty_rate` in bytes/s."""
        self._rounds += 1
        rate = max(self.rate, 1.0)
        transfer_ms = 0.0 if remaining <= TRIFLE_BYTES and self.rate else remaining / rate * 1000
        expected = transfer_ms + self.overhead_ms
        if expected <= self.limit_ms:
            return Decision(Verdict.SWITCH_OVER, expected)
        if self.overhead_ms > self.limit_ms and self.on_stall is not OnStall.EXTEND_DOWNTIME:
            who = f", most of it {self.slowest}'s" if self.slowest else ""
            return Decision(
                Verdict.GIVE_UP,
                expected,
                f"saving, loading and committing alone take {self.overhead_ms:.1f} ms{who}: "
                f"more than the downtime limit of {self.limit_ms:g} ms",
            )
        if self._least is None or remaining < self._least * 0.95:
            self._least = remaining if self._least is None else min(self._least, remaining)
            self._stalled = 0
        else:
            self._stalled += 1
        stalled = self._stalled >= STALLED_ROUNDS or self._rounds >= MAX_ROUNDS
        if stalled and self.on_stall is OnStall.WAIT:
            return Decision(Verdict.GO_ON, expected)
        if (
            stalled
            and self.on_stall is OnStall.EXTEND_DOWNTIME
            and expected <= self._asked_ms * EXTEND_AT_MOST
        ):
            self.limit_ms = expected
            return Decision(
                Verdict.SWITCH_OVER, expected, f"the downtime limit was extended to {expected:.0f} ms"
            )
        if stalled:
            return Decision(
                Verdict.GIVE_UP,
                expected,
                f"after {self._rounds} rounds {remaining >> 20} MiB are still dirty: the guest dirties "
                f"{dirty_rate / 1e6:.0f} MB/s, the channel sends {self.rate / 1e6:.0f} MB/s, and the expected downtime of "
                f"{expected:.0f} ms is over the limit of {self.limit_ms:g} ms",
            )
        return Decision(Verdict.GO_ON, expected)
