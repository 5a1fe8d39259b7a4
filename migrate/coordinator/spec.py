"""What a source migration is asked for, what both sides settle, and what it has promised: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from migrate.coordinator.limits import OnStall


@dataclass(frozen=True, slots=True)
class Spec:
    """What the daemon asks for (one JSON object)."""

    job: str
    machine: str
    bus: str
    to: str
    host_name: str
    incarnation: str
    credentials: dict[str, Any] | None = None
    connections: int = 1
    downtime_ms: float = 300.0
    verify: bool = False
    check_only: bool = False
    keep: str = ""
    hold: list[str] = field(default_factory=list)
    doubt_seconds: float = 30.0
    bandwidth: float = 0.0  #: bytes/s of pages; 0 is no limit
    timeout_seconds: float = 0.0  #: of pre-copy; 0 is no limit
    on_stall: str = OnStall.ABORT


@dataclass(frozen=True, slots=True)
class Agreed:
    """What both sides settled before anything moved."""

    versions: dict[str, int]
    token: bytes
    connections: int
    incarnation: str  #: the peer's
    most: int  #: page channels that the peer takes


@dataclass(frozen=True, slots=True)
class Committed:
    """COMMIT is in the ledger."""

    stopped_ns: int  #: how long the machine had stood still
    at: int  #: monotonic ns
    took_ns: int
