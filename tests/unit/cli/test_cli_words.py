"""`ferry` before any command has run: help, wrong words, where the directory is, and errors that nobody foresaw."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.cli import main as main_module
from migrate.cli.main import COMMANDS, entry, main
from migrate.cli.words import directory_of, rate, where_of

#: What a command may need, and its --help never does.
HEAVY = {
    "asyncio",
    "numpy",
    "cryptography",
    "dbus_next",
    "dbus_fast",
    "msgpack",
    "ssl",
    "migrate.host",
    "migrate.bus",
}
#: Its scenarios are coroutines, and its help is the table of them.
OF_DEMO = {"asyncio", "ssl"}


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_imports_nothing_heavy(name: str) -> None:
    program = (
        "import sys\nfrom migrate.cli.main import main\n"
        f"try: main({[*([name] if name else []), '--help']!r})\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert (HEAVY - (OF_DEMO if name == "demo" else set())) & set(done.stderr.split()) == set()
    assert f"usage: ferry {name}".strip() in done.stdout


def test_help_answers_at_once() -> None:
    """In CPU time: what else this host does is not our doing."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-m", "migrate.cli", "migrate", "--help"]
        subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.150


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_by_an_example_and_the_exit_codes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "\nexample:\n  ferry " in out
    assert "\nexit codes:\n  0    done\n" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["migrat"], "ferry: there is no command 'migrat' (did you mean `ferry migrate`?)"),
        (["xyzzy"], "ferry: there is no command 'xyzzy' (see `ferry --help`)"),
        (
            ["migrate", "web1"],
            "ferry: the following arguments are required: --to (see `ferry migrate --help`)",
        ),
        (
            ["migrate", "web1", "--to", "x", "--connections", "17"],
            "ferry: argument --connections: 17 is not 0 to 16 (see `ferry migrate --help`)",
        ),
        (
            ["migrate", "web1", "--to", "x", "--downtime", "soon"],
            "ferry: argument --downtime: invalid number value: 'soon' (see `ferry migrate --help`)",
        ),
        (
            ["migrate", "web1", "--to", "x", "--bandwidth", "fast"],
            "ferry: argument --bandwidth: invalid rate value: 'fast' (see `ferry migrate --help`)",
        ),
        (
            ["resolve", "web1", "--keep", "source"],
            "ferry: nothing was decided: only you can know that the other host does not run web1"
            " (fence it, then say so with --fenced)",
        ),
        (["pki"], "ferry: the following arguments are required: init|issue (see `ferry pki --help`)"),
        (["run", "--dir", "/nowhere", "a", "b"], "ferry: unrecognized arguments: b (see `ferry run --help`)"),
    ],
)
def test_wrong_words_are_one_line_that_says_what_to_do(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_resolving_without_fencing_explains_fencing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resolve", "web1", "--keep", "destination"]) == 2
    assert "make sure that the other host cannot run this machine" in capsys.readouterr().err


def test_with_json_a_failure_is_an_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json", "--dir", "/nowhere"]) == 1
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["event"], outcome["exit_code"]) == ("outcome", 1)
    assert outcome["reasons"][0]["reason"] == "no `ferry host` runs in /nowhere"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ferry ")


def test_nobody_sees_a_traceback_unless_they_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_words: object) -> int:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(main_module, "main", broken)
    monkeypatch.delenv("FERRY_DEBUG", raising=False)
    assert entry() == 1
    assert capsys.readouterr().err == (
        "ferry: vmferry itself failed: ZeroDivisionError: a defect"
        " (run it again with FERRY_DEBUG=1 and report what it prints)\n"
    )
    monkeypatch.setenv("FERRY_DEBUG", "1")
    entry()
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_words: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "main", interrupted)
    assert entry() == 130
    assert capsys.readouterr().err == "ferry: interrupted\n"


def test_a_reader_that_goes_away_is_no_error_to_shout_about() -> None:
    command = f"{sys.executable} -m migrate.cli --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_rate_is_written_as_people_do() -> None:
    assert [rate(text) for text in ("none", "0", "65536", "64k", "1.5M", "2G")] == [
        0, 0, 65536, 65536, 3 << 19, 2 << 30,
    ]  # fmt: skip
    with pytest.raises(argparse.ArgumentTypeError):
        rate("-1M")


def test_the_bus_is_the_option_then_the_variable_unless_a_directory_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("FERRY_BUS", "FERRY_DIR"):
        monkeypatch.delenv(name, raising=False)

    def where(bus: str | None = None, given: Path | None = None) -> Path | str:
        return where_of(argparse.Namespace(bus=bus, dir=given))

    monkeypatch.setenv("FERRY_BUS", "session")
    assert where() == "session"
    assert where("system", Path("/d")) == "system"
    assert where(None, Path("/d")) == Path("/d")
    monkeypatch.setenv("FERRY_DIR", "/e")
    assert where() == Path("/e")


def directory(monkeypatch: pytest.MonkeyPatch, given: Path | None = None, **environment: str) -> Path:
    for name in ("FERRY_DIR", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return directory_of(argparse.Namespace(dir=given))


def test_the_directory_is_the_option_then_the_variable_then_on_the_users_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert directory(monkeypatch, Path("here"), FERRY_DIR="/there") == Path(os.getcwd(), "here")
    assert directory(monkeypatch, FERRY_DIR="/there") == Path("/there")
    assert directory(monkeypatch, HOME="/home/u", XDG_STATE_HOME="/s") == Path("/s/vmferry")
    assert directory(monkeypatch, HOME="/home/u") == Path("/home/u/.local/state/vmferry")


def test_where_a_home_is_too_deep_for_sockets_it_is_the_runtime_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deep = "/home/" + "x" * 60
    assert directory(monkeypatch, HOME=deep, XDG_RUNTIME_DIR="/tmp") == Path("/tmp/vmferry")
    assert directory(monkeypatch, HOME=deep, XDG_RUNTIME_DIR="/nowhere") == Path(deep, ".local/state/vmferry")
