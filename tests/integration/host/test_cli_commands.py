"""`ferry` against a daemon whose migrations are fake: exit codes, --json, Ctrl-C; and once against nothing but real parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from daemons import Host, eventually, processes_of, run, state_of

from migrate.machine.ledger import Entry, Ledger

ENDLESS = ["migrate", "web1", "--to", "exec:cancellable", "--json"]


def ferry(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migrate.cli", *words, "--dir", str(host.directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def running(host: Host) -> Host:
    host.start()
    done = ferry(host, "run", str(host.machine()))
    assert (done.returncode, done.stderr) == (0, "web1 runs; follow it with `ferry console web1`\n")
    return host


def test_a_machine_is_run_listed_paused_and_stopped(running: Host) -> None:
    assert ferry(running, "list").stdout.splitlines() == [
        "NAME  STATE    MEMORY  DEVICES  JOB  DETAIL",
        "web1  running  4 MiB   1        -    -",
    ]
    assert ferry(running, "pause", "web1").stderr == "web1: paused\n"
    [machine, outcome] = objects(ferry(running, "list", "--json").stdout)
    assert (machine["event"], machine["state"]) == ("machine", "paused")
    assert outcome == {"event": "outcome", "outcome": "listed", "exit_code": 0}
    assert ferry(running, "resume", "web1").returncode == 0
    assert objects(ferry(running, "stop", "web1", "--json").stdout)[-1]["outcome"] == "ended"
    assert ferry(running, "list").stderr == "no machine is here; start one with `ferry run MACHINE.toml`\n"
    again = ferry(running, "stop", "web1")
    assert (again.returncode, again.stderr) == (2, "ferry: no machine 'web1' runs here (see `ferry list`)\n")


@pytest.mark.parametrize(
    ("does", "code", "last"),
    [
        ("round+complete", 0, "web1 runs at exec:round+complete"),
        ("refuse", 3, "web1 was refused; nothing was stopped and it runs on here"),
        (
            "doubt",
            4,
            "web1 is stopped, both copies are intact, and this host goes on asking: `ferry recover web1`",
        ),
        ("nothing", 1, "web1 runs on here"),
    ],
)
def test_the_exit_code_of_a_migration_is_its_outcome(running: Host, does: str, code: int, last: str) -> None:
    done = ferry(running, "migrate", "web1", "--to", f"exec:{does}")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1] == last
    done = ferry(running, "migrate", "web1", "--to", f"exec:{does}", "--json")
    events = objects(done.stdout)
    assert done.returncode == events[-1]["exit_code"] == code
    assert [event["event"] for event in events].count("outcome") == 1


def test_a_check_says_what_is_against_it(running: Host) -> None:
    done = ferry(running, "check", "web1", "--to", "exec:refuse")
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "[ OK ] memory: 4.0 MiB",
        "[FAIL] uart0: too new (mend it)",
        "[FAIL] uart0: too large (mend it)",
    ]


def interruptible(host: Host) -> subprocess.Popen[str]:
    """A migration that waits to be cancelled, as far as that."""
    words = [sys.executable, "-m", "migrate.cli", *ENDLESS, "--dir", str(host.directory)]
    ferry = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert ferry.stdout is not None
    while '"held"' not in (line := ferry.stdout.readline()):
        assert line, "it ended before it was held"
    return ferry


def test_ctrl_c_takes_a_migration_back_and_waits_for_that(running: Host) -> None:
    ferry = interruptible(running)
    ferry.send_signal(signal.SIGINT)
    out, err = ferry.communicate(timeout=30)
    [outcome] = objects(out)
    assert ferry.returncode == outcome["exit_code"] == 130
    assert outcome["running_on"] == "source"
    assert err == "ferry: uart0: cancelled by the user (mend it)\n"


def test_a_second_ctrl_c_leaves_the_job_to_the_daemon_and_says_so(running: Host) -> None:
    ferry = interruptible(running)
    # The first one cannot be answered while the coordinator is stopped.
    [coordinator] = [e["pid"] for e in _started(running)]
    os.kill(coordinator, signal.SIGSTOP)
    # A stop is not there at once: one that is woken in the middle of its read still takes what was written meanwhile.
    eventually(lambda: _is_stopped(coordinator), "the coordinator stands still")
    ferry.send_signal(signal.SIGINT)
    eventually(lambda: _stdin_has(running), "the daemon was told to cancel")
    ferry.send_signal(signal.SIGINT)
    _, err = ferry.communicate(timeout=30)
    os.kill(coordinator, signal.SIGCONT)
    assert ferry.returncode == 130
    assert "goes on in the daemon (see `ferry list`)" in err
    eventually(lambda: run(running, _no_job), "the job ends without its caller")


def _started(host: Host) -> list[dict[str, Any]]:
    [journal] = (host.directory / "jobs").glob("*.jsonl")
    return [event for event in objects(journal.read_text()) if event["event"] == "started"]


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _stdin_has(host: Host) -> bool:
    """Whether a command waits in the pipe that the (stopped) coordinator reads."""
    import array
    import fcntl
    import termios

    [pipe] = (host.directory / "jobs").glob("*.in")
    fd = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        waiting = array.array("i", [0])
        fcntl.ioctl(fd, termios.FIONREAD, waiting)
        return waiting[0] > 0
    finally:
        os.close(fd)


async def _no_job(client: Any) -> bool:
    [machine] = await client.list_machines()
    return machine["active"] is None


def test_ferry_cancel_ends_a_migration_that_another_one_started(running: Host) -> None:
    migrating = interruptible(running)
    assert ferry(running, "cancel", "web1").stderr == "web1: cancelling\n"
    out, _ = migrating.communicate(timeout=30)
    assert migrating.returncode == 1
    assert objects(out)[-1]["outcome"] == "aborted"


def test_recover_waits_so_long_and_resolve_ends_it(host: Host) -> None:
    written = Ledger(host.directory, "web1")
    written.write(Entry.OUTGOING, "ab" * 16, 1, peer="exec:there")
    written.write(Entry.COMMIT, "ab" * 16, 1, peer="exec:there")
    written.close()
    host.start()
    done = ferry(host, "recover", "web1", "--wait", "0.5", "--json")
    assert done.returncode == objects(done.stdout)[-1]["exit_code"] == 4
    assert done.stderr.startswith("ferry: web1 is still in doubt after 0.5 s; the daemon goes on asking (")
    assert ferry(host, "resolve", "web1", "--keep", "source").returncode == 2  # not without --fenced
    done = ferry(host, "resolve", "web1", "--keep", "source", "--fenced")
    assert (done.returncode, done.stderr) == (0, "web1: the source keeps it; here it is ended\n")
    assert ferry(host, "recover", "web1").returncode == 2
    assert ferry(host, "run", str(host.machine())).returncode == 0  # its ledger says that it may


def test_a_machine_moves_by_the_words_of_the_readme(real_host: Host, base: Path) -> None:
    """Nothing fake: two daemons, real devices, the real coordinator, pages and control through `ferry accept`."""
    real_host.start("--name", "hosta")
    there = Host(base / "t", real=True).start("--name", "hostb")
    try:
        to = f"exec:{sys.executable} -m migrate.cli accept --dir {there.directory}"
        assert ferry(real_host, "run", str(real_host.machine())).returncode == 0
        checked = ferry(real_host, "check", "web1", "--to", to)
        assert (checked.returncode, checked.stdout.splitlines()[-1]) == (
            0,
            "[ OK ] uart0: uart16550 version 3",
        ), checked
        done = ferry(real_host, "migrate", "web1", "--to", to, "--connections", "2", "--verify", "--json")
        assert done.returncode == 0, done.stderr
        outcome = objects(done.stdout)[-1]
        assert outcome["verified"] == {"ram": True, "devices": True}
        back = f"unix:{real_host.directory}/accept.sock"
        for sender, other in (
            (there, back),
            (real_host, to),
            (there, back),
        ):  # each at once, over what the last one left
            assert state_of(sender) == "running"
            done = ferry(sender, "migrate", "web1", "--to", other)
            assert done.returncode == 0, done.stderr
        assert (state_of(real_host), state_of(there)) == ("running", None)
        assert ferry(real_host, "stop", "web1").returncode == 0
        assert there.end(signal.SIGTERM) == 0
        assert processes_of(there.directory) == []
    finally:
        there.close()
