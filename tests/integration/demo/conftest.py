"""Runs of `ferry demo`, and what must hold after each of them whatever it showed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.demo.demo_runs import DemoRun, Playbill, Wanted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "demo(*words, by=launcher): the `ferry demo` that `played` gives this test"
    )


def wanted_by(item: pytest.Item) -> Wanted | None:
    mark = item.get_closest_marker("demo")
    return None if mark is None else Wanted(tuple(mark.args), mark.kwargs.get("by", ""))


@pytest.fixture(scope="module")
def playbill(request: pytest.FixtureRequest) -> Iterator[Playbill]:
    """The runs of one file. Not of the session: a worker of pytest-xdist would play those of files that another has."""
    items = (item for item in request.session.items if item.path == request.path)
    bill = Playbill(wanted for item in items if (wanted := wanted_by(item)) is not None)
    yield bill
    bill.close()


@pytest.fixture
def played(request: pytest.FixtureRequest, playbill: Playbill) -> DemoRun:
    """The run that this test is marked with; it has ended, and nothing of it is left."""
    wanted = wanted_by(request.node)
    assert wanted is not None, "mark the test with demo(…)"
    found = playbill.result(wanted)
    # The check below could not fail if it saw no processes at all.
    assert len(found.processes) >= 10, f"{found}\n{found.processes}"
    assert any("dbus-daemon" in process.words[0] for process in found.processes), found.processes
    assert found.left == [], f"left behind: {found.left}\n{found}"
    return found
