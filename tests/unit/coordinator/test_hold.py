"""Points at which a job waits: only those that were named, each once, and not for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from migrate.coordinator import hold
from migrate.coordinator.hold import Hold
from migrate.errors import FerryError


def test_a_point_that_was_not_named_is_passed() -> None:
    events: list[dict[str, Any]] = []
    asyncio.run(asyncio.wait_for(Hold([], events.append).at("stopped"), 5))
    assert events == []


def test_a_named_point_says_so_and_waits_until_it_is_let_go_on_once() -> None:
    events: list[dict[str, Any]] = []

    async def play() -> None:
        it = Hold(["stopped", "ready"], events.append)
        waiting = asyncio.create_task(it.at("stopped"))
        await asyncio.sleep(0)
        assert events == [{"event": "held", "at": "stopped"}]
        assert not waiting.done()
        it.go_on()
        await waiting
        await it.at("stopped")  # once
        second = asyncio.create_task(it.at("ready"))
        await asyncio.sleep(0)
        assert not second.done()  # the word for the first point is not one for the second
        it.go_on()
        await second

    asyncio.run(asyncio.wait_for(play(), 5))


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "HOLD_SECONDS", 0.0)
    with pytest.raises(FerryError, match="held at ready for 0 s and not let go on"):
        asyncio.run(Hold(["ready"], lambda _: None).at("ready"))


@pytest.mark.parametrize(
    ("points", "wants"), [([], False), (["round:2"], False), (["round:3"], True), (["ready"], False)]
)
def test_precopy_goes_on_only_for_a_round_to_come(points: list[str], wants: bool) -> None:
    assert Hold(points, lambda _: None).wants_round_after(2) is wants
