"""What the events of a job come to: the JobStatus that management sees. No I/O; what a coordinator says is shown, not obeyed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from migrate.bus.status import JobStatus
from migrate.errors import MAX_TEXT, Reason

_MOST: Final = (1 << 64) - 1


class Progress:
    """Folds events, in their order, into `status`."""

    def __init__(self, status: JobStatus) -> None:
        self.status = status
        self._rounds_sent = 0

    def take(self, event: Mapping[str, Any]) -> bool:
        """Answers whether the event is one that nobody should hear of late."""
        kind = event.get("event")
        fold = _FOLDS.get(kind) if isinstance(kind, str) else None
        if fold is None:
            return False
        if kind != "limits":  # which may change while it is held
            self.went_on()
        fold(self, event)
        return kind not in ("progress", "round")

    def went_on(self) -> None:
        """It was told to go on from where it was held."""
        if self.status.state == "held":
            self.status.state = "running"

    def _job(self, event: Mapping[str, Any]) -> None:
        self.status.started_at = _number(event.get("at"))
        self._limits(event)

    def _limits(self, event: Mapping[str, Any]) -> None:
        if "downtime_ms" in event:
            self.status.downtime_limit_ms = _number(event["downtime_ms"])
        if "bandwidth" in event:
            self.status.bandwidth = _whole(event["bandwidth"])

    def _phase(self, event: Mapping[str, Any]) -> None:
        self.status.phase = _text(event.get("phase"))

    def _progress(self, event: Mapping[str, Any]) -> None:
        status = self.status
        status.round = _small(event.get("n"))
        status.remaining_bytes = _whole(event.get("remaining"))
        status.sent_bytes = max(status.sent_bytes, self._rounds_sent + _whole(event.get("sent")))

    def _round(self, event: Mapping[str, Any]) -> None:
        status = self.status
        self._rounds_sent = min(_MOST, self._rounds_sent + _whole(event.get("bytes")))
        status.sent_bytes = max(status.sent_bytes, self._rounds_sent)
        status.round = _small(event.get("n"))
        if "remaining" in event:
            status.remaining_bytes = _whole(event["remaining"])
            status.dirty_rate = _whole(event.get("dirty_rate"))
            status.send_rate = _whole(event.get("send_rate"))
            status.expected_downtime_ms = _number(event.get("expected_downtime_ms"))

    def _held(self, event: Mapping[str, Any]) -> None:
        self.status.state = "held"

    def _doubt(self, event: Mapping[str, Any]) -> None:
        self.status.phase = "in doubt"

    def _outcome(self, event: Mapping[str, Any]) -> None:
        status = self.status
        status.state = "ended"
        status.outcome = _text(event.get("outcome"))
        status.running_on = _text(event.get("running_on"))
        code = event.get("exit_code")
        status.exit_code = code if isinstance(code, int) and 0 <= code < 256 else 1
        if isinstance(event.get("downtime_ms"), int | float):
            status.downtime_ms = _number(event["downtime_ms"])
        sent = event.get("ram_bytes_sent")
        status.sent_bytes = _whole(sent) if sent else status.sent_bytes
        if status.outcome == "completed":
            status.remaining_bytes = 0
        given = event.get("reasons")
        status.reasons = [_reason(item) for item in given] if isinstance(given, list) else []


_FOLDS: Final[Mapping[str, Callable[[Progress, Mapping[str, Any]], None]]] = {
    "job": Progress._job,
    "limits": Progress._limits,
    "phase": Progress._phase,
    "progress": Progress._progress,
    "round": Progress._round,
    "held": Progress._held,
    "in_doubt": Progress._doubt,
    "outcome": Progress._outcome,
}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value <= _MOST else 0.0


def _whole(value: object) -> int:
    return int(_number(value)) & _MOST


def _small(value: object) -> int:
    return min(_whole(value), 0xFFFFFFFF)


def _text(value: object) -> str:
    """What D-Bus can carry of a text: no NUL and no half of a surrogate pair."""
    text = value[:MAX_TEXT] if isinstance(value, str) else ""
    return text.replace("\0", " ").encode(errors="replace").decode()


def _reason(value: object) -> dict[str, str]:
    reason = Reason.from_wire(value)
    return {
        "device": _text(reason.device), "phase": _text(reason.phase), "reason": _text(reason.reason),
        "remedy": _text(reason.remedy),
    }  # fmt: skip
