"""The events of one job, in DIR/jobs/JOB.jsonl: what JobEvents answers, also after a restart of the daemon.

The file *is* the coordinator's stdout: a daemon that is killed takes no event with it, and breaks no pipe that a coordinator
in the middle of a switchover writes to. One JSON object a line; the first is {"event": "job", …}, the last the outcome.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

#: A line longer than this is not an event (an outcome with a thousand rounds has some 100 KiB).
MAX_LINE: Final = 1 << 20
_CHUNK: Final = 64 << 10

#: Told the place of an event, its line, and what it says.
OnEvent = Callable[[int, str, dict[str, Any]], None]


class Journal:
    """Open for appending, and for reading what others append."""

    def __init__(self, path: Path, on_event: OnEvent) -> None:
        """Open or make it. Nothing is read before the first `pump`. :raises OSError: it cannot be."""
        self.path = path
        self.lines: list[str] = []
        self.first: dict[str, Any] = {}
        self.outcome: dict[str, Any] | None = None
        self.last_phase = ""
        self._on_event = on_event
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._offset = 0
        self._partial = b""

    def fileno(self) -> int:
        return self._fd

    def append(self, event: Mapping[str, Any]) -> None:
        """Add an event of our own, after those that are there."""
        self.pump()
        # A writer that was killed may have left half a line behind.
        start = b"\n" if self._partial else b""
        os.write(self._fd, start + json.dumps(event).encode() + b"\n")
        self.pump()

    def pump(self) -> None:
        """Read what has come, and tell it."""
        while chunk := os.pread(self._fd, _CHUNK, self._offset):
            self._offset += len(chunk)
            *whole, self._partial = (self._partial + chunk).split(b"\n")
            for line in whole:
                self._take(line)
            if len(self._partial) > MAX_LINE:
                self._partial = b"?"  # what follows up to the end of the line is no event either

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line) if line.strip() and len(line) <= MAX_LINE else None
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict) or self.outcome is not None:
            if line.strip():
                log.warning("event=not-an-event journal=%s line=%r", self.path, line[:200])
            return
        text = line.decode()
        number = len(self.lines)
        self.lines.append(text)
        if number == 0:
            self.first = event
        if event.get("event") == "outcome":
            self.outcome = event
        elif event.get("event") == "phase" and isinstance(event.get("phase"), str):
            self.last_phase = event["phase"]
        self._on_event(number, text, event)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All events of one kind."""
        return [event for line in self.lines if (event := json.loads(line)).get("event") == kind]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
