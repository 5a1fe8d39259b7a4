"""A migration in words: the line that is rewritten while it goes on, and what is said at its end. Never one percentage: what is
left to send grows when the guest writes faster than the channel sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from migrate.cli.output import Output
from migrate.errors import Reason

_PARTS: Final = ("stop", "pages", "save", "send", "load", "commit", "resume", "network")
_SIDES: Final = {"source": "runs on here", "destination": "runs on the other host", "neither": "runs nowhere"}


def size(count: float) -> str:
    """Bytes, in the unit that gives the fewest digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(ms: float) -> str:
    return f"{ms:.1f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


class Report:
    """Shows the events of one job as they come."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._phase = ""
        self._round: dict[str, Any] = {}
        self._limits: dict[str, Any] = {}
        self._shown: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
            "job": self._show_limits,
            "limits": self._show_limits,
            "phase": self._show_phase,
            "round": self._show_round,
            "progress": self._show_progress,
            "held": self._show_held,
            "in_doubt": self._show_doubt,
            "warning": self._show_warning,
            "outcome": self._show_outcome,
        }

    def show(self, event: Mapping[str, Any]) -> None:
        self._output.event(event)
        shown = self._shown.get(str(event.get("event")))
        if shown is not None:
            shown(event)

    # -- while it goes on ------------------------------------------------------------------------------------------------

    def _show_phase(self, event: Mapping[str, Any]) -> None:
        self._phase = str(event.get("phase"))
        self._update(self._line(), f"phase: {self._phase}")

    def _show_limits(self, event: Mapping[str, Any]) -> None:
        """What holds from now on; said where it is changed by somebody else than who started the job."""
        self._limits |= {key: event[key] for key in ("downtime_ms", "bandwidth") if key in event}
        if event.get("event") == "limits":
            rate = self._limits.get("bandwidth")
            self._update(
                self._line(),
                f"limits: downtime {duration(self._limits.get('downtime_ms') or 0)}, "
                + (f"bandwidth {size(rate)}/s" if rate else "no limit of bandwidth"),
            )

    def _show_round(self, event: Mapping[str, Any]) -> None:
        self._round = dict(event)
        self._update(self._line(), self._line())

    def _update(self, live: str, line: str) -> None:
        """Rewrite the line of a terminal, or print a line where there is none."""
        if self._output.is_live:
            self._output.live(live)
        else:
            self._output.say(line)

    def _show_progress(self, event: Mapping[str, Any]) -> None:
        self._round |= {"n": event.get("n"), "remaining": event.get("remaining")}
        self._output.live(self._line())

    def _line(self) -> str:
        known = self._round
        if "n" not in known:
            return f"{self._phase} …"
        words = [f"round {known['n']}", f"remaining {size(known.get('remaining') or 0)}"]
        if "send_rate" in known:
            rate, allowed = self._limits.get("bandwidth"), self._limits.get("downtime_ms")
            words += [
                f"dirty {size(known.get('dirty_rate') or 0)}/s, send {size(known['send_rate'])}/s"
                + (f" (limit {size(rate)}/s)" if rate else ""),
                f"expected downtime {duration(known.get('expected_downtime_ms') or 0)}"
                + (f" of {allowed:g}" if allowed else ""),
            ]
        if self._phase not in ("", "pre-copy"):
            words.insert(0, self._phase)
        return "  ".join(words)

    def _show_held(self, event: Mapping[str, Any]) -> None:
        self._output.say(f"held at {event.get('at')}")

    def _show_doubt(self, event: Mapping[str, Any]) -> None:
        self._phase = "in doubt"
        self._round = {}
        line = f"in doubt: {event.get('reason')}"
        self._update(f"{line} …", line)

    def _show_warning(self, event: Mapping[str, Any]) -> None:
        self._output.say(f"warning: {warning_of(event)}")

    # -- the end ---------------------------------------------------------------------------------------------------------

    def _show_outcome(self, event: Mapping[str, Any]) -> None:
        machine = event.get("machine", "the machine")
        if event.get("outcome") == "completed":
            for line in _completed(event):
                self._output.say(line)
            return
        for reason in reasons_of(event):
            self._output.complain(reason)
        if event.get("outcome") == "refused":
            self._output.say(f"{machine} was refused; nothing was stopped and it runs on here")
        elif event.get("outcome") == "in_doubt":
            self._output.say(
                f"{machine} is stopped, both copies are intact, and this host goes on asking: `ferry recover {machine}`"
            )
        elif event.get("outcome") == "aborted":
            self._output.say(f"{machine} {_SIDES.get(str(event.get('running_on')), 'runs nowhere')}")


def _completed(event: Mapping[str, Any]) -> list[str]:
    first = f"{event.get('machine')} runs at {event.get('to')}"
    lines = [first]
    if isinstance(ms := event.get("downtime_ms"), int | float):
        parts = event.get("downtime") or {}
        shown = ", ".join(f"{name} {parts[name]:.1f}" for name in _PARTS if name in parts)
        slowest = event.get("slowest_device")
        lines.append(
            f"downtime {duration(ms)}"
            + (f" ({shown})" if shown else "")
            + (f"; slowest: {slowest}" if slowest else "")
        )
    if isinstance(sent := event.get("ram_bytes_sent"), int) and isinstance(
        ram := event.get("ram_bytes"), int
    ):
        lines.append(f"sent {size(sent)} of {size(ram)} memory in {len(event.get('rounds') or [])} rounds")
    verified = event.get("verified") or {}
    if verified.get("ram") is not None:
        lines.append(f"verified: memory {_same(verified['ram'])}, devices {_same(verified.get('devices'))}")
    return lines


def _same(value: object) -> str:
    return "the same" if value else "DIFFERENT"


def reasons_of(event: Mapping[str, Any]) -> list[Reason]:
    """Every reason of an outcome; one of our own where it gives none."""
    raw = event.get("reasons")
    found = [Reason.from_wire(item) for item in raw] if isinstance(raw, list) else []
    return found or [
        Reason(None, "", "it ended without a reason", "look at the job's log in the host's directory")
    ]


def warning_of(event: Mapping[str, Any]) -> str:
    text = event.get("warning")
    return text if isinstance(text, str) else str(Reason.from_wire(event))
