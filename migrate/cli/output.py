"""Everything that `ferry` prints. People read stderr, with one line that is rewritten where it is a terminal; stdout is for what
was asked for, and with --json for objects alone: one a line, the last one the outcome.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from migrate.errors import FerryError

_CLEAR = "\r\x1b[K"


class Output:
    """:param out: stdout. :param err: stderr. :param json: objects on `out`, and nothing for people but errors."""

    def __init__(self, out: TextIO, err: TextIO, *, json: bool = False) -> None:
        self.json = json
        self._out, self._err = out, err
        self._terminal = err.isatty() and os.environ.get("TERM") != "dumb" and not json
        self._live = False

    @property
    def is_live(self) -> bool:
        """Whether `live` shows anything."""
        return self._terminal

    def event(self, event: Mapping[str, Any]) -> None:
        """An object of --json."""
        if self.json:
            print(json.dumps(event), file=self._out, flush=True)

    def data(self, line: str) -> None:
        """A line of what was asked for."""
        if not self.json:
            self._clear()
            print(line, file=self._out, flush=True)

    def bulk(self, lines: Iterable[str]) -> None:
        """Many lines of what was asked for. Each is made when it is printed, also where nothing is printed."""
        for line in lines:
            if not self.json:
                self._out.write(f"{line}\n")
        self._out.flush()

    def say(self, line: str) -> None:
        """A line for people."""
        if not self.json:
            self._clear()
            print(line, file=self._err, flush=True)

    def live(self, line: str) -> None:
        """The line that is rewritten; nothing where stderr is no terminal."""
        if self._terminal:
            try:
                width = os.get_terminal_size(self._err.fileno()).columns
            except OSError:
                width = 80
            self._err.write(_CLEAR + line[: max(1, width - 1)])
            self._err.flush()
            self._live = True

    def complain(self, reason: object) -> None:
        """`ferry: REASON (REMEDY)`, also with --json: stderr is never parsed."""
        self._clear()
        print(f"ferry: {reason}", file=self._err, flush=True)

    def failure(self, error: FerryError, outcome: str = "failed") -> int:
        """Say why a command failed; answers with its exit code."""
        for reason in error.reasons():
            self.complain(reason)
        self.event(
            {
                "event": "outcome",
                "outcome": outcome,
                "exit_code": error.exit_code,
                "reasons": [reason.to_wire() for reason in error.reasons()],
            }
        )
        return error.exit_code

    def _clear(self) -> None:
        if self._live:
            self._err.write(_CLEAR)
            self._live = False
