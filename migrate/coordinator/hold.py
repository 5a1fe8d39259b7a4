"""Points at which a job waits to be told to go on (`--hold`): for people who look, and tests that cut and kill."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from migrate.coordinator.outcome import Emit
from migrate.errors import FerryError, Phase

#: A job that nobody lets go on gives up: a held machine may stand still.
HOLD_SECONDS = 120.0


class Hold:
    """:param points: names of points to wait at; each is waited at once."""

    def __init__(self, points: Iterable[str], emit: Emit) -> None:
        self._points = set(points)
        self._emit = emit
        self._go_on = asyncio.Event()

    def wants_round_after(self, number: int) -> bool:
        """Is there a later round to wait at? Then pre-copy goes on until it, converged or not."""
        return any(point.startswith("round:") and int(point[6:]) > number for point in self._points)

    def waits_at(self, point: str) -> bool:
        return point in self._points

    def go_on(self) -> None:
        self._go_on.set()

    async def at(self, point: str) -> None:
        """:raises FerryError: if nobody says go on in HOLD_SECONDS."""
        if point not in self._points:
            return
        self._points.discard(point)
        self._go_on.clear()
        self._emit({"event": "held", "at": point})
        try:
            await asyncio.wait_for(self._go_on.wait(), HOLD_SECONDS)
        except TimeoutError:
            raise FerryError(
                f"held at {point} for {HOLD_SECONDS:.0f} s and not let go on",
                phase=Phase.PRECOPY,
                remedy="start again",
            ) from None
