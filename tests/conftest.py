"""What every test may rely on: in CI a skip is a failure, and no process of a test outlives it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

IN_CI = bool(os.environ.get("CI"))

# A shell's background job ignores Ctrl-C, and so would all that tests start: what they interrupt would go on for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# As `ferry` does for what it starts.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests start thousands of processes: each would compile all of our modules anew, which is a quarter of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes says something of the machine, not of the code: a shared one must not fail a test.
hypothesis.settings.register_profile("vmferry", deadline=None, print_blob=True)
hypothesis.settings.load_profile("vmferry")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    _forbid_skip(report)
    return report  # type: ignore[return-value]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    _forbid_skip(report)
    return report  # type: ignore[return-value]


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A newcomer without the optional parts sees them skipped with the reason; CI has every part."""
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where nothing may be: {report.longrepr}"
