"""`ferry demo --scenario commit-lost`: in doubt, both copies intact, and exactly one side runs in the end."""

from __future__ import annotations

import pytest

from migrate.machine.ledger import Entry, read
from tests.integration.demo.demo_runs import DemoRun
from tests.integration.demo.outcomes import check

PATIENT = ("--downtime", "5000")


def in_doubt(run: DemoRun) -> None:
    assert run.of_kind("in_doubt"), run
    assert run.phases[-2:] == ["commit", "resume"], run
    # Memory and devices were compared before COMMIT, while both stood still.
    assert run.outcome["verified"] == {"ram": True, "devices": True}
    assert run.outcome["downtime_ms"] is None


def test_a_demo_that_never_was_in_doubt_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        in_doubt(DemoRun((), None, lines=['{"event":"outcome"}']))  # type: ignore[arg-type]


@pytest.mark.demo("--scenario", "commit-lost", *PATIENT)
def test_a_commit_that_was_not_sent_ends_at_the_source_once_the_link_heals(played: DemoRun) -> None:
    last = check(played, "aborted", "source", 1, "while_in_doubt")
    in_doubt(played)
    assert last["while_in_doubt"] == {"source": "in-doubt", "destination": "held"}
    [reason] = last["reasons"]
    assert reason["phase"] == "commit"
    assert "aborted" in reason["reason"]
    assert last["guest"]["longest_gap_ms"] > 1000  # it stood still until then


@pytest.mark.demo("--scenario", "commit-lost", "--at", "after", "--keep", *PATIENT)
def test_a_commit_whose_answer_was_lost_ends_at_the_destination_once_the_link_heals(played: DemoRun) -> None:
    last = check(played, "completed", "destination", 0, "while_in_doubt")
    in_doubt(played)
    assert last["while_in_doubt"] == {"source": "in-doubt", "destination": "running"}
    [reason] = last["reasons"]
    assert "running" in reason["reason"]
    assert played.kept is not None
    said = [record.entry for record in read(played.kept / "hosta", "demo")]
    assert said == [Entry.OUTGOING, Entry.PEER, Entry.COMMIT, Entry.RELEASED]
    said = [record.entry for record in read(played.kept / "hostb", "demo")]
    assert said == [Entry.INCOMING, Entry.READY, Entry.COMMITTED]


@pytest.mark.demo("--scenario", "commit-lost", "--destination-gone", "--keep", *PATIENT)
def test_with_the_destination_gone_it_stays_in_doubt_until_the_operator_decides(played: DemoRun) -> None:
    last = check(played, "in_doubt", "source", 4, "while_in_doubt", "resolved")
    in_doubt(played)
    assert last["while_in_doubt"] == {"source": "in-doubt", "destination": "held"}
    assert last["resolved"] == {"keep": "source", "state": "running"}
    assert any("ferry resolve" in reason["remedy"] for reason in last["reasons"])
    assert played.kept is not None
    said = [record.entry for record in read(played.kept / "hosta", "demo")]
    assert said == [Entry.OUTGOING, Entry.PEER, Entry.COMMIT, Entry.RESUMED]
