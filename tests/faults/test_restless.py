"""A device that does not come to rest: nothing has stopped by then but the vCPU, and all goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.faults.leftovers import pen
from tests.faults.rig import MACHINE, MACHINE_TOML, Host, Trail, two_hosts

RESTLESS = [sys.executable, "-m", "devices.faulty", "rtc", "--fail", "rest"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with pen() as ground:
        tomls = [f"[device.rtc]\ncommand = {json.dumps(RESTLESS)}\n", ""]
        with two_hosts(ground, tomls) as (a, b):
            path = ground.directory / "machine.toml"
            path.write_text(MACHINE_TOML)
            assert "rtc" in MACHINE_TOML
            said = a.ferry("run", str(path))
            assert said.code == 0, said
            a.ticks_on()
            yield a, b


def test_it_is_named_and_its_guest_goes_on_as_often_as_it_is_tried(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    trail = Trail(a, b)
    for _ in range(2):
        said = a.ferry("migrate", MACHINE, "--to", b.tls, "--downtime", "5000", "--json")
        assert (said.code, said.outcome["running_on"]) == (1, "source"), said
        [reason] = said.outcome["reasons"]
        assert "RUNNING to RUNNING_P2P" in reason["reason"], said
        a.becomes("running")
        a.ticks_on()
        b.becomes("")
    trail.check()


def test_a_pause_that_it_refuses_leaves_its_guest_running(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    said = a.ferry("pause", MACHINE)
    assert said.code == 1, said
    a.becomes("running")
    a.ticks_on()
