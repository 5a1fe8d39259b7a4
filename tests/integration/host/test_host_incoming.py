"""Machines that arrive, seen from the network's side. The coordinator is fake: it does what this side writes to it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from daemons import Host, eventually, processes_of, run, state_of, until

from migrate.machine import ledger
from migrate.machine.ledger import Entry, Ledger
from migrate.transport.preamble import Kind, Preamble, encode

CONFIG: dict[str, Any] = {
    "name": "web1",
    "regions": [{"gpa": 0, "size": 4 << 20}],
    "devices": [
        {
            "id": "uart0",
            "type": "uart16550",
            "protocol": "vfio-user",
            "gpa": 0xD0000000,
            "irq": 1,
            "vectors": 1,
            "options": {},
        }
    ],
    "vcpu": False,
}


class Peer:
    """A source's end of a control connection."""

    def __init__(self, host: Host) -> None:
        self.job = secrets.token_hex(16)
        self.sock = connect(host, Preamble(Kind.CONTROL, 0, bytes.fromhex(self.job)))
        self._lines = self.sock.makefile("rb")
        self.first = self.read()

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._lines.readline())
        return found

    def want(self, packet: object) -> dict[str, Any]:
        self.sock.sendall(json.dumps(packet).encode() + b"\n")
        return self.read()

    def incoming(self, **changes: Any) -> dict[str, Any]:
        return self.want(
            {"want": "incoming", "machine": {**CONFIG, **changes}, "job": self.job, "peer": "hostb"}
        )

    def rest(self) -> bytes:
        """Everything up to the end."""
        return self._lines.read()

    def close(self) -> None:
        self._lines.close()
        self.sock.close()


def connect(host: Host, first: Preamble) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(host.directory / "accept.sock"))
    sock.sendall(encode(first))
    return sock


@pytest.fixture
def peer(host: Host) -> Peer:
    return Peer(host.start())


def test_a_coordinator_is_told_what_it_needs_and_gets_the_connection(peer: Peer, host: Host) -> None:
    spec = peer.first["spec"]
    assert peer.first["preamble"] == encode(Preamble(Kind.CONTROL, 0, bytes.fromhex(peer.job))).hex()
    assert (spec["host"], spec["host_name"], spec["credentials"]) == (str(host.directory), "here", None)
    assert str(os.getpid()) in spec["peer"]


def test_a_supervisor_waits_for_the_machine_and_ends_with_a_coordinator_that_said_nothing(
    peer: Peer, host: Host
) -> None:
    assert peer.incoming()["bus"] == f"unix:path={host.directory}/machines/web1/bus"
    assert state_of(host) == "starting"
    peer.close()
    eventually(lambda: state_of(host) is None, "the machine that nobody wants any more ends")
    eventually(lambda: len(processes_of(host.directory)) == 2, "nothing of it is left")


def test_events_and_outcome_of_an_arrival_are_kept_as_a_job(peer: Peer, host: Host) -> None:
    event = {"event": "incoming", "machine": "web1", "job": peer.job, "peer": "hostb"}
    peer.want({"event": event})
    peer.want({"event": {"event": "phase", "phase": "load"}})
    assert run(host, lambda client: client.job_events(peer.job))[1] == event
    peer.want({"event": {"event": "outcome", "outcome": "refused", "exit_code": 3}})
    peer.close()
    outcome = run(host, lambda client: until(client, peer.job, "outcome"))
    assert outcome["outcome"] == "refused"


def test_a_coordinator_that_dies_leaves_an_outcome_here_too(peer: Peer, host: Host) -> None:
    assert "bus" in peer.incoming()
    peer.sock.sendall(b'"die"\n')
    outcome = run(host, lambda client: until(client, peer.job, "outcome"))
    assert (outcome["outcome"], outcome["running_on"]) == ("aborted", "source")
    assert outcome["reasons"][0]["reason"] == "the coordinator of the migration was killed by SIGKILL"
    eventually(lambda: state_of(host) is None, "its machine ends")
    peer.close()


