"""A running machine with a SCSI controller in a real x-remote QEMU, moved by `ferry migrate` while the guest uses its disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.bridges.xremote.command import BUILT_IN
from tests.faults.leftovers import Pen, pen
from tests.faults.rig import MACHINE, Host, Said, Trail, eventually, ferry, two_hosts
from tests.unit.vcpu import disk_journal as journal

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"
)

PATIENT = ("--downtime", "5000")
LSI = " ".join(BUILT_IN["lsi53c895a"])
#: Slow storage, so that a command is under way nearly always; and what a model is at the source and at the destination.
SLOW = LSI.replace("if=none,", "if=none,throttling.iops-total=150,")
NVME = "qemu-system-x86_64 -drive file={image},id=n,if=none,format=raw,file.locking=off -device nvme,id={id},drive=n,serial=1"
MODELS = {
    "lsi53c895a": (LSI, LSI),
    "lsi53c895a-slow": (SLOW, SLOW),
    "lsi53c895a-other": (LSI, LSI.replace("lsi53c895a", "lsi53c810")),
    "lsi53c895a-more": (LSI + " -device scsi-cd,bus={id}.0,scsi-id=3", LSI),
    "lsi53c895a-home": (LSI, ""),
    "nvme": (NVME, NVME),
}
_MIB = 1 << 20


def host_toml(side: int, storage: Path) -> str:
    words = [sys.executable, "-m", "devices.bridges.xremote"]
    words += [
        word
        for model, pair in MODELS.items()
        if pair[side] and model != "lsi53c895a"
        for word in ("--serve", f"{model}={pair[side]}")
    ]
    return f'images = ["{storage}"]\n[device.x-remote]\ncommand = {json.dumps(words)}\n'


def machine_toml(image: Path, model: str, tracker: str, cmdline: str) -> str:
    wanted = f'tracker = "{tracker}"\n' if tracker else ""
    return (
        f'[machine]\nname = "{MACHINE}"\nmemory = "16M"\n[vcpu]\ncmdline = "{cmdline}"\n'
        '[[device]]\nid = "uart0"\ntype = "uart16550"\n[[device]]\nid = "rtc0"\ntype = "rtc"\n'
        f'[[device]]\nid = "scsi0"\ntype = "x-remote"\nimage = "{image}"\noptions = {{ model = "{model}" }}\n{wanted}'
    )


@pytest.fixture(scope="module")
def ground() -> Iterator[Pen]:
    with pen() as made:
        (made.directory / "storage").mkdir()
        yield made


@pytest.fixture(scope="module")
def hosts(ground: Pen) -> Iterator[tuple[Host, Host]]:
    with two_hosts(ground, [host_toml(side, ground.directory / "storage") for side in (0, 1)]) as both:
        yield both


@pytest.fixture
def image(ground: Pen) -> Path:
    path = ground.directory / "storage" / "scsi0.img"
    path.write_bytes(bytes(8 * _MIB))
    return path


def run(
    hosts: tuple[Host, Host],
    image: Path,
    model: str,
    tracker: str = "compare",
    cmdline: str = "scsi=4 flush=16",
) -> None:
    """The machine on the first host alone; its guest has flushed its disk."""
    for host in hosts:
        host.clear()
        (host.directory / "machines" / MACHINE / "uart0.out").unlink(missing_ok=True)
    path = hosts[0].pen.directory / "machine.toml"
    path.write_text(machine_toml(image, model, tracker, cmdline))
    said = hosts[0].ferry("run", str(path), "--fresh")
    assert said.code == 0, said
    hosts[0].ticks_on()


def migrate(here: Host, there: Host, *more: str) -> Said:
    return here.ferry("migrate", MACHINE, "--to", there.tls, "--json", *(more or ("--verify", *PATIENT)))


def flushes_on(host: Host) -> None:
    """The guest goes on with its disk there."""
    before = host.console().count(b"\nF ")
    eventually(lambda: host.console().count(b"\nF ") > before + 1, f"the disk is flushed on {host.name}")


def test_the_controller_moves_there_and_back_while_the_guest_uses_its_disk(
    hosts: tuple[Host, Host], image: Path
) -> None:
    a, b = hosts
    run(hosts, image, "lsi53c895a-slow")
    flushes_on(a)
    trail, said = Trail(a, b), [line.decode() for line in a.console().splitlines()]
    for here, there in ((a, b), (b, a)):
        moved = migrate(here, there)
        assert (moved.code, moved.outcome["running_on"]) == (0, "destination"), moved
        assert moved.outcome["verified"] == {"ram": True, "devices": True}, moved
        warnings = [event for event in moved.events if event["event"] == "warning"]
        assert [
            (event["warning"].split(",")[0].split(":")[0], event["cost_bytes"]) for event in warnings
        ] == [("scsi0", 16 * _MIB)], moved
        flushes_on(there)
        here.becomes("")
        trail.goes(there)
    trail.check()
    a.ferry("pause", MACHINE)
    whole = [line.decode() for line in (a.console(), b.console())[0].splitlines()]
    start = next(line for line in said if line.startswith("L "))
    lines = [start] + [line for line in whole if line.startswith("F ")]
    assert int(lines[-1].split()[1]) > 48
    assert journal.missing(image, lines, beyond=16, kind=journal.SCSI) == []
    stale = image.with_name("stale.img")
    stale.write_bytes(bytes(8 * _MIB))
    assert journal.missing(stale, lines, beyond=16, kind=journal.SCSI) != []


def test_what_it_streamed_is_kept_and_shows_qemus_sections(
    hosts: tuple[Host, Host], image: Path, ground: Pen
) -> None:
    a, b = hosts
    run(hosts, image, "lsi53c895a")
    kept = ground.directory / "kept"
    said = migrate(a, b, "--keep", str(kept), *PATIENT)
    assert said.code == 0, said
    shown = ferry(ground, "blob", "show", str(kept), "--json")
    assert shown.code == 0, shown
    [stream] = [event for event in shown.events if event["event"] == "stream"]
    assert [section["name"] for section in stream["sections"] if "lsi" in section["name"]] == [
        "0000:00:00.0/lsiscsi"
    ]
    [blob] = [event for event in shown.events if event["event"] == "blob" and event["instance"] == "scsi0"]
    [size] = [value["value"] for value in blob["values"] if value["path"] == ".stream_size"]
    assert size == stream["stopped_at"]
    flushes_on(b)


@pytest.mark.parametrize(
    ("model", "code", "said_of_it"),
    [
        ("lsi53c895a-home", 3, "this host has no x-remote server for model 'lsi53c895a-home'"),
        ("lsi53c895a-other", 1, "the state sent is of another function: device 18 where this one has 1"),
        ("nvme", 3, "it cannot be moved: QEMU refuses migrate: State blocked by non-migratable device"),
    ],
)  # fmt: skip
def test_what_cannot_go_is_refused_before_the_stop_and_the_source_runs_on(
    hosts: tuple[Host, Host], image: Path, model: str, code: int, said_of_it: str
) -> None:
    a, b = hosts
    run(hosts, image, model)
    trail = Trail(a, b)
    said = migrate(a, b)
    assert (said.code, said.outcome["running_on"]) == (code, "source"), said
    told = [reason["reason"] for reason in said.outcome["reasons"] if reason["device"] == "scsi0"]
    assert [said_of_it in reason for reason in told] == [True], said
    a.ticks_on()
    b.becomes("")
    trail.check()


def test_a_stream_that_qemu_does_not_take_is_named_with_its_words_and_the_source_runs_on(
    hosts: tuple[Host, Host], image: Path
) -> None:
    """The same function on both sides, and another bus behind it: only QEMU knows."""
    a, b = hosts
    run(hosts, image, "lsi53c895a-more")
    trail = Trail(a, b)
    said = migrate(a, b)
    assert (said.code, said.outcome["running_on"]) == (1, "source"), said
    [reason] = [reason for reason in said.outcome["reasons"] if reason["device"] == "scsi0"]
    assert "its QEMU does not take the state sent: QEMU exited with 1: qemu-" in reason["reason"], said
    a.ticks_on()
    flushes_on(a)
    b.becomes("")
    trail.check()


@pytest.mark.parametrize("tracker", ["", "log"])
def test_without_compare_it_is_not_moved_or_not_started(
    hosts: tuple[Host, Host], image: Path, tracker: str
) -> None:
    a, b = hosts
    if tracker:
        path = a.pen.directory / "machine.toml"
        path.write_text(machine_toml(image, "lsi53c895a", tracker, ""))
        for host in hosts:
            host.clear()
        said = a.ferry("run", str(path), "--fresh")
        assert (
            "multi-process QEMU has no log of the pages that it writes, so log sees nothing"
            in said.complaint(1)
        )
        return
    run(hosts, image, "lsi53c895a", tracker="")
    said = migrate(a, b)
    assert (said.code, said.outcome["running_on"]) == (3, "source"), said
    [reason] = said.outcome["reasons"]
    assert (reason["device"], 'tracker = "compare"' in reason["remedy"]) == ("scsi0", True), said
    a.ticks_on()


def test_a_paused_machine_arrives_paused_and_goes_on_there(hosts: tuple[Host, Host], image: Path) -> None:
    a, b = hosts
    run(hosts, image, "lsi53c895a-slow")
    assert a.ferry("pause", MACHINE).code == 0
    said = migrate(a, b)
    assert said.code == 0, said
    b.becomes("paused")
    assert b.ferry("resume", MACHINE).code == 0
    flushes_on(b)


def test_a_qemu_that_is_killed_takes_its_machine_with_it_and_is_named(
    hosts: tuple[Host, Host], image: Path
) -> None:
    a, _ = hosts
    run(hosts, image, "lsi53c895a")
    [qemu] = a.processes("x-remote")
    os.kill(qemu.pid, signal.SIGKILL)
    a.becomes("failed")
    machine = a.machine()
    assert machine is not None
    assert "scsi0" in machine["detail"]
    assert "its QEMU was killed by SIGKILL" in machine["detail"]
