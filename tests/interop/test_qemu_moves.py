"""A real Linux guest in a real QEMU, with a disk of ours behind vhost-user, moved between two hosts: nothing of it is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cli.demo.linux import console
from tests.faults.leftovers import pen
from tests.faults.rig import MACHINE, eventually
from tests.interop.qemu_world import QEMU, World, go_on, needs_qemu, stop, word_for
from tests.interop.shuttle import shuttle

pytestmark = [needs_qemu, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with pen() as ground:
        world = World(ground)
        yield world
        world.close()


# -- it moves -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", ["1", "3", "0"])
def test_a_guest_moves_with_its_disk_and_both_memories_are_equal(world: World, connections: str) -> None:
    here, there = world.ready()
    outcome = world.moves(here, there, "--connections", connections)
    world.runs_on(there, here)
    world.guest_is_whole(there)
    assert outcome["ram_bytes_sent"] > 8 << 20
    assert outcome["downtime_ms"] < 3000
    world.one_disk_at_a_time()


def test_not_a_tick_and_not_a_byte_of_its_serial_port_is_lost_on_the_way(world: World) -> None:
    world.run()
    world.moves(world.a, world.b)
    world.b.ticks_on()
    world.a.is_still()
    report = console.read(world.a.console(), world.b.console(), 0)
    assert (report.corrupt, report.missed) == (0, 0)
    assert report.ticks_after > report.ticks_before


def test_a_paused_guest_arrives_paused_and_goes_on_when_it_is_told_to(world: World) -> None:
    here, there = world.ready()
    assert here.ferry("pause", MACHINE).code == 0
    world.moves(here, there)
    there.becomes("paused")
    there.is_still()
    assert there.ferry("resume", MACHINE).code == 0
    world.runs_on(there, here)
    world.guest_is_whole(there)


def test_what_it_acknowledged_before_the_end_is_on_the_disk(world: World) -> None:
    here, there = world.ready()
    world.moves(here, there)
    synced = world.guest_is_whole(there)
    seen = len(there.console())
    there.ticks_on()
    there.tell_guest("quit")
    eventually(lambda: not there.state(), "the guest has powered off")
    assert b"CORRUPT" not in there.console()[seen:]  # a failed write or fsync is said so
    world.disk_is_whole(max(synced, console.last_synced(there.console()[seen:])))


def test_to_and_fro_with_every_third_attempt_made_to_fail_it_reads_back_all_that_it_wrote(
    world: World,
) -> None:
    """The short form of `python -m tests.interop.shuttle`."""
    assert len(shuttle(world, 4, lambda text: None)) == 3


# -- it stays -----------------------------------------------------------------------------------------------------------------


def test_the_same_comparison_finds_a_back_end_that_does_not_write_the_log(
    world: World, tmp_path: Path
) -> None:
    """The negative control: without it `verified` could be a word that cannot be untrue."""
    root = str(Path(__file__).parents[2])
    world.disk_command = ["env", f"PYTHONPATH={root}", *word_for("tests.interop.deaf_disk")]
    try:
        world.run()
        moving = world.begin(world.a, world.b, "--verify", "--hold", "round:1")
        moving.until("held", at="round:1")
        time.sleep(1.0)  # what it writes now was sent before, and nobody says that it has changed
        world.a.proceed()
        said = moving.end()
    finally:
        world.disk_command = None
    assert said.code == 1, said
    assert said.outcome["verified"]["ram"] is False
    assert "blocks of memory differ" in said.outcome["reasons"][0]["reason"]
    world.runs_on(world.a, world.b)
    world.run()


def test_a_failure_after_qemu_has_completed_leaves_it_here_and_the_next_attempt_commits(world: World) -> None:
    here, there = world.ready()
    faulty = word_for("devices.faulty", "rtc", "--fail", "apply")
    there.write_toml(world.command, f"[device.rtc]\ncommand = [{', '.join(repr(w) for w in faulty)}]\n")
    said = world.move(here, there)
    assert said.code == 1, said
    assert said.outcome["reasons"][0]["device"] == "rtc0"
    world.runs_on(here, there)
    world.guest_is_whole(here)
    there.write_toml(world.command)
    world.moves(here, there)
    world.runs_on(there, here)
    world.guest_is_whole(there)
    world.one_disk_at_a_time()


@pytest.mark.parametrize("at", ["round:1", "quiesced"])
def test_a_cancelled_migration_leaves_the_guest_and_its_disk_here(world: World, at: str) -> None:
    """In pre-copy, and at QEMU's pre-switchover; after QEMU's own migration has completed: test_to_and_fro…."""
    here, there = world.ready()
    moving = world.begin(here, there, "--hold", at)
    moving.until("held", at=at)
    assert here.ferry("cancel", MACHINE).code == 0
    said = moving.end()
    assert said.code == 1, said
    world.runs_on(here, there)
    world.guest_is_whole(here)
    world.moves(here, there)
    world.runs_on(there, here)


@pytest.mark.parametrize("at", ["quiesced", "ready"])
def test_a_coordinator_that_is_killed_leaves_the_guest_and_its_disk_here(world: World, at: str) -> None:
    here, there = world.ready()
    moving = world.begin(here, there, "--hold", at)
    moving.until("held", at=at)
    [coordinator] = here.processes("migrate.coordinator", "source")
    os.kill(coordinator.pid, signal.SIGKILL)
    assert moving.end().code == 1
    world.runs_on(here, there)
    world.guest_is_whole(here)
    if at == "quiesced":
        there.becomes("")
    else:  # it was READY, so it keeps its copy until it is asked, or the machine comes again
        eventually(lambda: there.state() in ("", "held"), "the copy is held")
    world.moves(here, there)


def test_a_destination_whose_qemu_dies_in_precopy_is_named_and_the_guest_stays(world: World) -> None:
    here, there = world.ready()
    moving = world.begin(here, there, "--hold", "round:1")
    moving.until("held", at="round:1")
    os.kill(there.qemu(), signal.SIGKILL)
    said = moving.end()
    assert said.code == 1, said
    assert said.outcome["reasons"][0]["device"] == "vcpu0", said
    assert "QEMU was killed by signal 9" in said.outcome["reasons"][0]["reason"]
    world.runs_on(here, there)
    world.guest_is_whole(here)


def test_a_qemu_that_hangs_at_the_source_is_named_and_goes_on_when_it_wakes(world: World) -> None:
    here, there = world.ready()
    pid = here.qemu()
    moving = world.begin(here, there, "--hold", "round:1")
    moving.until("held", at="round:1")
    stop(pid)
    here.proceed()
    said = moving.end()
    go_on(pid)
    assert said.code == 1, said
    assert said.outcome["reasons"][0]["device"] == "vcpu0", said
    assert "QEMU did not answer" in said.outcome["reasons"][0]["reason"]
    if here.state() != "running":
        assert here.ferry("resume", MACHINE).code == 0
    world.runs_on(here, there)
    world.guest_is_whole(here)


def test_a_guest_that_powers_off_in_precopy_ends_the_job(world: World) -> None:
    here, there = world.ready()
    moving = world.begin(here, there, "--hold", "round:1")
    moving.until("held", at="round:1")
    here.tell_guest("quit")
    said = moving.end()
    assert said.code == 1, said
    assert said.outcome["outcome"] == "guest-ended", said
    eventually(lambda: not here.state() and not there.state(), "the machine is gone")


def test_a_disk_that_dies_under_a_running_guest_is_the_machines_failure_and_is_named(world: World) -> None:
    here, there = world.ready()
    here.kill_device("disk0")
    here.becomes("failed")
    said = world.move(here, there)
    assert said.code != 0
    machine = here.machine()
    assert machine is not None
    assert machine["detail"].startswith("disk0: ")
    here.clear()


# -- what is known before anything moves --------------------------------------------------------------------------------------


def refused(world: World, *needles: str) -> None:
    """Nothing was stopped, and every one of these is among the reasons."""
    here, there = world.hosts
    said = world.move(here, there)
    assert said.code == 3, said
    reasons = " | ".join(f"{r['device']}: {r['reason']}" for r in said.outcome["reasons"])
    for needle in needles:
        assert needle in reasons, reasons
    assert here.state() == "running"
    here.ticks_on(3)


def changed(command: list[str], **words: str) -> list[str]:
    found = list(command)
    for key, value in words.items():
        found[found.index(f"-{key}") + 1] = value
    return found


def test_another_machine_type_processors_and_devices_are_all_named_at_once(world: World) -> None:
    world.run()
    other = [*changed(world.command, machine="pc"), "-smp", "2", "-device", "virtio-rng-pci"]
    world.b.write_toml(other)
    world.b.restart()
    try:
        refused(world, "machine type is pc-q35", "number of processors is 1", "PCI address")
    finally:
        world.b.write_toml(world.command)
        world.b.restart()


def test_a_host_that_does_not_know_the_machines_qemu_says_what_to_write(world: World) -> None:
    world.ready()
    if world.a.state() != "running":
        world.run()
    (world.b.directory / "host.toml").write_text(f'images = ["{world.pen.directory}/storage"]\n')
    world.b.restart()
    try:
        refused(world, "does not know how to start the QEMU of 'web1'")
    finally:
        world.b.write_toml(world.command)
        world.b.restart()


def test_memory_that_qemu_would_corrupt_is_refused(world: World) -> None:
    """T1 of the reference: QEMU before 9.0 under TCG loses guest writes where RAM is a multiple of 256 KiB."""
    world.run(memory="128M")
    refused(world, "under TCG loses writes of the guest")
    world.run()


def test_what_blocks_qemus_migration_is_quoted(world: World) -> None:
    peer = [
        "-object",
        "memory-backend-memfd,id=iv,size=1M,share=on",
        "-device",
        "ivshmem-plain,memdev=iv,master=off",
    ]
    world.run(command=[*world.command, *peer])
    refused(world, "QEMU refuses to migrate: ", "ivshmem")
    world.run()


def test_what_qemu_refuses_only_when_it_is_asked_stops_nothing(world: World) -> None:
    disk = world.pen.directory / "nvme.img"
    disk.write_bytes(bytes(1 << 20))
    nvme = ["-drive", f"file={disk},format=raw,if=none,id=n", "-device", "nvme,drive=n,serial=1"]
    both = [*world.command, *nvme]
    world.run(command=both)
    world.b.write_toml(
        changed(both, drive=f"file={disk},format=raw,if=none,id=n,file.locking=off,read-only=on")
    )
    world.b.restart()
    try:
        said = world.move(world.a, world.b)
        assert said.code in (1, 3), said
        assert "nvme" in " ".join(r["reason"] for r in said.outcome["reasons"]), said
        world.runs_on(world.a, world.b)
    finally:
        world.b.write_toml(world.command)
        world.b.restart()
    world.run()


def test_words_that_are_ferrys_to_say_are_refused_in_a_command(world: World) -> None:
    for host in world.hosts:
        host.clear()
    world.write_machine(command=[*world.command, "-incoming", "defer"])
    said = world.a.ferry("run", str(world.toml), "--fresh")
    assert said.code != 0
    assert "-incoming" in said.err[0]


def test_a_qemu_that_does_not_start_says_why(world: World) -> None:
    for host in world.hosts:
        host.clear()
    world.write_machine(command=[QEMU, "-machine", "no-such-machine"])
    said = world.a.ferry("run", str(world.toml), "--fresh")
    assert said.code != 0
    assert "unsupported machine type" in said.err[0] or "no-such-machine" in said.err[0]
