"""What a user says of a migration that is hard: how fast pages may go, how long it may take, what to do when it stalls."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.faults.leftovers import Pen
from tests.faults.rig import MACHINE, MACHINE_TOML, Host, Trail

Pair = tuple[Host, Host]
#: The guest rewrites 8 MiB faster than that goes, so what is left never fits: 1 s of sending against 0.2 s.
HOPELESS = ("--bandwidth", "8M", "--downtime", "200")


@pytest.fixture(scope="module")
def hosts(ground: Pen) -> Iterator[Pair]:
    hosts = Host(ground, "hostc").start(), Host(ground, "hostd").start()
    yield hosts
    for host in hosts:
        host.close()


@pytest.fixture
def busy(ground: Pen, hosts: Pair) -> Pair:
    """hostc with a guest that rewrites pages as fast as it can, and hostd."""
    if (hosts[0].state(), hosts[1].state()) != ("running", ""):
        for host in hosts:
            host.clear()
        path = ground.directory / "busy.toml"
        path.write_text(MACHINE_TOML.replace("dirty=64", "storm=1"))
        said = hosts[0].ferry("run", str(path), "--fresh")
        assert said.code == 0, said
        hosts[0].ticks_on()
    return hosts


def stays(c: Host, d: Host, *words: str) -> str:
    """A migration that ends with the guest where it was, never stopped; its reason."""
    trail = Trail(c, d)
    said = c.ferry("migrate", MACHINE, "--to", d.unix, "--json", *words)
    assert (said.code, said.outcome["running_on"]) == (1, "source"), said
    assert said.outcome["downtime_ms"] is None, said
    [reason] = said.outcome["reasons"]
    assert reason["remedy"], said
    c.becomes("running")
    c.ticks_on()
    d.becomes("")
    trail.check()
    return str(reason["reason"])


def test_a_guest_that_does_not_converge_stays_by_default(busy: Pair) -> None:
    assert "downtime" in stays(*busy, *HOPELESS)


def test_one_that_waits_gives_up_when_its_time_is_over(busy: Pair) -> None:
    assert "3 s" in stays(*busy, *HOPELESS, "--on-stall", "wait", "--timeout", "3")


def test_a_limit_below_what_saving_and_loading_alone_take_is_said_at_once(busy: Pair) -> None:
    reason = stays(*busy, "--downtime", "1", "--on-stall", "wait")
    assert "saving, loading and committing alone take" in reason


def test_one_that_extends_the_limit_arrives_and_says_which_limit_it_took(busy: Pair) -> None:
    c, d = busy
    trail = Trail(c, d)
    extended: list[str] = []
    for _ in range(
        3
    ):  # a guest that this host did not let run for a moment fits the limit that was asked for
        said = c.ferry(
            "migrate", MACHINE, "--to", d.unix, "--json", *HOPELESS, "--on-stall", "extend-downtime"
        )
        assert (said.code, said.outcome["running_on"]) == (0, "destination"), said
        c.becomes("")
        trail.goes(d)
        d.ticks_on()
        back = d.ferry("migrate", MACHINE, "--to", c.unix, "--downtime", "5000", "--json")
        assert back.code == 0, back
        d.becomes("")
        trail.goes(c)
        c.ticks_on()
        trail.check()
        told = " ".join(event["warning"] for event in said.events if event["event"] == "warning")
        if extended := re.findall(r"the downtime limit was extended to (\d+) ms", told):
            break
    assert [int(limit) > 200 for limit in extended] == [True], said


def test_pages_go_as_fast_as_they_may_and_no_faster(busy: Pair) -> None:
    c, d = busy
    said = c.ferry("migrate", MACHINE, "--to", d.unix, "--json", "--bandwidth", "4M", "--downtime", "20000")
    assert said.code == 0, said
    first = said.outcome["rounds"][0]
    rate = first["bytes"] / first["seconds"]
    assert rate < 1.05 * (4 << 20), said
    assert rate > 0.8 * (4 << 20), said  # a loaded host may be late; what it may not is go faster
    c.becomes("")
    d.ticks_on()
