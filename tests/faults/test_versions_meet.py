"""Hosts of different releases: the source writes what the destination reads, there and back, and nothing is lost on the way."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.state.blob import header_of
from tests.faults.leftovers import Pen
from tests.faults.rig import MACHINE, Host, Trail

OLDER = {"uart16550": ("devices.uart16550", 2), "rtc": ("devices.rtc", 1)}


@pytest.fixture(scope="module")
def newer_and_older(ground: Pen, machine_toml: Path) -> Iterator[tuple[Host, Host]]:
    toml = "".join(
        f"[device.{name}]\ncommand = {json.dumps([sys.executable, '-m', module, '--max-version', str(version)])}\n"
        for name, (module, version) in OLDER.items()
    )
    new, old = Host(ground, "hostc").start(), Host(ground, "hostd", toml=toml).start()
    said = new.ferry("run", str(machine_toml))
    assert said.code == 0, said
    new.ticks_on()
    yield new, old
    for host in (new, old):
        host.close()


def test_a_machine_goes_to_an_older_release_and_back(
    newer_and_older: tuple[Host, Host], tmp_path: Path
) -> None:
    new, old = newer_and_older
    trail = Trail(new, old)
    for source, target in ((new, old), (old, new)):
        kept = tmp_path / source.name
        said = source.ferry(
            "migrate", MACHINE, "--to", target.unix, "--verify", "--keep", str(kept), "--downtime", "5000", "--json"
        )  # fmt: skip
        assert said.code == 0, said
        assert said.outcome["verified"] == {"ram": True, "devices": True}, said
        written = {path.stem: header_of(path.read_bytes()).version for path in kept.glob("*.blob")}
        assert (written["uart0"], written["rtc0"]) == (2, 1)
        source.becomes("")
        trail.goes(target)
        target.ticks_on()
    trail.check()
