"""kill -9 of every process of a migration, at the worst moment: at most one host runs the machine, and what died is named."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.rig import MACHINE, Host, Running, Trail, eventually

Pair = tuple[Host, Host]
PATIENT = ("--downtime", "5000")


def migrate(a: Host, b: Host, *words: str) -> tuple[Running, str]:
    """A migration that has begun, and its job."""
    migrating = a.begin("migrate", MACHINE, "--to", b.tls, *PATIENT, *words)
    return migrating, migrating.until("job")["job"]


def the_one(host: Host, module: str, *words: str) -> int:
    """The pid of the one process of this kind on this host. Ask while its daemon lives: it is known by its parent."""
    [process] = host.processes(module, *words)
    return process.pid


def kill(host: Host, pid: int) -> None:
    """It is gone when this returns."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: pid not in {process.pid for process in host.pen.processes()}, f"{pid} is dead")


def kill_one(host: Host, module: str, *words: str) -> None:
    kill(host, the_one(host, module, *words))


def goes_on(host: Host, other: Host, trail: Trail) -> None:
    """The guest runs here and nowhere else, and nothing was lost."""
    host.becomes("running")
    host.ticks_on()
    other.is_still()
    trail.check()


# -- daemons: machines and migrations go on without them -------------------------------------------------------------------


def test_the_sources_daemon_may_die_in_precopy_and_its_successor_follows_the_job_on(here: Pair) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, job = migrate(a, b, "--hold", "round:1")
    migrating.until("held", at="round:1")
    a.end(signal.SIGKILL)
    said = migrating.end()
    assert said.code == 1, said
    assert "ended while the job went on" in said.err[-1]
    a.start()
    assert a.state() == "outgoing"
    a.proceed()
    assert a.outcome_of(job)["outcome"] == "completed"
    a.becomes("")
    trail.goes(b)
    goes_on(b, a, trail)


def test_the_destinations_daemon_may_die_in_precopy_and_the_machine_ends_on_one_side(here: Pair) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, _ = migrate(a, b, "--hold", "round:1")
    migrating.until("held", at="round:1")
    b.end(signal.SIGKILL)
    a.proceed()
    said = migrating.end()
    b.start()
    if said.code == 0:
        a.becomes("")
        trail.goes(b)
        goes_on(b, a, trail)
    else:
        assert (said.code, said.outcome["running_on"]) == (1, "source"), said
        b.becomes("")
        goes_on(a, b, trail)


# -- coordinators ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["round:1", "ready"])
def test_the_destinations_coordinator_dies_before_commit_and_the_source_runs_on(here: Pair, at: str) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, _ = migrate(a, b, "--hold", at)
    migrating.until("held", at=at)
    kill_one(b, "migrate.coordinator", "destination")
    said = migrating.end()
    assert (said.code, said.outcome["running_on"]) == (1, "source"), said
    [reason] = said.outcome["reasons"]
    assert reason["phase"] == ("pre-copy" if at == "round:1" else "load")
    goes_on(a, b, trail)
    # What may be left there of a copy that was READY gives way to the next attempt.
    assert b.state() in ("", "held")
    again = a.ferry("migrate", MACHINE, "--to", b.tls, *PATIENT)
    assert again.code == 0, again
    trail.goes(b)
    goes_on(b, a, trail)


def test_a_coordinator_that_hangs_while_the_machine_stands_still_is_given_up_and_does_no_harm_when_it_wakes(
    here: Pair,
) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, job = migrate(a, b, "--hold", "stopped")
    migrating.until("held", at="stopped")
    pid = the_one(a, "migrate.coordinator", "source")
    os.kill(pid, signal.SIGSTOP)
    try:
        a.becomes("running")  # nobody asked: the supervisor has noticed
        a.ticks_on()
    finally:
        os.kill(pid, signal.SIGCONT)
    a.proceed()
    said = migrating.end()
    assert (said.code, said.outcome["running_on"]) == (1, "source"), said
    assert b.outcome_of(job)["running_on"] != "destination"
    goes_on(a, b, trail)


def test_the_sources_coordinator_dies_between_commit_and_its_sending_and_the_daemon_asks(here: Pair) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, job = migrate(a, b, "--hold", "committed")
    migrating.until("held", at="committed")
    assert a.state() == "in-doubt"
    kill_one(a, "migrate.coordinator", "source")
    migrating.end()
    # Nobody said anything: the daemon starts a coordinator that asks, and the destination writes ABORTED before it answers.
    goes_on(a, b, trail)
    b.becomes("")
    assert b.outcome_of(job)["outcome"] in ("held", "aborted")


# -- supervisors -----------------------------------------------------------------------------------------------------------


def test_the_destinations_supervisor_dies_after_committed_and_before_the_source_hears_it(here: Pair) -> None:
    a, b = here
    b.restart("--hold", "committed")
    trail = Trail(a, b)
    migrating, job = migrate(a, b, "--doubt-seconds", "2")
    b.held(job, "committed")
    kill_one(b, "migrate.coordinator", "destination")
    kill_one(b, "migrate.machine")
    said = migrating.end()
    # It committed, so the source must not resume by itself: the machine ran there.
    assert (said.code, said.outcome["outcome"], said.outcome["running_on"]) == (4, "in_doubt", "neither"), (
        said
    )
    assert any("ferry resolve" in reason["remedy"] for reason in said.outcome["reasons"])
    assert a.state() == "in-doubt"
    a.is_still()
    b.is_still()
    unfenced = a.ferry("resolve", MACHINE, "--keep", "source")
    assert unfenced.code == 2, unfenced
    assert a.state() == "in-doubt"
    resolved = a.ferry("resolve", MACHINE, "--keep", "source", "--fenced")
    assert resolved.code == 0, resolved
    goes_on(a, b, trail)


