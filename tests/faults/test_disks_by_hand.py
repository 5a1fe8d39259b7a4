"""A machine with a disk between two hosts: it moves where the storage is shared, and is refused, with why, where it is not."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.leftovers import Pen
from tests.faults.rig import MACHINE, MACHINE_TOML, Host, Trail

Pair = tuple[Host, Host]
DISK = """
[[device]]
id = "disk0"
type = "virtio-blk"
vectors = 3
image = "storage/disk0.img"
"""


@pytest.fixture(scope="module")
def storage(ground: Pen) -> Path:
    directory = ground.directory / "storage"
    directory.mkdir()
    with (directory / "disk0.img").open("wb") as image:
        image.truncate(8 << 20)
    return directory


@pytest.fixture(scope="module")
def with_disk(ground: Pen, storage: Path) -> Iterator[Pair]:
    """hostc, where the machine runs, and hostd; both see the storage. Each finds images in `DIR/found`, which leads there."""
    made = []
    for name in ("hostc", "hostd"):
        host = Host(ground, name, toml=f'images = ["{ground.directory}/{name}/found"]\n')
        (host.directory / "found").symlink_to(storage)
        made.append(host.start())
    path = ground.directory / "disk.toml"
    path.write_text(MACHINE_TOML.replace("dirty=64", "dirty=16 disk=8 disk_kb=512 flush=16") + DISK)
    said = made[0].ferry("run", str(path))
    assert said.code == 0, said
    yield made[0], made[1]
    for host in made:
        host.close()


def turn(host: Host, where: Path) -> None:
    """What this host finds its images in."""
    (host.directory / "found").unlink()
    (host.directory / "found").symlink_to(where)


def test_a_local_file_of_the_same_name_is_refused_and_the_guest_does_not_notice(
    with_disk: Pair, storage: Path, tmp_path: Path
) -> None:
    c, d = with_disk
    with (tmp_path / "disk0.img").open("wb") as image:
        image.truncate(8 << 20)
    turn(d, tmp_path)
    try:
        for command in ("check", "migrate"):
            said = c.ferry(command, MACHINE, "--to", d.unix, "--json")
            assert said.code == 3, said
            [reason] = said.outcome["reasons"]
            assert reason["device"] == "disk0", said
            assert "different file under the same name" in reason["reason"], said
            assert "mount the storage" in reason["remedy"], said
    finally:
        turn(d, storage)
    c.ticks_on()
    assert d.machines() == []
    assert os.listdir(storage) == ["disk0.img"]  # no token stays


def test_the_lock_goes_with_the_machine(with_disk: Pair, storage: Path) -> None:
    c, d = with_disk
    trail = Trail(c, d)
    for source, target in ((c, d), (d, c)):
        said = source.ferry(
            "migrate", MACHINE, "--to", target.unix, "--verify", "--downtime", "5000", "--json"
        )
        assert said.code == 0, said
        assert said.outcome["verified"] == {"ram": True, "devices": True}, said
        source.becomes("")
        trail.goes(target)
        target.ticks_on()
        assert locked(storage / "disk0.img")
    trail.check()


def test_an_image_that_somebody_takes_in_the_gap_keeps_the_machine_at_the_source(
    with_disk: Pair, storage: Path
) -> None:
    """COMMIT is written and the source has let go; a third party is faster than the destination."""
    c, d = with_disk
    trail = Trail(c, d)
    migrating = c.begin("migrate", MACHINE, "--to", d.unix, "--downtime", "5000", "--hold", "committed")
    migrating.until("held", at="committed")
    with (storage / "disk0.img").open("rb+") as image:
        fcntl.fcntl(image, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
        c.proceed()
        said = migrating.end()
        assert (said.code, said.outcome["running_on"]) == (1, "neither"), said
        assert "disk0" in {reason["device"] for reason in said.outcome["reasons"]}, said
        assert any(
            "is locked by another process" in reason["reason"] for reason in said.outcome["reasons"]
        ), said
        assert c.state() == "paused"  # nobody can run it now, and nothing is lost
    assert c.ferry("resume", MACHINE).code == 0
    c.ticks_on()
    d.becomes("")
    trail.check()


def locked(path: Path) -> bool:
    with path.open("rb+") as image:
        answer = fcntl.fcntl(image, fcntl.F_OFD_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    return int(struct.unpack("hhqqi4x", answer)[0]) != fcntl.F_UNLCK
