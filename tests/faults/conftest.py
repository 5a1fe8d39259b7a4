"""A pen for each test file, two hosts in it, and the proof that nothing is left of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.leftovers import Pen, pen
from tests.faults.rig import MACHINE, MACHINE_TOML, Host, keys_for


@pytest.fixture(scope="module")
def ground() -> Iterator[Pen]:
    with pen() as made:
        yield made


@pytest.fixture(scope="module")
def keys(ground: Pen) -> dict[str, Path]:
    return keys_for(ground, "hosta", "hostb", "mallory")


@pytest.fixture(scope="module")
def machine_toml(ground: Pen) -> Path:
    path = ground.directory / "web1.toml"
    path.write_text(MACHINE_TOML)
    return path


@pytest.fixture(scope="module")
def pair(ground: Pen, keys: dict[str, Path]) -> Iterator[tuple[Host, Host]]:
    """hosta and hostb, which let each other in; nothing is left of them at the end."""
    hosts = Host(ground, "hosta", keys=keys["hosta"]), Host(ground, "hostb", keys=keys["hostb"])
    for host in hosts:
        host.start()
    assert len(ground.processes()) >= 4  # two daemons and their buses: the check below can fail
    yield hosts
    for host in hosts:
        host.close()
    assert (left := ground.at_work()) == [], left


@pytest.fixture
def here(pair: tuple[Host, Host], machine_toml: Path) -> tuple[Host, Host]:
    """Both hosts with their daemons running, and the machine on hosta alone, whatever an earlier test left."""
    a, b = pair
    for host in pair:
        host.revive()
    b.clear()
    if a.state() != "running":
        a.clear()
        (a.directory / "machines" / MACHINE / "uart0.out").unlink(missing_ok=True)
        said = a.ferry("run", str(machine_toml), "--fresh")
        assert said.code == 0, said
    a.ticks_on()
    return pair
