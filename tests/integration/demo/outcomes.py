"""The last line of `ferry demo --json`: its keys, and what has to be true of it in every scenario."""

from __future__ import annotations

from typing import Any

from tests.integration.demo.demo_runs import DemoRun

KEYS = {
    "event", "outcome", "running_on", "exit_code", "reasons", "ram_bytes", "ram_bytes_sent", "rounds", "downtime_ms",
    "downtime", "slowest_device", "guest", "verified",
}  # fmt: skip
DOWNTIME = {"stop", "pages", "save", "send", "load", "commit", "resume", "network"}
DEVICES = {"uart0", "rtc0", "display0", "disk0", "vcpu0"}
MIB = 1 << 20


def check(run: DemoRun, outcome: str, running_on: str, exit_code: int, *extra: str) -> dict[str, Any]:
    """The last line, once it is seen to be whole and to say this.

    :param extra: keys of this scenario alone.
    """
    last = run.outcome
    assert [event["event"] == "outcome" for event in run.events].index(True) == len(run.events) - 1, run
    said = (last["outcome"], last["running_on"], last["exit_code"], run.code)
    assert said == (outcome, running_on, exit_code, exit_code), run
    assert last.keys() == KEYS | set(extra), run
    for reason in last["reasons"]:
        assert reason.keys() == {"device", "phase", "reason", "remedy"}, run
        assert reason["reason"], run
        assert "Traceback" not in reason["reason"], run
    check_rounds(run, last)
    check_guest(run, last["guest"])
    assert last["verified"].keys() == {"ram", "devices"}, run
    return last


def check_rounds(run: DemoRun, last: dict[str, Any]) -> None:
    rounds = last["rounds"]
    assert [item["n"] for item in rounds] == list(range(1, len(rounds) + 1)), run
    for item in rounds:
        assert item.keys() == {"n", "pages", "bytes", "seconds", "dirty_rate"}, run
        assert item["bytes"] == item["pages"] * 4096, run
    assert last["ram_bytes_sent"] == sum(item["bytes"] for item in rounds), run


def check_guest(run: DemoRun, guest: dict[str, Any]) -> None:
    """It was seen to work before, and goes on after; it found nothing wrong and missed no tick."""
    assert guest.keys() == {"ticks_before", "ticks_after", "corrupt", "missed", "longest_gap_ms"}, run
    assert guest["ticks_before"] >= 30, run
    assert guest["ticks_after"] >= guest["ticks_before"] + 30, run
    assert (guest["corrupt"], guest["missed"]) == (0, 0), run
    assert guest["longest_gap_ms"] > 0, run


def check_moved(run: DemoRun, *, clock_moves: bool = True) -> dict[str, Any]:
    """The guest went over and nothing was lost.

    :param clock_moves: its clock knows how long the machine stood still. Over vfio-user nobody can tell it.
    """
    last = check(run, "completed", "destination", 0)
    assert last["reasons"] == []
    assert last["ram_bytes"] == 64 * MIB
    assert len(last["rounds"]) >= 2  # one while it ran, and the last one
    assert last["verified"] == {"ram": True, "devices": True}
    assert last["downtime"].keys() == DOWNTIME
    assert all(part >= 0 for part in last["downtime"].values()), run
    assert abs(sum(last["downtime"].values()) - last["downtime_ms"]) < 0.1, run
    assert last["slowest_device"] in DEVICES | {"scsi0"}
    # The guest stood still for all of it, but for what it still did while it was being stopped and word of its run was on the way.
    own = last["downtime"]
    gone = last["downtime_ms"] - own["stop"] - own["network"] - own["resume"]
    assert not clock_moves or last["guest"]["longest_gap_ms"] > gone, run
    assert run.stderr == ""
    return last
