"""`ferry demo` when something goes wrong before COMMIT: the guest goes on at the source, and who is to blame is named."""

from __future__ import annotations

import re

import pytest

from migrate.machine import ledger
from tests.integration.demo.demo_runs import DemoRun
from tests.integration.demo.outcomes import DEVICES, MIB, check

#: Milliseconds. A guest that nobody stops ticks every 10; the rest is for a shared CI machine.
UNSTOPPED = 2000

#: A loaded machine saves and loads slowly; what is shown here is not how fast.
PATIENT = ("--downtime", "5000")


@pytest.mark.demo("--scenario", "incompatible", "--keep")
def test_an_incompatible_destination_refuses_with_both_reasons(played: DemoRun) -> None:
    last = check(played, "refused", "source", 3)
    reasons = {reason["device"]: reason for reason in last["reasons"]}
    assert reasons.keys() == {"uart0", "display0"}
    assert len(last["reasons"]) == 2
    assert {reason["phase"] for reason in last["reasons"]} == {"preflight"}
    assert re.search(r"versions 2, 3 .* version 1", reasons["uart0"]["reason"])
    assert "display" in reasons["display0"]["reason"]
    assert all(reason["remedy"] for reason in last["reasons"])


@pytest.mark.demo("--scenario", "incompatible", "--keep")
def test_a_refusal_sends_no_page_and_never_stops_the_guest(played: DemoRun) -> None:
    last = played.outcome
    assert (last["ram_bytes_sent"], last["rounds"], last["downtime_ms"]) == (0, [], None)
    assert played.phases == ["preflight"]
    assert last["guest"]["longest_gap_ms"] < UNSTOPPED
    assert played.kept is not None
    log = (played.kept / "hosta" / "machines" / "demo" / "supervisor.log").read_text()
    states = re.findall(r"event=state machine=demo from=\S+ to=(\S+)", log)
    assert states[:3] == ["running", "outgoing", "running"], log
    assert "stopped" not in states


@pytest.mark.demo("--scenario", "load-failure", "--keep", *PATIENT)
def test_a_device_that_fails_to_load_is_named_by_both_hosts(played: DemoRun) -> None:
    last = check(played, "aborted", "source", 1, "destination")
    assert last["destination"]["outcome"] == "aborted"
    for told in (last["reasons"], last["destination"]["reasons"]):
        [reason] = told
        assert (reason["device"], reason["phase"]) == ("rtc0", "load")
        assert "told to fail" in reason["reason"]
    assert "load" in played.phases  # it was stopped
    assert "commit" not in played.phases
    assert last["verified"] == {"ram": None, "devices": None}


@pytest.mark.demo("--scenario", "load-failure", "--keep", *PATIENT)
def test_after_a_failed_load_both_ledgers_say_that_it_is_over(played: DemoRun) -> None:
    assert played.kept is not None
    verdicts = [ledger.verdict_of(ledger.read(played.kept / host, "demo")) for host in ("hosta", "hostb")]
    assert verdicts == [ledger.Verdict.RESUMED, ledger.Verdict.ABORTED]
    assert {path.stem for path in played.kept.glob("*.blob")} == DEVICES


@pytest.mark.demo("--scenario", "destination-killed", *PATIENT)
def test_a_destination_killed_in_round_2_leaves_the_guest_running_and_never_stopped(played: DemoRun) -> None:
    last = check(played, "aborted", "source", 1)
    [reason] = last["reasons"]
    assert reason["phase"] == "pre-copy"
    assert "hostb" in reason["reason"]
    assert reason["remedy"]
    assert len(last["rounds"]) == 2
    assert "stop" not in played.phases
    assert [event["at"] for event in played.of_kind("held")] == ["round:2"]


@pytest.mark.demo("--scenario", "destination-killed", "--at", "switchover", *PATIENT)
def test_a_destination_killed_between_stopped_and_ready_leaves_the_guest_running(played: DemoRun) -> None:
    last = check(played, "aborted", "source", 1)
    [reason] = last["reasons"]
    assert reason["phase"] == "load"
    assert "hostb" in reason["reason"]
    assert "stop" in played.phases
    assert "commit" not in played.phases


@pytest.mark.demo("--scenario", "coordinator-killed", *PATIENT)
def test_a_source_whose_coordinator_is_killed_after_stopped_resumes_the_guest(played: DemoRun) -> None:
    last = check(played, "aborted", "source", 1)
    [reason] = last["reasons"]
    assert reason["phase"] == "load"
    assert "SIGKILL" in reason["reason"]
    assert reason["remedy"]
    assert [event["at"] for event in played.of_kind("held")] == ["stopped"]


@pytest.mark.demo("--scenario", "cancelled", *PATIENT)
def test_a_migration_that_is_cancelled_in_precopy_leaves_the_guest_running_and_never_stopped(
    played: DemoRun,
) -> None:
    last = check(played, "aborted", "source", 1)
    [reason] = last["reasons"]
    assert (reason["phase"], reason["reason"]) == ("pre-copy", "cancelled by the user")
    assert last["ram_bytes"] == 64 * MIB
    assert "stop" not in played.phases
    assert last["guest"]["longest_gap_ms"] < UNSTOPPED
