"""A small language for one value of a state: `.queues[2].size`, `.rx_fifo[3]` (a byte), `.` (all of it)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Final

from migrate.errors import UsageError

_STEP: Final = re.compile(r"\.([a-z0-9_]{1,64})|\[(-?[0-9]{1,9})\]")


def find(state: object, path: str) -> object:
    """The value there.

    :raise UsageError: if the path is none, or leads nowhere; the nearest name is given.
    """
    steps = [] if path in ("", ".") else _steps(path)
    seen = ""
    for name, number in steps:
        if number is None:
            if not isinstance(state, Mapping):
                raise _nowhere(path, f"{seen or 'the state'} has no fields")
            if name not in state:
                near = difflib.get_close_matches(name, list(state), 1)
                known = (
                    f"; the nearest is {seen}.{near[0]}" if near else f"; there are {', '.join(state)}"[:200]
                )
                raise _nowhere(path, f"there is no {seen}.{name}{known}")
            state, seen = state[name], f"{seen}.{name}"
        else:
            if not isinstance(state, Sequence) or isinstance(state, str):
                raise _nowhere(path, f"{seen or 'the state'} is no list and no bytes")
            if not -len(state) <= number < len(state):
                raise _nowhere(path, f"{seen} has {len(state)} items")
            state, seen = state[number], f"{seen}[{number}]"
    return state


def _steps(path: str) -> list[tuple[str, int | None]]:
    found: list[tuple[str, int | None]] = []
    at = 0
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            raise UsageError(
                f"{path[:80]!r} is no path: it goes wrong at {path[at : at + 20]!r}",
                remedy="write it as .field, .list[3], .list[3].field",
            )
        found.append((step[1] or "", int(step[2]) if step[2] is not None else None))
        at = step.end()
    return found


def _nowhere(path: str, why: str) -> UsageError:
    return UsageError(f"{path[:80]} leads nowhere: {why}", remedy="see `ferry blob show` for what is there")