def test_a_machine_that_runs_here_is_not_received(peer: Peer, host: Host) -> None:
    run(host, lambda client: client.run_machine(str(host.machine())))
    answer = peer.incoming()
    assert answer["code"] == "Usage"
    assert "is on that host already; it is running" in answer["error"]["reason"]
    assert state_of(host) == "running"
    peer.close()


def test_a_machine_is_stopped_once_a_job_that_could_not_bring_another_of_its_name_has_gone(
    peer: Peer, host: Host
) -> None:
    run(host, lambda client: client.run_machine(str(host.machine())))
    peer.want({"event": {"event": "incoming", "machine": "web1", "job": peer.job, "peer": "hostb"}})
    assert peer.incoming()["code"] == "Usage"
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(lambda: run(host, lambda client: client.stop_machine("web1", force=False)))
        time.sleep(0.5)
        assert not stopped.done()
        peer.close()
        stopped.result()
    eventually(lambda: state_of(host) is None, "it has been stopped")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../../etc"}, "names no machine"),
        ({"regions": []}, "has no memory"),
        ({"regions": [{"gpa": 0, "size": -4096}]}, "size that is no number"),
        ({"regions": [{"gpa": 0, "size": 1 << 40}]}, "memory reaches"),
        ({"devices": [{**CONFIG["devices"][0], "type": "a/b"}]}, "without id, type"),
        ({"devices": [{**CONFIG["devices"][0], "options": {"path": "/etc/shadow"}}]}, "may not travel"),
        ({"devices": [CONFIG["devices"][0]] * 2}, "two devices with one id"),
        (
            {"devices": [{**CONFIG["devices"][0], "local": {"image": "/etc/shadow"}}]},
            "the image 'shadow' is not on this host",
        ),
        ({"devices": "all"}, "no list"),
    ],
)
def test_what_is_no_machine_is_refused(peer: Peer, host: Host, changes: dict[str, Any], said: str) -> None:
    assert said in peer.incoming(**changes)["error"]["reason"]
    assert state_of(host) is None
    peer.close()


def test_no_command_and_no_path_of_the_peer_is_used(peer: Peer, host: Host) -> None:
    device = {**CONFIG["devices"][0], "command": ["/bin/false"], "local": {"output": "/tmp/stolen"}}
    assert "names a file of this host" in peer.incoming(devices=[device])["error"]["reason"]
    del device["local"]
    assert "bus" in peer.incoming(devices=[device], guest="/etc/shadow")  # /bin/false would not have come up
    peer.close()


def test_a_new_manifest_ends_what_an_older_job_left(peer: Peer, host: Host) -> None:
    import asyncio

    from migrate.bus import Bus
    from migrate.bus.supervisor import SupervisorClient

    address = peer.incoming()["bus"]

    async def begin_and_leave() -> None:
        """As far as READY, then lost: the supervisor holds the copy."""
        bus = await Bus.connect(address)
        supervisor = SupervisorClient(bus)
        await supervisor.begin_incoming(peer.job, 1, "hostb")
        await supervisor.ready(peer.job)
        await bus.close()

    asyncio.run(begin_and_leave())
    peer.close()
    eventually(lambda: state_of(host) == "held", "a copy that is READY is kept")
    newer = Peer(host)
    assert "bus" in newer.incoming()
    records = ledger.read(host.directory, "web1")
    assert [record.entry for record in records] == [Entry.INCOMING, Entry.READY, Entry.ABORTED]
    newer.close()


def test_a_source_in_doubt_is_answered_by_the_ledger(peer: Peer, host: Host) -> None:
    def ask(job: str, epoch: int) -> dict[str, Any]:
        return peer.want({"want": "ask", "machine": "web1", "job": job, "epoch": epoch})

    assert ask("ab" * 16, 3) == {"answer": "unknown"}  # nothing is promised for a job that was never here
    assert ledger.read(host.directory, "web1") == []
    written = Ledger(host.directory, "web1")
    written.write(Entry.INCOMING, "ab" * 16, 3)
    written.close()
    assert ask("ab" * 16, 3) == {"answer": "aborted"}
    assert [record.entry for record in ledger.read(host.directory, "web1")] == [Entry.INCOMING, Entry.ABORTED]
    written = Ledger(host.directory, "web1")
    written.write(Entry.INCOMING, "cd" * 16, 4)
    written.write(Entry.COMMITTED, "cd" * 16, 4)
    assert "another process holds the ledger" in ask("cd" * 16, 4)["error"]["reason"]
    written.close()
    assert ask("cd" * 16, 4) == {"answer": "committed"}
    written = Ledger(host.directory, "web1")
    written.write(Entry.OUTGOING, "ef" * 16, 5)
    written.close()
    assert ask("cd" * 16, 4) == {"answer": "running"}  # it has gone on from here since
    peer.close()


