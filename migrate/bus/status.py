"""Jobs and machines as management sees them: plain data, each field a property on the bus. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Final, TypeVar

from migrate.bus import library
from migrate.bus.service import Property

ROOT: Final = "/org/vmferry"
JOBS: Final = f"{ROOT}/job"
MACHINES: Final = f"{ROOT}/machine"
#: An object path that stands for none.
NONE: Final = "/"


def _as(signature: str, default: Any) -> Any:
    return field(default=default, metadata={"signature": signature})


@dataclass(slots=True)
class JobStatus:
    """One job: of org.vmferry.Job1 (docs/dbus) every property, by its name in snake case. Unknown numbers are 0 or negative."""

    id: str = _as("s", "")
    machine: str = _as("s", "")
    kind: str = _as("s", "")  #: migrate, check, recover or incoming
    to: str = _as("s", "")  #: of an incoming job, who sends
    started_at: float = _as("d", 0.0)  #: s since the epoch, by this host's clock
    phase: str = _as("s", "")
    round: int = _as("u", 0)
    remaining_bytes: int = _as("t", 0)  #: of this round
    sent_bytes: int = _as("t", 0)  #: of memory, in all rounds
    dirty_rate: int = _as("t", 0)  #: bytes/s that the guest dirtied in the last round
    send_rate: int = _as("t", 0)  #: bytes/s
    expected_downtime_ms: float = _as("d", 0.0)
    downtime_limit_ms: float = _as("d", 0.0)
    bandwidth: int = _as("t", 0)  #: bytes/s; 0: no limit
    state: str = _as("s", "running")  #: running, held or ended
    outcome: str = _as("s", "")
    running_on: str = _as("s", "")  #: source, destination or neither
    exit_code: int = _as("i", -1)  #: -1: it goes on
    downtime_ms: float = _as("d", -1.0)  #: that it took; -1: not known
    reasons: list[dict[str, str]] = field(default_factory=list, metadata={"signature": "aa{ss}"})
    """Each: device ("": none), phase, reason, remedy."""


@dataclass(slots=True)
class MachineStatus:
    """One machine: of org.vmferry.Machine1 (docs/dbus) every property, by its name in snake case."""

    name: str = _as("s", "")
    state: str = _as("s", "")
    detail: str = _as("s", "")
    memory_bytes: int = _as("t", 0)
    devices: list[dict[str, Any]] = field(default_factory=list, metadata={"signature": "aa{sv}"})
    """Each: id, type, tracker (text), version, pid."""
    job: str = _as("o", NONE)  #: the path of the job that goes on


Status = TypeVar("Status", JobStatus, MachineStatus)


def member(item: Field[Any]) -> str:
    """The property's name of a field: `sent_bytes` is SentBytes."""
    return "".join(part.capitalize() for part in item.name.split("_"))


def properties(
    kind: type[JobStatus | MachineStatus], get: Callable[[], JobStatus | MachineStatus]
) -> list[Property]:
    def one(item: Field[Any]) -> Property:
        nested = item.metadata["signature"] == "aa{sv}"

        def getter() -> Any:
            value = getattr(get(), item.name)
            return [_variants(entry) for entry in value] if nested else value

        return Property(member(item), item.metadata["signature"], getter)

    return [one(item) for item in fields(kind)]


def _variants(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: library.variant("u" if isinstance(value, int) else "s", value) for key, value in entry.items()
    }


def from_bus(kind: type[Status], values: Mapping[str, Any]) -> Status:
    """Of what GetAll answers. A property that is missing or not known is no error: the daemon may be of another version."""
    return update(kind(), values)


def update(status: Status, values: Mapping[str, Any]) -> Status:
    for item in fields(status):
        if member(item) in values:
            setattr(status, item.name, values[member(item)])
    return status


def job_path(job: str) -> str:
    return f"{JOBS}/{job}"


def machine_path(name: str) -> str:
    """The name as part of an object path: what is no ASCII letter or digit is `_` and two hex digits."""
    escaped = "".join(
        char if char.isascii() and char.isalnum() else "".join(f"_{byte:02x}" for byte in char.encode())
        for char in name
    )
    return f"{MACHINES}/{escaped}"
