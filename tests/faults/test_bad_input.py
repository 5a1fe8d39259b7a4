"""Files, ports and certificates that are wrong, given to the real commands: one clear line, an exit code, nothing left behind."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.faults.leftovers import Pen, pen
from tests.faults.rig import MACHINE, MACHINE_TOML, Host, ferry, keys_for

Pair = tuple[Host, Host]


def machine_file(ground: Pen, text: str) -> Path:
    path = ground.directory / "bad.toml"
    path.write_text(text)
    return path


# -- machine.toml ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MACHINE_TOML.replace("memory =", "memroy ="), "unknown key 'memroy' (did you mean 'memory'?)"),
        (MACHINE_TOML.replace("cmdline", "comandline"), "unknown key 'comandline' (did you mean 'cmdline'?)"),
        (MACHINE_TOML.replace("[[device]]", "[[devices]]"), "unknown key 'devices' (did you mean 'device'?)"),
        (MACHINE_TOML.replace('"uart16550"', '"uart16500"'), "'uart16500' is installed here"),
        (MACHINE_TOML.replace('"16M"', '"16Q"'), "'16Q' is not a size"),
        (MACHINE_TOML.replace('"rtc0"', '"uart0"'), "two participants are called 'uart0'"),
        ("[machine\n", "is not TOML"),
        (MACHINE_TOML.replace('[vcpu]', '[vcpu]\ntracker = "scam"'), "tracker is 'scam' (did you mean 'scan'?)"),
    ],
    ids=["key", "nested-key", "table", "type", "size", "twins", "syntax", "tracker"],
)  # fmt: skip
def test_a_machine_toml_that_is_wrong_is_told_with_what_it_could_be(here: Pair, text: str, said: str) -> None:
    a, _ = here
    path = machine_file(a.pen, text.replace(f'"{MACHINE}"', '"bad"'))
    before = {process.pid for process in a.pen.processes()}
    line = a.ferry("run", str(path)).complaint(2)
    assert said in line
    assert [machine["name"] for machine in a.machines()] == [MACHINE]
    assert [str(process) for process in a.pen.processes() if process.pid not in before] == []


def test_a_machine_toml_that_is_not_there_is_told_by_its_path(here: Pair) -> None:
    a, _ = here
    assert "/nowhere.toml cannot be read: No such file" in a.ferry("run", "/nowhere.toml").complaint(2)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["sh", "-c", "echo the firmware is missing >&2; exit 1"],
            ["exited with 1", "the firmware is missing"],
        ),
        (["/nowhere/uart"], ["'/nowhere/uart' cannot be started", "No such file"]),
        (["sh", "-c", "kill -SEGV $$"], ["was killed by SIGSEGV"]),
    ],
    ids=["exits", "is-not-there", "crashes"],
)
def test_a_device_that_does_not_start_is_named_with_its_last_words(
    here: Pair, command: list[str], said: list[str]
) -> None:
    a, _ = here
    words = ", ".join(f"'{word}'" for word in command)
    text = MACHINE_TOML.replace(f'"{MACHINE}"', '"bad"').replace(
        '"uart16550"', f'"uart16550"\ncommand = [{words}]'
    )
    path = machine_file(a.pen, text)
    before = {process.pid for process in a.pen.processes()}
    line = a.ferry("run", str(path)).complaint(1)
    assert "uart0: " in line
    for part in said:
        assert part in line
    assert [machine["name"] for machine in a.machines()] == [MACHINE]
    assert [str(process) for process in a.pen.processes() if process.pid not in before] == []


def test_a_device_that_is_another_than_the_machine_wants_is_named(here: Pair) -> None:
    a, _ = here
    text = MACHINE_TOML.replace(f'"{MACHINE}"', '"bad"').replace(
        '"rtc"', f'"rtc"\ncommand = ["{sys.executable}", "-m", "devices.display"]'
    )
    line = a.ferry("run", str(machine_file(a.pen, text))).complaint(1)
    assert "rtc0: its process says it is a 'display', the machine wants a 'rtc'" in line
    assert [machine["name"] for machine in a.machines()] == [MACHINE]
    # And when it is mended it runs, under the same name.
    assert a.ferry("run", str(machine_file(a.pen, MACHINE_TOML.replace(f'"{MACHINE}"', '"bad"')))).code == 0
    assert a.ferry("stop", "bad").code == 0


def test_names_that_do_not_exist_are_told(here: Pair) -> None:
    a, b = here
    assert "'nobody'" in a.ferry("migrate", "nobody", "--to", b.tls).complaint(2)
    assert "'nobody'" in a.ferry("pause", "nobody").complaint(2)
    assert "nobody" in a.ferry("recover", "nobody").complaint(2)
    assert a.ferry("migrate", MACHINE, "--to", "ftp://hostb").complaint(2)
    assert "is on that host already" in a.ferry("migrate", MACHINE, "--to", a.unix).err[-2], "to itself"
    assert a.state() == "running"


def test_without_a_daemon_every_command_says_which_is_missing() -> None:
    with pen() as empty:
        for words in (["list"], ["run", "/x.toml"], ["migrate", "x", "--to", "unix:/x"], ["recover", "x"]):
            line = ferry(empty, *words, "--dir", str(empty.directory)).complaint(1)
            assert f"no `ferry host` runs in {empty.directory}" in line
        assert empty.left() == []


# -- the daemon's own words ------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_told_and_the_daemon_leaves_nothing_behind() -> None:
    with pen() as ground, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        keys = keys_for(ground, "hostc")["hostc"]
        words = ["host", "--dir", str(ground.directory / "c"), "--pki", str(keys), "--allow", "*"]
        listen = ["--listen", f"tls://127.0.0.1:{port}"]
        said = ferry(ground, *words, *listen)
        line = said.err[-1]
        assert said.code == 2, said
        assert f"port {port} is in use" in line
        assert line.startswith("ferry: ")
        assert ground.at_work() == []
        # Its lock is free again: the same directory serves with another port.
        host = Host(ground, "c", keys=keys).start()
        second = ferry(ground, *words)
        assert second.code == 2
        assert f"process {host.pid}" in second.err[-1]
        host.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--listen", "tls://127.0.0.1:0"], "needs certificates"),
        (["--listen", "tls://127.0.0.1:0", "--pki", "{keys}"], "allow"),
        (["--listen", "tls://127.0.0.1:0", "--pki", "/nowhere", "--allow", "*"], "/nowhere"),
        (["--listen", "tls://192.0.2.1:4789", "--pki", "{keys}", "--allow", "*"], "no such address"),
        (["--listen", "http://127.0.0.1:80"], "http"),
        (["--dir", "/tmp/" + "x" * 70], "longer than 60 bytes"),
    ],
    ids=["no-certificates", "no-allow-list", "no-pki", "no-address", "no-uri", "too-deep"],
)
def test_a_daemon_that_cannot_serve_says_why_and_ends(words: list[str], said: str) -> None:
    with pen() as ground:
        keys = keys_for(ground, "hostc")["hostc"]
        filled = [word.format(keys=keys) for word in words]
        directory = [] if "--dir" in words else ["--dir", str(ground.directory / "c")]
        done = ferry(ground, "host", *directory, *filled)
        assert done.code == 2, done
        assert said in done.err[-1], done
        assert "Traceback" not in "".join(done.err)
        assert ground.at_work() == []


# -- certificates ----------------------------------------------------------------------------------------------------------


def refused(a: Host, to: str) -> str:
    """`ferry migrate` there fails before anything moves; its one line."""
    said = a.ferry("migrate", MACHINE, "--to", to, "--json")
    line = said.complaint(1)
    assert (said.outcome["outcome"], said.outcome["running_on"]) == ("aborted", "source"), said
    assert said.outcome["ram_bytes_sent"] == 0
    assert said.outcome["reasons"][0]["phase"] == "preflight", said
    assert a.state() == "running"
    a.ticks_on(5)
    return line


def test_a_destination_with_a_certificate_of_another_ca_is_refused_by_both(here: Pair) -> None:
    a, _ = here
    c = Host(a.pen, "hostc", keys=keys_for(a.pen, "hostb", ca="other")["hostb"]).start()
    try:
        line = refused(a, f"tls://127.0.0.1:{c.port}?name=hostb")
        assert "another CA" in line
        assert c.machines() == []
    finally:
        c.close()
    assert "CA" in c.log.read_text()


def test_a_destination_whose_certificate_has_expired_is_refused_by_name(here: Pair) -> None:
    a, _ = here
    c = Host(a.pen, "hostc", keys=keys_for(a.pen, "hostc", expired=True)["hostc"]).start()
    try:
        line = refused(a, f"tls://127.0.0.1:{c.port}?name=hostc")
        assert "hostc" in line
        assert "has expired" in line
        assert "ferry pki issue" in line
    finally:
        c.close()


def test_a_destination_with_another_name_in_its_certificate_is_refused(here: Pair) -> None:
    a, b = here
    line = refused(a, f"tls://127.0.0.1:{b.port}?name=elsewhere")
    assert "elsewhere" in line
    assert "hostb" in line


def test_a_destination_that_does_not_let_this_host_in_says_so(here: Pair, keys: dict[str, Path]) -> None:
    a, _ = here
    c = Host(a.pen, "hostc", keys=keys["mallory"], allow="somebody").start()
    try:
        line = refused(a, f"tls://127.0.0.1:{c.port}?name=mallory")
        assert "hosta" in line
        assert "allow" in line
        assert c.machines() == []
    finally:
        c.close()


def test_nobody_listening_is_one_clear_line(here: Pair) -> None:
    a, _ = here
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    line = refused(a, f"tls://127.0.0.1:{port}?name=hostb")
    assert "nobody listens there" in line
    assert "nobody listens there" in refused(a, f"unix:{a.pen.directory}/no.sock") or "no such" in refused(
        a, f"unix:{a.pen.directory}/no.sock"
    )
    assert "not found" in refused(a, "exec:no-such-command-here accept")
