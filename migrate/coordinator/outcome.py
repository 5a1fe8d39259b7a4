"""What a migration says while it goes on and when it ends: JSON objects, one a line (DESIGN 2.7)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from migrate.errors import Reason

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class RoundStats:
    """One round: page bytes, wall seconds, and bytes/s that the guest dirtied meanwhile."""

    n: int
    pages: int
    bytes: int
    seconds: float
    dirty_rate: float


@dataclass(slots=True)
class Downtime:
    """Milliseconds; the parts add up to the total. `pages` is what the last pages took beyond the saving beside them; `load` and
    `resume` are the destination's own intervals; `network` is the remainder."""

    stop: float = 0.0
    pages: float = 0.0
    save: float = 0.0
    send: float = 0.0
    load: float = 0.0
    commit: float = 0.0
    resume: float = 0.0
    network: float = 0.0

    def settle(self, total: float) -> None:
        """The network is what is left of `total`. Where both sides have counted the same moments (the destination loads while the
        source still waits to hear that its own last write is done), they are the destination's."""
        left = total - (
            self.stop + self.pages + self.save + self.send + self.load + self.commit + self.resume
        )
        for name in ("send", "pages", "save"):
            twice = min(max(-left, 0.0), getattr(self, name))
            setattr(self, name, getattr(self, name) - twice)
            left += twice
        self.network = left if abs(left) > 1e-6 else 0.0  # less than a ns is the rounding of floats


@dataclass(slots=True)
class Outcome:
    """The last line. `running_on` says where the machine can run, by what this side knows for certain."""

    job: str
    machine: str
    to: str
    outcome: str = "aborted"
    running_on: str = "source"
    exit_code: int = 1
    reasons: list[Reason] = field(default_factory=list)
    ram_bytes: int = 0
    ram_bytes_sent: int = 0
    rounds: list[RoundStats] = field(default_factory=list)
    downtime_ms: float | None = None
    downtime: Downtime | None = None
    slowest_device: str | None = None
    verified_ram: bool | None = None
    verified_devices: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "event": "outcome",
            "outcome": self.outcome,
            "running_on": self.running_on,
            "exit_code": self.exit_code,
            "reasons": [reason.to_wire() for reason in self.reasons],
            "job": self.job,
            "machine": self.machine,
            "to": self.to,
            "ram_bytes": self.ram_bytes,
            "ram_bytes_sent": self.ram_bytes_sent,
            "rounds": [asdict(item) for item in self.rounds],
            "downtime_ms": None if self.downtime_ms is None else round(self.downtime_ms, 3),
            "downtime": None
            if self.downtime is None
            else {key: round(value, 3) for key, value in asdict(self.downtime).items()},
            "slowest_device": self.slowest_device,
            "verified": {"ram": self.verified_ram, "devices": self.verified_devices},
        }


def emit_stdout(event: dict[str, Any]) -> None:
    """One line on stdout, at once. When the daemon has gone, the migration goes on without a listener."""
    try:
        sys.stdout.write(json.dumps(event, separators=(",", ":")) + "\n")
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        pass


def wire_reasons(reasons: Sequence[Reason]) -> str:
    return json.dumps([reason.to_wire() for reason in reasons])


def slowest(*times: dict[str, int]) -> str | None:
    """The device whose stop, save and load together took longest."""
    total: dict[str, int] = {}
    for table in times:
        for name, ns in table.items():
            total[name] = total.get(name, 0) + ns
    return max(total, key=total.__getitem__, default=None)
