"""What the machine itself does in a migration: it powers off; one of its devices hangs, on either side."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.leftovers import Pen
from tests.faults.rig import MACHINE, MACHINE_TOML, Host, Running, Trail

Pair = tuple[Host, Host]
SHORT = "short1"


def migrate(a: Host, b: Host, name: str = MACHINE, at: str = "round:1") -> tuple[Running, str]:
    """A migration that waits there, and its job."""
    migrating = a.begin("migrate", name, "--to", b.tls, "--downtime", "5000", "--hold", at)
    job = migrating.until("job")["job"]
    migrating.until("held", at=at)
    return migrating, job


@contextmanager
def hanging(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was ended meanwhile
            os.kill(pid, signal.SIGCONT)


def incoming(host: Host, device: str) -> int:
    """The pid of a device that waits there."""
    [process] = [found for found in host.pen.processes() if "--id" in found.words and device in found.words
                 and f"{host.directory}/" in " ".join(found.words)]  # fmt: skip
    return process.pid


def test_a_guest_that_powers_off_in_precopy_ends_the_job_and_nothing_is_left_anywhere(
    here: Pair, ground: Pen
) -> None:
    a, b = here
    path = Path(ground.directory / "short.toml")
    path.write_text(
        MACHINE_TOML.replace(f'"{MACHINE}"', f'"{SHORT}"').replace("dirty=64", "dirty=64 ticks=900")
    )
    assert a.ferry("run", str(path)).code == 0
    migrating, job = migrate(a, b, SHORT)
    said = migrating.end()  # nobody says `continue`: that the guest has ended is the end
    assert (said.code, said.outcome["outcome"], said.outcome["running_on"]) == (
        1,
        "guest-ended",
        "neither",
    ), said
    assert said.outcome["reasons"], said
    assert a.console(SHORT).endswith(b"DONE\n")
    assert b.console(SHORT) == b""
    b.becomes("", SHORT)
    assert b.outcome_of(job)["running_on"] != "destination"
    a.ferry("stop", SHORT)


@pytest.mark.parametrize("at", ["round:1", "stopped", "ready", "committed"])
def test_a_device_that_hangs_at_the_destination_is_named_and_the_source_runs_on(here: Pair, at: str) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, _ = migrate(a, b, at=at)
    with hanging(incoming(b, "rtc0")):
        a.proceed()
        said = migrating.end()
    assert (said.code, said.outcome["running_on"]) == (1, "source"), said
    assert "rtc0" in {reason["device"] for reason in said.outcome["reasons"]}, said
    a.becomes("running")
    a.ticks_on()
    b.becomes("")
    trail.check()


@pytest.mark.parametrize("device", ["rtc0"])
def test_a_device_that_hangs_at_the_source_is_named_and_the_machine_runs_nowhere_else(
    here: Pair, device: str
) -> None:
    a, b = here
    migrating, _ = migrate(a, b)
    with hanging(a.pid_of(device)):
        a.proceed()
        said = migrating.end()
        assert said.code == 1, said
        assert said.outcome["running_on"] == "neither", said  # nobody can run it while it hangs
        [reason] = said.outcome["reasons"]
        assert reason["device"] == device, said
    b.becomes("")
    assert b.console() == b""
    machine = a.machine()
    assert machine is not None
    assert machine["state"] == "failed"
    assert device in machine["detail"]


def test_a_device_that_hangs_at_the_source_when_it_has_given_its_state_holds_nothing_up(here: Pair) -> None:
    a, b = here
    trail = Trail(a, b)
    migrating, _ = migrate(a, b, at="stopped")
    with hanging(a.pid_of("rtc0")):
        a.proceed()
        said = migrating.end()
        assert (said.code, said.outcome["running_on"]) == (0, "destination"), said
        a.becomes("")  # its process is ended, too
    trail.goes(b)
    b.ticks_on()
    trail.check()
