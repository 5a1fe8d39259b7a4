"""`ferry demo` with less than root on a new kernel has: no capabilities, no `scan`."""

from __future__ import annotations

import os

import pytest

from tests.integration.demo.demo_runs import DemoRun, run
from tests.integration.demo.launchers import LAUNCHERS, NOBODY, unprivileged
from tests.integration.demo.outcomes import check_moved

PATIENT = ("--downtime", "5000")


@pytest.mark.demo(*PATIENT, by="unprivileged")
def test_the_demo_passes_without_any_capability(played: DemoRun) -> None:
    check_moved(played)
    for process in played.processes:
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(process.status[kind], 16) == 0, f"{process} has {kind}"
        assert process.status["NoNewPrivs"] == "1", process


@pytest.mark.demo(*PATIENT, by="unprivileged")
def test_the_demo_passes_as_another_user_where_that_user_can_read_what_runs(played: DemoRun) -> None:
    other = f"--reuid={NOBODY}" in unprivileged()
    uid = str(NOBODY if other else os.geteuid())
    assert {process.status["Uid"].split()[0] for process in played.processes} == {uid}


@pytest.mark.demo(*PATIENT, by="no-pagemap-scan")
def test_on_a_kernel_without_pagemap_scan_it_says_that_it_uses_log_and_passes(played: DemoRun) -> None:
    check_moved(played)
    assert "no `scan`" in played.says()
    assert "tracked with `log`" in played.says()
    assert all(process.status["Seccomp"] == "2" for process in played.processes)


def test_scan_that_was_asked_for_and_is_not_to_be_had_is_one_clear_line() -> None:
    played = run(["--tracker", "scan"], prefix=LAUNCHERS["no-userfaultfd"]())
    assert played.code == 1, played
    assert played.left == [], played
    [line] = played.stderr.splitlines()
    assert line.startswith("ferry: "), line
    assert "0: its process exited" in line  # the display's or the vCPU's: both track
    assert "userfaultfd" in line
    assert "use the tracker log" in line
    assert "tracked with" not in played.says()