def test_pages_reach_the_coordinator_of_their_session_and_no_other(peer: Peer, host: Host) -> None:
    session = bytes.fromhex(peer.job)
    with connect(host, Preamble(Kind.PAGE, 3, session)) as page:
        answer = peer.want("page")
        assert answer == {"page": 3, "preamble": encode(Preamble(Kind.PAGE, 3, session)).hex()}
        assert page.recv(4) == b"page"
        assert page.recv(1) == b""  # nobody else holds it open
    with connect(host, Preamble(Kind.PAGE, 0, secrets.token_bytes(16))) as stranger:
        assert stranger.recv(1) == b""
    peer.close()


def test_garbage_from_a_coordinator_ends_that_coordinator_alone(peer: Peer, host: Host) -> None:
    other = Peer(host)
    assert "cannot be had" in peer.want({"want": "everything"})["error"]["reason"]
    peer.sock.sendall(b'[{"want": 1}]\n')
    assert peer.rest() in (b"", b"{}\n")  # it was ended, before or after it said that it had passed that on
    assert "bus" in other.incoming()
    other.close()
    peer.close()


def test_so_many_connections_and_no_more_are_served(host: Host) -> None:
    host.start()
    peers = [Peer(host) for _ in range(16)]
    with connect(host, Preamble(Kind.CONTROL, 0, secrets.token_bytes(16))) as one_more:
        assert one_more.recv(1) == b""
    for peer in peers:
        peer.close()
    eventually(lambda: "fake_coordinator" not in str(processes_of(host.directory)), "they end")


def test_a_command_hands_its_stdin_and_stdout_over(host: Host) -> None:
    host.start()
    command = [sys.executable, "-m", "migrate.cli", "accept", "--dir", str(host.directory)]
    accept = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert accept.stdin is not None
    assert accept.stdout is not None
    assert accept.stderr is not None
    accept.stdin.write(encode(Preamble(Kind.CONTROL, 0, bytes(16))) + b'{"want": "everything"}\n')
    accept.stdin.flush()
    assert json.loads(accept.stdout.readline())["spec"]["peer"].startswith("a command, process")
    assert "cannot be had" in json.loads(accept.stdout.readline())["error"]["reason"]
    assert accept.poll() is None  # it waits, and holds neither pipe
    accept.stdin.close()
    assert accept.stdout.read() == b""
    assert (accept.wait(20), accept.stderr.read()) == (0, b"")


@pytest.mark.parametrize(
    ("stdin", "code", "said"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", 1, "it speaks HTTP"),
        (b"", 1, "closed the connection after 0"),
        (encode(Preamble(Kind.PAGE, 0, bytes(16))), 1, "a session that is not here"),
    ],
)
def test_a_command_that_cannot_says_why_in_one_line(host: Host, stdin: bytes, code: int, said: str) -> None:
    host.start()
    command = [sys.executable, "-m", "migrate.cli", "accept", "--dir", str(host.directory)]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (code, b"")
    [line] = done.stderr.decode().splitlines()
    assert said in line
    host.end(signal.SIGTERM)
    done = subprocess.run(
        command, input=encode(Preamble(Kind.PAGE, 0, bytes(16))), capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "no `ferry host` runs in" in done.stderr.decode()


def test_nothing_is_left_of_arrivals_when_the_daemon_stops(peer: Peer, host: Host) -> None:
    assert "bus" in peer.incoming()
    assert host.end(signal.SIGTERM) == 0
    eventually(lambda: processes_of(host.directory) == [], "the machine that was to arrive ended")
    peer.close()
