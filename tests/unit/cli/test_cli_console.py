"""`ferry console` shows a serial port's file as it grows, and ends with the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from migrate.cli.main import main


def test_it_follows_until_the_machine_is_gone(tmp_path: Path) -> None:
    machine = tmp_path / "machines" / "web1"
    machine.mkdir(parents=True)
    (machine / "bus").touch()
    output = machine / "uart1.out"
    output.write_bytes(b"T 1\n")
    words = [sys.executable, "-m", "migrate.cli", "console", "web1", "uart1", "--dir", str(tmp_path)]
    console = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert console.stdout is not None
    assert console.stdout.readline() == b"T 1\n"
    with output.open("ab") as file:
        file.write(b"T 2\xff\n")
    assert console.stdout.readline() == b"T 2\xff\n"
    output.write_bytes(b"1\n")  # cut: the machine was started anew
    assert console.stdout.readline() == b"1\n"
    with output.open("ab") as file:
        file.write(b"last words\n")
    (machine / "bus").unlink()
    out, err = console.communicate(timeout=20)
    assert (out, console.returncode) == (b"last words\n", 0)
    assert err == b"web1 does not run here any more\n"


def test_a_machine_that_is_not_here_is_told(tmp_path: Path, capsys: object) -> None:
    assert main(["console", "web1", "--dir", str(tmp_path)]) == 2
    assert main(["console", "../x", "--dir", str(tmp_path)]) == 2