def test_the_sources_supervisor_dies_in_precopy_and_nothing_of_the_machine_is_left_anywhere(
    here: Pair,
) -> None:
    a, b = here
    migrating, job = migrate(a, b, "--hold", "round:1")
    migrating.until("held", at="round:1")
    kill_one(a, "migrate.machine")
    a.proceed()
    said = migrating.end()
    assert (said.code, said.outcome["running_on"]) == (1, "neither"), said
    assert any("supervisor" in reason["reason"].lower() for reason in said.outcome["reasons"]), said
    a.becomes("")
    b.becomes("")
    assert b.outcome_of(job)["running_on"] != "destination"
    eventually(
        lambda: not [process for process in a.pen.processes() if "devices." in str(process)],
        "no device process is left",
    )


# -- device processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["rtc0", "vcpu0"])
def test_a_device_that_dies_in_precopy_at_the_source_is_named(here: Pair, device: str) -> None:
    a, b = here
    migrating, job = migrate(a, b, "--hold", "round:1")
    migrating.until("held", at="round:1")
    a.kill_device(device)
    said = migrating.end()  # nobody says `continue`: that there is nothing left to move ends it
    assert said.code == 1, said
    assert said.outcome["running_on"] == "neither", said
    assert device in {reason["device"] for reason in said.outcome["reasons"]}, said
    machine = a.machine()
    assert machine is not None
    assert machine["state"] == "failed"
    assert device in machine["detail"]
    assert "SIGKILL" in machine["detail"]
    b.becomes("")
    told = b.outcome_of(job)
    assert device in {reason["device"] for reason in told["reasons"]}, told


@pytest.mark.parametrize("device", ["rtc0", "vcpu0"])
def test_a_device_that_dies_in_precopy_at_the_destination_is_named_and_the_source_runs_on(
    here: Pair, device: str
) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, job = migrate(a, b, "--hold", "round:1")
    migrating.until("held", at="round:1")
    b.kill_device(device)
    said = migrating.end()  # nobody says `continue`: the destination's word ends it
    assert (said.code, said.outcome["running_on"]) == (1, "source"), said
    assert device in {reason["device"] for reason in said.outcome["reasons"]}, said
    told = b.outcome_of(job)
    assert device in {reason["device"] for reason in told["reasons"]}, told
    b.becomes("")
    goes_on(a, b, trail)


@pytest.mark.parametrize("at", ["ready", "committed"])
def test_a_device_that_dies_at_a_destination_that_was_ready_is_named_and_the_source_runs_on(
    here: Pair, at: str
) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, job = migrate(a, b, "--hold", at)
    migrating.until("held", at=at)
    b.kill_device("rtc0")
    if at == "committed":
        # COMMIT is in the ledger: only that the destination wrote ABORTED, and says so, lets the source resume.
        b.becomes("")
        assert a.state() == "in-doubt"
        a.proceed()
    said = migrating.end()
    assert (said.code, said.outcome["running_on"]) == (1, "source"), said
    [reason] = said.outcome["reasons"]
    assert reason["device"] == "rtc0", said
    assert reason["phase"] == ("load" if at == "ready" else "commit")
    assert "rtc0" in {reason["device"] for reason in b.outcome_of(job)["reasons"]}
    goes_on(a, b, trail)


# -- in doubt, and started again -------------------------------------------------------------------------------------------


def test_a_machine_in_doubt_is_recovered_after_both_daemons_were_started_again(here: Pair) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, _ = migrate(a, b, "--hold", "committed")
    migrating.until("held", at="committed")
    coordinator = the_one(a, "migrate.coordinator", "source")
    b.end(signal.SIGKILL)
    a.end(signal.SIGKILL)
    kill(a, coordinator)
    migrating.end()

    a.start()
    assert a.state() == "in-doubt"
    a.is_still()
    asked = a.ferry("recover", MACHINE, "--wait", "2")
    assert asked.code == 4, asked
    assert "nobody listens there" in asked.err[0]
    assert "ferry resolve" in asked.err[-1]
    assert a.state() == "in-doubt"
    refused = a.ferry("stop", MACHINE)
    assert refused.code == 2, refused
    refused = a.ferry("resume", MACHINE)
    assert refused.code == 2, refused
    a.is_still()

    b.start()
    recovered = a.ferry("recover", MACHINE, "--wait", "60", "--json")
    assert recovered.code == 1, recovered
    assert (recovered.outcome["outcome"], recovered.outcome["running_on"]) == ("aborted", "source")
    goes_on(a, b, trail)
    b.becomes("")


def test_a_destination_that_had_committed_is_found_out_after_the_source_was_started_again(here: Pair) -> None:
    a, b = here
    b.restart("--hold", "committed")
    trail = Trail(a, b)
    migrating, job = migrate(a, b)
    b.held(job, "committed")
    coordinator = the_one(a, "migrate.coordinator", "source")
    a.end(signal.SIGKILL)
    kill(a, coordinator)
    migrating.end()
    a.start()
    # Asked or not: the daemon asks by itself, and hears that it runs there.
    a.becomes("")
    trail.goes(b)
    goes_on(b, a, trail)
    assert "not in doubt" in a.ferry("recover", MACHINE).complaint(2)
