"""The rules of a history, as a Hypothesis state machine: migrate, with a fault at a random place, and see what must hold."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from migrate.errors import FerryError
from tests.histories.world import World, unless_refused

T = TypeVar("T")

#: Where a job of the source can be made to wait.
PLACES = ("round:1", "round:2", "stopped", "ready", "committed")
Strike = Callable[[World, str, str], Awaitable[None]]


async def _kill_source_coordinator(world: World, source: str, target: str) -> None:
    world.kill(source, b"migrate.coordinator source")


async def _kill_destination_coordinator(world: World, source: str, target: str) -> None:
    world.kill(target, b"migrate.coordinator destination")


async def _kill_incoming_machine(world: World, source: str, target: str) -> None:
    world.kill(target, b"migrate.machine")


async def _cut_the_link(world: World, source: str, target: str) -> None:
    await world.cut(target)


async def _cancel(world: World, source: str, target: str) -> None:
    await world.hosts[source].client.cancel("m")


async def _freeze_destination(world: World, source: str, target: str) -> None:
    await world.freeze(target, b"migrate.coordinator destination", 1.0)


async def _freeze_source(world: World, source: str, target: str) -> None:
    await world.freeze(source, b"migrate.coordinator source", 1.0)


async def _kill_incoming_device(world: World, source: str, target: str) -> None:
    world.kill(target, b"devices.virtio_blk")


async def _freeze_incoming_device(world: World, source: str, target: str) -> None:
    await world.freeze(target, b"devices.rtc", 1.0)


async def _freeze_source_device(world: World, source: str, target: str) -> None:
    await world.freeze(source, b"devices.virtio_blk", 1.0)


async def _freeze_source_supervisor(world: World, source: str, target: str) -> None:
    await world.freeze(source, b"migrate.machine", 1.0)


async def _change_limits(world: World, source: str, target: str) -> None:
    with contextlib.suppress(FerryError):  # past its last round a job has no use for limits, and says so
        await world.change_limits(source, 400, 50_000_000)


async def _restart_source_daemon(world: World, source: str, target: str) -> None:
    await world.restart_daemon(source)


async def _restart_destination_daemon(world: World, source: str, target: str) -> None:
    await world.restart_daemon(target)


STRIKES: dict[str, Strike] = {
    "the source's coordinator is killed": _kill_source_coordinator,
    "the destination's coordinator is killed": _kill_destination_coordinator,
    "the incoming supervisor is killed": _kill_incoming_machine,
    "the link is cut": _cut_the_link,
    "it is cancelled": _cancel,
    "the destination's coordinator hangs for a second": _freeze_destination,
    "the source's coordinator hangs for a second": _freeze_source,
    "the destination's daemon is killed": _restart_destination_daemon,
    "the source's daemon is killed": _restart_source_daemon,
    "a device of the incoming machine is killed": _kill_incoming_device,
    "a device of the incoming machine hangs for a second": _freeze_incoming_device,
    "a device of the source hangs for a second": _freeze_source_device,
    "the source's supervisor hangs for a second": _freeze_source_supervisor,
    "the limits change": _change_limits,
}


class History(RuleBasedStateMachine):
    """One machine, two hosts, any order of what can happen. The invariant is the promise."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world: World | None = None
        self.runs = "hosta"

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 240.0))

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.do(self.world.begin())
        self.runs = "hosta"

    @rule(connections=st.integers(0, 3))
    def it_moves(self, connections: int) -> None:
        world = self._world
        world.note(f"{self.runs}: migrate, {connections} connections")
        outcome = self.do(unless_refused(world.migrate(self.runs, connections=connections)))
        if outcome is not None:
            assert outcome["outcome"] == "completed", outcome
            assert outcome["verified"] == {"ram": True, "devices": True}, outcome

    @rule(place=st.sampled_from(PLACES), what=st.sampled_from(sorted(STRIKES)))
    def it_moves_and_something_happens(self, place: str, what: str) -> None:
        world = self._world
        source, target = self.runs, world.other(self.runs)
        world.note(f"{source}: migrate, and at {place} {what}")

        async def strike() -> None:
            await STRIKES[what](world, source, target)
            if "source's coordinator is killed" not in what:
                await world.hosts[source].client.proceed("m")

        outcome = self.do(unless_refused(world.migrate(source, hold=place, strike=strike)))
        if outcome is not None:
            world.note(f"  {outcome['outcome']}, on {outcome['running_on']}")
            if outcome["running_on"] == "neither":
                assert outcome["exit_code"] == 4, outcome

    @rule()
    def it_is_paused_and_resumed(self) -> None:
        client = self._world.hosts[self.runs].client
        self._world.note(f"{self.runs}: pause, resume")
        self.do(client.pause_machine("m"))
        self.do(client.resume_machine("m"))

    @rule(at=st.sampled_from(["hosta", "hostb"]))
    def a_daemon_is_killed_and_started(self, at: str) -> None:
        self._world.note(f"{at}: kill -9 of the daemon, and start")
        self.do(self._world.restart_daemon(at))

    @invariant()
    def exactly_one_host_runs_it_and_nothing_is_lost(self) -> None:
        if self.world is not None:
            self.runs = self.do(self.world.settle())

    @property
    def _world(self) -> World:
        assert self.world is not None
        return self.world

    def teardown(self) -> None:
        if self.world is not None:
            try:
                self.do(self.world.end())
            finally:
                self.loop.close()
