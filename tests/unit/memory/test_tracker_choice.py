from __future__ import annotations

from collections.abc import Callable

import pytest

from migrate.errors import TrackerError
from migrate.memory import DirtyBitmap, GuestAddress, LogTracker, ScanTracker, Tracker, prove


class Deaf(ScanTracker):
    """As soft-dirty on a kernel without it: no error, and never a page."""

    def collect(self, into: DirtyBitmap) -> None:
        super().collect(DirtyBitmap(into.pages))


class Blind(LogTracker):
    def mark(self, gpa: GuestAddress, length: int) -> None:
        pass


@pytest.mark.parametrize("name", ["log", "compare", "none"])
def test_these_work_everywhere(name: str, no_leaks: None) -> None:
    prove.prove(name)
    assert prove.choose(name) == name


def test_the_best_that_works_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        prove.prove("scan")
    except TrackerError as error:
        pytest.skip(str(error))
    assert prove.choose(None) == "scan"


@pytest.mark.parametrize(
    ("broken", "chosen"),
    [({"scan": Deaf}, "log"), ({"log": Blind}, "scan"), ({"scan": Deaf, "log": Blind}, None)],
)
def test_a_tracker_that_reports_nothing_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
    no_leaks: None,
    broken: dict[str, Callable[[], Tracker]],
    chosen: str | None,
) -> None:
    for name, tracker in broken.items():
        monkeypatch.setitem(prove._TRACKERS, name, tracker)
        with pytest.raises(TrackerError, match="does not work"):
            prove.choose(name)
    if chosen is None:
        with pytest.raises(TrackerError, match="no dirty tracker works here") as caught:
            prove.choose(None)
        assert caught.value.remedy == "use the tracker compare"
    else:
        assert prove.choose(None) == chosen


def test_a_name_that_is_none_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        TrackerError, match=r"no tracker 'soft-dirty' \(use one of scan, log, compare, none\)"
    ):
        prove.choose("soft-dirty")
