"""`ferry demo` with words that are wrong, or interrupted: one clear line, and nothing left."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integration.demo.demo_runs import DemoRun, run


def refused(played: DemoRun) -> str:
    """The one line on stderr of a demo that did not start anything."""
    assert played.code == 2, played
    assert played.left == []
    [line] = played.stderr.splitlines()
    assert line.startswith("ferry: "), played
    assert line.endswith(")"), f"no remedy: {line}"
    [last] = played.lines
    assert played.outcome["event"] == "outcome", last
    assert played.outcome["exit_code"] == 2, last
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--back", "--scenario=cancelled"], "--back does not go with cancelled"),
        (["--scenario", "compleated"], "compleated"),
        (["--at", "round-2"], "--at round-2"),
        (["--scenario", "destination-killed", "--at", "nowhere"], "round-2, switchover"),
        (["--destination-gone"], "commit-lost"),
        (["--scenario", "commit-lost", "--at", "after", "--destination-gone"], "must not be brought back"),
        (["--memory", "3x"], "--memory: '3x'"),
        (["--dirty-rate", "fast"], "--dirty-rate: 'fast'"),
        (["--connections", "17"], "--connections 17"),
        (["--connections", "-1"], "--connections -1"),
        (["--downtime", "0"], "--downtime 0"),
        (["--downtime", "-4"], "--downtime -4"),
        (["--tracker", "soft-dirty"], "soft-dirty"),
        (["--devices", "vfio-user", "--tracker", "scan"], "log and compare"),
        (["--devices", "x-remote", "--vmm", "qemu"], "goes with the embedded VMM"),
        (["--devices", "vfio-user", "--scenario", "load-failure"], "does not go with load-failure"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_start_nothing(words: list[str], said: str) -> None:
    assert said in refused(run(words))


def test_a_directory_to_keep_that_cannot_be_written_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"--keep {tmp_path}/file/kept" in refused(run([f"--keep={tmp_path}/file/kept"]))


def test_a_demo_that_is_interrupted_ends_everything_it_started() -> None:
    played = run([], interrupt=signal.SIGINT)
    assert played.code == 130, played
    assert len(played.processes) >= 10, played
    assert played.left == [], played
    assert played.outcome["exit_code"] == 130
    [line] = played.stderr.splitlines()
    assert "interrupted" in line
