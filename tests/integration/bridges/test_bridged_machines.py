"""A running machine whose devices are servers that speak vfio-user and have no bus, moved by `ferry migrate`; and what is said of
servers that die, hang, refuse, or cannot be moved."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.leftovers import Pen, pen
from tests.faults.rig import MACHINE, Host, Said, Trail, eventually, two_hosts

PATIENT = ("--downtime", "5000")
PYTHON = shlex.quote(sys.executable)
HERE = Path(__file__).parent
OURS = "--id {id} --socket {socket} --{start} --migration vfio-user"
SERVERS = {
    "uart16550": f"{PYTHON} -m devices.uart16550 {OURS} --option output={{directory}}/{{id}}.out",
    "rtc": f"{PYTHON} -m devices.rtc {OURS}",
    "display": f"{PYTHON} -m devices.display {OURS} --option vram={{vram}}",
    "nailed": f"{PYTHON} {HERE / 'nailed.py'} {{socket}}",
    "virtio-blk": f"{PYTHON} -m devices.virtio_blk {OURS} --option image={{image}}",
}
#: What a model is at the source, and at the destination.
FAULTY = {
    "load-fails": (f"{PYTHON} -m devices.rtc {OURS}", f"{PYTHON} -m devices.faulty rtc --fail apply {OURS}"),
    "load-hangs": (f"{PYTHON} -m devices.rtc {OURS}", f"{PYTHON} -m devices.faulty rtc --fail hang-apply {OURS}"),
    "stop-fails": (f"{PYTHON} -m devices.faulty rtc --fail stop {OURS}", f"{PYTHON} -m devices.rtc {OURS}"),
    "at-home": (f"{PYTHON} -m devices.rtc {OURS}", ""),
    "ends-at-once": (f"{PYTHON} -m devices.rtc {OURS}", f"{PYTHON} -c 'raise SystemExit(7)'"),
}  # fmt: skip


def host_toml(side: int, storage: list[str]) -> str:
    servers = SERVERS | {model: pair[side] for model, pair in FAULTY.items() if pair[side]}
    words = [sys.executable, "-m", "devices.bridges.vfio_user"]
    words += [word for model, command in servers.items() for word in ("--serve", f"{model}={command}")]
    return f"images = {json.dumps(storage)}\n[device.vfio-user]\ncommand = {json.dumps(words)}\n"


def device(name: str, model: str, more: str = "", keys: str = "") -> str:
    return f'[[device]]\nid = "{name}"\ntype = "vfio-user"\noptions = {{ model = "{model}"{more} }}\n{keys}\n'


def machine_toml(*devices: str) -> str:
    uart = device("uart0", "uart16550")
    return f'[machine]\nname = "{MACHINE}"\nmemory = "16M"\n[vcpu]\ncmdline = "dirty=64"\n{uart}' + "".join(
        devices
    )


@pytest.fixture(scope="module")
def ground() -> Iterator[Pen]:
    with pen() as made:
        yield made


@pytest.fixture(scope="module")
def hosts(ground: Pen) -> Iterator[tuple[Host, Host]]:
    with two_hosts(ground, [host_toml(side, _storage(ground, side)) for side in (0, 1)]) as both:
        yield both


def _storage(ground: Pen, side: int) -> list[str]:
    """Where each host finds images: `same.img` is one file for both, `other.img` is not."""
    shared, own = ground.directory / "shared", ground.directory / "own"
    for directory, names in ((shared, ("same.img", "other.img")), (own, ("other.img",))):
        directory.mkdir(exist_ok=True)
        for name in names:
            (directory / name).write_bytes(bytes(4 << 20))
    return [str(shared)] if side == 0 else [str(own), str(shared)]


def run(hosts: tuple[Host, Host], *devices: str) -> None:
    """The machine with these devices besides its serial port, on the first host alone."""
    for host in hosts:
        host.clear()
        (host.directory / "machines" / MACHINE / "uart0.out").unlink(missing_ok=True)
    path = hosts[0].pen.directory / "machine.toml"
    path.write_text(machine_toml(*devices))
    said = hosts[0].ferry("run", str(path), "--fresh")
    assert said.code == 0, said
    hosts[0].ticks_on()


def migrate(here: Host, there: Host) -> Said:
    return here.ferry("migrate", MACHINE, "--to", there.tls, "--verify", "--json", *PATIENT)


def test_servers_that_know_only_vfio_user_move_there_and_back_with_the_guest_running(
    hosts: tuple[Host, Host],
) -> None:
    a, b = hosts
    run(hosts, device("rtc0", "rtc"), device("display0", "display", ', vram = "4M"'))
    trail = Trail(a, b)
    for here, there in ((a, b), (b, a)):
        said = migrate(here, there)
        assert (said.code, said.outcome["running_on"]) == (0, "destination"), said
        assert said.outcome["verified"] == {"ram": True, "devices": True}, said
        there.ticks_on()
        here.becomes("")
        trail.goes(there)
    trail.check()
    for name in ("uart0", "rtc0", "display0"):
        log = (a.directory / "machines" / MACHINE / f"{name}.log").read_text()
        assert "event=ready bus=none" in log, log  # the server's own

    def displays() -> list[tuple[str, ...]]:
        return [process.words for process in a.pen.processes() if "devices.display" in process.words]

    eventually(lambda: len(displays()) == 1, "the one that has left has ended")
    assert "--bus" not in displays()[0]


@pytest.mark.parametrize(
    ("model", "said_of_it"),
    [
        ("load-fails", "its vfio-user server refused to go from RESUMING to STOP (EIO), and is in ERROR"),
        ("load-hangs", "no answer to vfio-user DEVICE_FEATURE within 3.5 s"),
        ("stop-fails", "its vfio-user server refused to go from RUNNING to STOP (EIO), and is in RUNNING_P2P"),
        ("at-home", "this host has no vfio-user server for model 'at-home'"),
        ("ends-at-once", "its vfio-user server exited with 7"),
    ],
)  # fmt: skip
def test_a_server_that_refuses_hangs_or_is_not_there_is_named_and_the_source_runs_on(
    hosts: tuple[Host, Host], model: str, said_of_it: str
) -> None:
    a, b = hosts
    run(hosts, device("extra0", model))
    trail = Trail(a, b)
    said = migrate(a, b)
    assert said.code == (3 if model in ("at-home", "ends-at-once") else 1), said
    assert said.outcome["running_on"] == "source", said
    told = [reason for reason in said.outcome["reasons"] if reason["device"] == "extra0"]
    assert [said_of_it in reason["reason"] for reason in told] == [True], said
    a.ticks_on()
    b.becomes("")
    trail.check()


def test_a_server_without_migration_is_refused_in_the_preflight_and_its_machine_runs_on(
    hosts: tuple[Host, Host],
) -> None:
    a, b = hosts
    run(hosts, device("extra0", "nailed", keys='tracker = "compare"'))
    said = migrate(a, b)
    assert (said.code, said.outcome["running_on"]) == (3, "source"), said
    [reason] = said.outcome["reasons"]
    assert (reason["device"], reason["phase"]) == ("extra0", "preflight"), said
    assert "it cannot be moved: its vfio-user server does not offer migration" in reason["reason"], said
    a.ticks_on()


@pytest.mark.parametrize("disk", ["same.img", "other.img"])
def test_a_servers_disk_is_looked_up_by_its_name_and_refused_where_it_is_another_file(
    hosts: tuple[Host, Host], ground: Pen, disk: str
) -> None:
    a, b = hosts
    keys = f'image = "{ground.directory}/shared/{disk}"\nvectors = 3'
    run(hosts, device("rtc0", "rtc"), device("disk0", "virtio-blk", keys=keys))
    eventually(lambda: a.console().count(b"\nD ") > 1, "the disk is flushed")
    trail = Trail(a, b)
    said = migrate(a, b)
    if disk == "same.img":
        assert (said.code, said.outcome["running_on"]) == (0, "destination"), said
        trail.goes(b)
        b.ticks_on()
    else:
        assert (said.code, said.outcome["running_on"]) == (3, "source"), said
        [reason] = said.outcome["reasons"]
        assert reason["device"] == "disk0"
        assert "is a different file under the same name" in reason["reason"]
        a.ticks_on()
    trail.check()


def test_a_server_that_dies_takes_its_machine_with_it_and_is_named(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    run(hosts, device("rtc0", "rtc"))
    [server] = a.processes("devices.rtc")
    os.kill(server.pid, signal.SIGKILL)
    a.becomes("failed")
    machine = a.machine()
    assert machine is not None
    assert "rtc0" in machine["detail"]
    assert "its vfio-user server was killed by SIGKILL" in machine["detail"]


def test_a_server_that_somebody_else_has_started_is_named_by_its_socket(
    hosts: tuple[Host, Host], ground: Pen
) -> None:
    a, b = hosts
    socket = ground.directory / "mine"
    words = [
        sys.executable,
        "-m",
        "devices.rtc",
        "--id",
        "rtc0",
        "--socket",
        str(socket),
        "--migration",
        "vfio-user",
    ]
    environment = {key: value for key, value in ground.environment().items() if "DBUS" not in key}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    try:
        eventually(socket.exists, "the server listens")
        run(hosts, device("rtc0", "rtc", keys=f'server = "{socket.name}"'))
        said = migrate(a, b)
        assert (said.code, said.outcome["running_on"]) == (0, "destination"), said
        b.ticks_on()
        assert process.poll() is None
        said = migrate(b, a)  # the way back is to one that this host starts
        assert said.code == 0, said
    finally:
        process.terminate()
        process.wait(10)
