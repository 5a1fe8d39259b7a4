"""The daemon itself: it comes up, is killed, comes back, goes down; and what it says when it cannot."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from daemons import Host, eventually, processes_of, run, state_of

from migrate.bus.host import INTERFACE, NAME, PATH, HostClient
from migrate.errors import DeviceError, UsageError
from migrate.transport import pki

SHAPE = dict[tuple[str, str], list[tuple[str, str, str]]]


def sockets_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_socket()]


def shape(xml: str) -> SHAPE:
    """Members with their arguments: (kind, name) → (name, type, direction)."""
    interface = ElementTree.fromstring(xml).find(f"interface[@name='{INTERFACE}']")
    assert interface is not None
    return {
        (member.tag, member.get("name", "")): [
            (arg.get("name", ""), arg.get("type", ""), arg.get("direction", ""))
            for arg in member.findall("arg")
        ]
        or [("", member.get("type", ""), member.get("access", ""))]
        for member in interface
    }


def test_it_serves_the_interface_that_is_documented(host: Host) -> None:
    host.start()

    async def introspect(client: HostClient) -> str:
        [xml] = await client._bus.call(
            NAME, PATH, "org.freedesktop.DBus.Introspectable", "Introspect", timeout=5
        )
        return str(xml)

    documented = Path(__file__).parents[3] / "docs" / "dbus" / f"{INTERFACE}.xml"
    assert shape(run(host, introspect)) == shape(documented.read_text())


def test_a_machine_outlives_a_daemon_that_is_killed_and_one_that_is_stopped(host: Host) -> None:
    host.start()
    run(host, lambda client: client.run_machine(str(host.machine())))
    [before] = run(host, lambda client: client.list_machines())
    assert before["state"] == "running"
    for number in (signal.SIGKILL, signal.SIGTERM):
        host.end(number)
        host.start()  # also over the stale sockets of the one that was killed
        [after] = run(host, lambda client: client.list_machines())
        assert (after["state"], after["pid"]) == ("running", before["pid"])
        assert [d["pid"] for d in after["devices"]] == [d["pid"] for d in before["devices"]]


def test_after_stop_no_process_and_no_socket_is_left(host: Host) -> None:
    host.start()
    run(host, lambda client: client.run_machine(str(host.machine())))
    run(host, lambda client: client.pause_machine("web1"))
    assert state_of(host) == "paused"
    run(host, lambda client: client.resume_machine("web1"))
    run(host, lambda client: client.stop_machine("web1", force=False))
    assert state_of(host) is None
    assert len(processes_of(host.directory)) == 2  # the daemon and its bus
    assert host.end(signal.SIGTERM) == 0
    assert processes_of(host.directory) == []
    assert sockets_in(host.directory) == []


def test_a_machine_that_a_supervisor_loses_is_told_of(host: Host) -> None:
    host.start()
    run(host, lambda client: client.run_machine(str(host.machine())))
    [machine] = run(host, lambda client: client.list_machines())
    with contextlib.suppress(ProcessLookupError):
        subprocess.run(["kill", "-KILL", str(machine["pid"])], check=True)
    eventually(lambda: state_of(host) is None, "the machine is gone from the list")
    eventually(lambda: len(processes_of(host.directory)) == 2, "its processes died with it")
    run(host, lambda client: client.run_machine(str(host.machine())))  # over its stale sockets
    assert state_of(host) == "running"


def test_the_bus_comes_back_when_it_dies(host: Host) -> None:
    host.start()
    [bus] = [line for line in processes_of(host.directory) if "dbus-daemon" in line]
    subprocess.run(["kill", "-KILL", bus.partition(":")[0]], check=True)

    def answers() -> bool:
        with contextlib.suppress(Exception):
            return bool(run(host, lambda client: client.properties())["Name"] == "here")
        return False

    eventually(answers, "the daemon answers on a new bus")


def test_one_daemon_a_directory(real_host: Host) -> None:
    real_host.start()
    assert real_host.process is not None
    second = real_host.spawn()
    assert second.wait(20) == 2
    assert f"process {real_host.process.pid}" in real_host.log.read_text().splitlines()[-1]
    assert second.stdout is not None
    second.stdout.close()
    assert run(real_host, lambda client: client.list_machines()) == []  # the first is none the worse


def test_a_port_in_use_is_one_clear_line_and_nothing_is_left(real_host: Host, base: Path) -> None:
    pki.init(base / "ca")
    mine = pki.issue(base / "ca", "hosta").directory
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["--listen", f"tls://127.0.0.1:{port}", "--pki", str(mine), "--allow", "hostb"]
        ended = real_host.spawn(*words)
        out, _ = ended.communicate(timeout=20)
    assert ended.returncode == 2
    [line] = real_host.log.read_text().splitlines()
    assert line.startswith(f"ferry: cannot listen on tls://127.0.0.1:{port}: port {port} is in use already (")
    assert '"exit_code": 2' in out
    assert processes_of(real_host.directory) == []
    assert sockets_in(real_host.directory) == []


def test_an_address_of_the_network_needs_certificates_and_names(real_host: Host, base: Path) -> None:
    pki.init(base / "ca")
    mine = pki.issue(base / "ca", "hosta").directory
    for words, said in (
        (["--listen", "tls://127.0.0.1:0"], "needs certificates"),
        (["--listen", "tls://127.0.0.1:0", "--pki", str(mine)], "no list of hosts"),
        (["--listen", "127.0.0.1:99"], "no scheme"),
        (["--pki", str(base)], "cannot be read"),
    ):
        ended = real_host.spawn(*words)
        ended.communicate(timeout=20)
        assert ended.returncode == 2
        assert said in real_host.log.read_text().splitlines()[-1]


def test_the_port_that_the_kernel_chose_is_told(real_host: Host, base: Path) -> None:
    pki.init(base / "ca")
    mine = pki.issue(base / "ca", "hosta").directory
    real_host.start("--listen", "tls://127.0.0.1:0", "--pki", str(mine), "--allow", "*")
    listening = run(real_host, lambda client: client.properties())["Listen"]
    assert listening[0] == f"unix:{real_host.directory}/accept.sock"
    with socket.create_connection(("127.0.0.1", int(listening[1].rpartition(":")[2])), timeout=5) as probe:
        probe.sendall(b"GET / HTTP/1.0\r\n\r\n")
        probe.shutdown(socket.SHUT_WR)
        assert probe.recv(1) == b""
    eventually(lambda: "it speaks HTTP" in real_host.log.read_text(), "the log says who that was")


def test_what_is_wrong_with_a_machine_toml_reaches_the_caller(host: Host) -> None:
    host.start()
    path = host.machine('[machine]\nname = "web1"\nmemmory = "4M"\n')
    with pytest.raises(UsageError, match=r"unknown key 'memmory' \(did you mean 'memory'\?\)"):
        run(host, lambda client: client.run_machine(str(path)))


def test_a_device_that_does_not_start_is_named_and_nothing_is_left(host: Host) -> None:
    host.start()
    command = f'["{sys.executable}", "-c", "raise SystemExit(\'no such chip\')"]'
    path = host.machine(
        '[machine]\nname = "web1"\nmemory = "4M"\n[[device]]\nid = "odd0"\n'
        f'type = "uart16550"\ncommand = {command}\n'
    )
    with pytest.raises(DeviceError, match="odd0: its process exited with 1: no such chip"):
        run(host, lambda client: client.run_machine(str(path)))
    assert state_of(host) is None
    assert len(processes_of(host.directory)) == 2


def test_a_machine_runs_once(host: Host) -> None:
    host.start()
    run(host, lambda client: client.run_machine(str(host.machine())))
    with pytest.raises(UsageError, match="is here already; it is running"):
        run(host, lambda client: client.run_machine(str(host.machine())))
    with pytest.raises(UsageError, match=r"no machine 'web2' runs here \(did you mean 'web1'\?\)"):
        run(host, lambda client: client.pause_machine("web2"))
