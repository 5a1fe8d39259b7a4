"""What a user does by hand, with two `ferry host` and the command line: there and back again by every kind of destination."""

from __future__ import annotations

import shlex
import signal

import pytest

from tests.faults.rig import FERRY, MACHINE, Host, Said, Trail

Pair = tuple[Host, Host]
PATIENT = ("--downtime", "5000")


def by_exec(host: Host) -> str:
    """What ssh would run there."""
    return f"exec:{shlex.join([*FERRY, 'accept', '--dir', str(host.directory)])}"


def moved(there: Host, said: Said) -> None:
    assert said.code == 0, said
    assert (said.outcome["outcome"], said.outcome["running_on"]) == ("completed", "destination"), said
    assert said.outcome["verified"] == {"ram": True, "devices": True}, said
    assert said.err == [], said
    there.ticks_on()


def test_a_machine_goes_there_and_back_and_there_by_tls_unix_and_a_command(here: Pair) -> None:
    a, b = here
    trail = Trail(a, b)
    listed = a.ferry("list")
    assert listed.code == 0
    assert [line.split()[:5] for line in listed.out] == [
        ["NAME", "STATE", "MEMORY", "DEVICES", "JOB"],
        [MACHINE, "running", "16", "MiB", "3"],
    ]
    assert b.ferry("list").out == []

    checked = a.ferry("check", MACHINE, "--to", b.tls)
    assert checked.code == 0, checked
    assert [line[:6] for line in checked.out] == ["[ OK ]"] * 4

    moved(b, a.ferry("migrate", MACHINE, "--to", b.tls, "--verify", "--json", *PATIENT))
    a.becomes("")
    trail.goes(b)
    a.is_still()
    assert a.ferry("list").out == []

    moved(
        a, b.ferry("migrate", MACHINE, "--to", a.unix, "--verify", "--connections", "2", "--json", *PATIENT)
    )
    b.becomes("")
    trail.goes(a)
    b.is_still()

    command = ("--to", by_exec(b), "--verify", "--connections", "0", "--json")
    moved(b, a.ferry("migrate", MACHINE, *command, *PATIENT))
    a.becomes("")
    trail.goes(b)

    command = ("--to", by_exec(a), "--verify", "--connections", "2", "--json")
    moved(a, b.ferry("migrate", MACHINE, *command, *PATIENT))
    b.becomes("")
    trail.goes(a)
    trail.check()


def test_without_json_a_migration_is_told_in_words_on_stderr(here: Pair) -> None:
    a, b = here
    there = a.ferry("migrate", MACHINE, "--to", b.tls, *PATIENT)
    assert there.code == 0, there
    assert there.out == []
    said = "\n".join(there.err)
    assert f"{MACHINE} runs at {b.tls}" in said
    assert "downtime" in said
    assert "slowest" in said
    assert b.ferry("migrate", MACHINE, "--to", a.tls, *PATIENT).code == 0


def test_a_paused_machine_arrives_paused_and_goes_on_when_it_is_told(here: Pair) -> None:
    a, b = here
    trail = Trail(a, b)
    paused = a.ferry("pause", MACHINE)
    assert paused.code == 0, paused
    a.is_still()
    begun = len(b.console())
    said = a.ferry("migrate", MACHINE, "--to", b.tls, "--verify", "--json", *PATIENT)
    assert said.code == 0, said
    assert said.outcome["verified"] == {"ram": True, "devices": True}
    b.becomes("paused")
    a.becomes("")
    b.is_still()
    assert len(b.console()) == begun
    trail.goes(b)
    resumed = b.ferry("resume", MACHINE)
    assert resumed.code == 0, resumed
    b.ticks_on()
    back = b.ferry("migrate", MACHINE, "--to", a.tls, "--json", *PATIENT)
    assert back.code == 0, back
    b.becomes("")
    trail.goes(a)
    a.ticks_on()
    trail.check()


def test_a_paused_machine_whose_migration_is_refused_stays_paused(here: Pair) -> None:
    a, b = here
    assert a.ferry("pause", MACHINE).code == 0
    said = a.ferry("migrate", MACHINE, "--to", f"tls://127.0.0.1:{b.port}?name=nobody")
    assert said.code == 1, said
    assert a.state() == "paused"
    a.is_still()
    assert a.ferry("resume", MACHINE).code == 0
    a.ticks_on()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ctrl_c_in_precopy_takes_the_migration_back(here: Pair, number: signal.Signals) -> None:
    a, b = here
    trail = Trail(a)
    migrating = a.begin("migrate", MACHINE, "--to", b.tls, "--hold", "round:1")
    job = migrating.until("job")["job"]
    migrating.until("held", at="round:1")
    migrating.process.send_signal(number)
    said = migrating.end()
    assert said.code == 130, said
    assert (said.outcome["outcome"], said.outcome["running_on"]) == ("aborted", "source")
    assert said.outcome["exit_code"] == 130
    assert a.state() == "running"
    a.ticks_on()
    # The other side was told, and by whom.
    assert "cancelled" in b.outcome_of(job)["reasons"][0]["reason"]
    b.becomes("")
    trail.check()


def test_cancel_from_another_terminal_takes_it_back_too(here: Pair) -> None:
    a, b = here
    migrating = a.begin("migrate", MACHINE, "--to", b.tls, "--hold", "stopped")
    migrating.until("held", at="stopped")
    assert a.ferry("cancel", MACHINE).code == 0
    said = migrating.end()
    assert said.code == 1, said
    assert "cancelled" in said.outcome["reasons"][0]["reason"]
    assert "the machine runs on here" in said.outcome["reasons"][0]["remedy"]
    a.ticks_on()


def test_check_gives_every_reason_at_once_and_the_guest_does_not_notice(here: Pair) -> None:
    a, _ = here
    toml = "[device.rtc]\navailable = false\n[device.uart16550]\n"
    toml += f'command = ["{FERRY[0]}", "-m", "devices.uart16550", "--max-version", "1"]\n'
    c = Host(a.pen, "hostc", toml=toml).start()
    try:
        said = a.ferry("check", MACHINE, "--to", c.unix)
        assert said.code == 3, said
        verdicts = {line[7:].split(":")[0]: line[1:5].strip() for line in said.out}
        assert verdicts == {"memory": "OK", "vcpu0": "OK", "rtc0": "FAIL", "uart0": "FAIL"}, said
        assert c.machines() == []
        assert a.state() == "running"
    finally:
        c.close()


def test_a_machine_that_moved_away_is_not_started_here_again_by_mistake(here: Pair) -> None:
    a, b = here
    assert a.ferry("migrate", MACHINE, "--to", b.unix, *PATIENT).code == 0
    a.becomes("")
    said = a.ferry("run", str(a.pen.directory / "web1.toml"))
    assert "--fresh" in said.complaint(2)
    assert a.machines() == []
    assert b.ferry("migrate", MACHINE, "--to", a.unix, *PATIENT).code == 0
    a.ticks_on()
