"""What `ferry demo` can show. Each scenario is a run of the same code as `ferry migrate`; what goes wrong is done from outside:
a signal to a process, a connection that is cut, a host that offers less, a device that fails."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from migrate.errors import FerryError, Phase

if TYPE_CHECKING:  # `ferry demo --help` shows this table, and does without what plays it
    from migrate.cli.demo.stage import Event, Stage

#: A job gives up by itself long before; this bounds a defect. A loaded machine may take half a minute to come to COMMIT.
DOUBT_SECONDS = 120.0
#: How long the cut link stays cut, s: long enough to be seen in doubt.
CUT_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Scenario:
    """`play` runs it and answers with the migration's outcome; the rest is what has to stand before."""

    about: str
    play: Callable[[Stage], Awaitable[Event]]
    places: Sequence[str] = ()  #: what --at can be; the first is the default
    relay: bool = False
    destination_toml: str = ""
    destination_hold: Callable[[Stage], Sequence[str]] = lambda stage: ()


def _command(*words: str) -> str:
    return ", ".join(f'"{word}"' for word in (sys.executable, "-m", *words))


async def plain(stage: Stage) -> Event:
    return await stage.follow(await stage.begin())


async def load_failure(stage: Stage) -> Event:
    job = await stage.begin()
    outcome = await stage.follow(job)
    told = await stage.follow(job, host=stage.destination)
    stage.extra["destination"] = {"outcome": told["outcome"], "reasons": told["reasons"]}
    return outcome


async def destination_killed(stage: Stage) -> Event:
    if stage.options.at == "switchover":
        job = await stage.begin()
        await stage.held_at_destination(job, "loading")
        stage.say(
            "the source is stopped, the destination has STOPPED and has not said READY: SIGKILL to all of it"
        )
        await stage.destination.kill()
        return await stage.follow(job)

    async def strike(at: str) -> None:
        stage.say(f"{at}: SIGKILL to the destination's daemon, coordinator, supervisor and devices")
        await stage.destination.kill()
        # Nobody says `continue`: that the other end is gone ends the wait, too.

    return await stage.follow(await stage.begin(hold="round:2"), strike)


async def coordinator_killed(stage: Stage) -> Event:
    from migrate.cli.demo.hosts import processes_of

    async def strike(at: str) -> None:
        pids = [pid for pid in processes_of(str(stage.source.directory)) if _is_coordinator(pid)]
        stage.say(f"{at}: SIGKILL to the source's coordinator ({', '.join(map(str, pids))})")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    return await stage.follow(await stage.begin(hold="stopped"), strike)


def _is_coordinator(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"migrate.coordinator" in words and b"source" in words


async def cancelled(stage: Stage) -> Event:
    async def strike(at: str) -> None:
        stage.say(f"{at}: ferry cancel {stage.machine}")
        await stage.source.client.cancel(stage.machine)

    return await stage.follow(await stage.begin(hold="round:1"), strike)


async def commit_lost(stage: Stage) -> Event:
    assert stage.relay is not None
    gone = stage.options.destination_gone
    after = stage.options.at == "after"
    seconds = 3 if gone else 60
    if after:
        job = await stage.begin(doubt_seconds=seconds)
        await stage.held_at_destination(job, "committed")
        stage.say("the destination has committed and its RUNNING is not sent yet: the link is cut")
        await stage.relay.cut()
        await stage.destination.client.proceed(stage.machine)
        strike = None
    else:
        job = await stage.begin(hold="committed", doubt_seconds=seconds)

        async def strike_before(at: str) -> None:
            stage.say("COMMIT is in the source's ledger and not sent yet: the link is cut")
            assert stage.relay is not None
            await stage.relay.cut()
            await stage.proceed()

        strike = strike_before
    following = asyncio.create_task(stage.follow(job, strike))
    try:
        await _in_doubt(stage, following)
        return await (_never_again(stage, following) if gone else _heal(stage, following))
    finally:
        following.cancel()


async def _in_doubt(stage: Stage, following: asyncio.Task[Event]) -> None:
    """See the source stopped and in doubt, and both copies there."""
    deadline = time.monotonic() + DOUBT_SECONDS
    while time.monotonic() < deadline and not following.done():
        here = await stage.source.machine(stage.machine)
        if (
            here is not None
            and here["state"] == "in-doubt"
            and stage.relay is not None
            and stage.relay.is_cut
        ):
            there = await stage.destination.machine(stage.machine)
            states = {"source": here["state"], "destination": there["state"] if there else "gone"}
            if states["destination"] in ("held", "running"):
                stage.say(f"in doubt, both copies are there: {states}")
                stage.extra["while_in_doubt"] = states
                break
        await asyncio.sleep(0.05)
    else:
        raise FerryError("the source was never in doubt", phase=Phase.COMMIT, remedy="see its log")
    if stage.extra["while_in_doubt"]["destination"] == "held":
        await stage.nobody_executes([stage.source, stage.destination])
    else:
        await stage.nobody_executes([stage.source])


async def _heal(stage: Stage, following: asyncio.Task[Event]) -> Event:
    await asyncio.sleep(CUT_SECONDS)
    stage.say("the link heals; the source asks who runs the machine")
    assert stage.relay is not None
    await stage.relay.start()
    return await following


async def _never_again(stage: Stage, following: asyncio.Task[Event]) -> Event:
    stage.say("the destination is gone for good: SIGKILL to all of it")
    await stage.destination.kill()
    outcome = await following
    stage.say(
        f"ferry migrate ended with {outcome['exit_code']}; the operator: ferry resolve --keep source --fenced"
    )
    state = await stage.source.client.resolve(stage.machine, "source")
    stage.extra["resolved"] = {"keep": "source", "state": state}
    outcome["running_on"] = "source"
    return outcome


SCENARIOS: dict[str, Scenario] = {
    "completed": Scenario("the guest moves and goes on there", plain),
    "incompatible": Scenario(
        "the destination has an older uart16550 and no display: refused with both reasons, nothing stopped (exit 3)",
        plain,
        destination_toml=(
            f"[device.uart16550]\ncommand = [{_command('devices.uart16550', '--max-version', '1')}]\n"
            "[device.display]\navailable = false\n"
        ),
    ),
    "load-failure": Scenario(
        "a device fails while its state is applied after the stop: the source runs on (exit 1)",
        load_failure,
        destination_toml=f"[device.rtc]\ncommand = [{_command('devices.faulty', 'rtc', '--fail', 'apply')}]\n",
    ),
    "destination-killed": Scenario(
        "SIGKILL to the destination's host and machine: the source runs on (exit 1)",
        destination_killed,
        places=("round-2", "switchover"),
        destination_hold=lambda stage: ["loading"] if stage.options.at == "switchover" else [],
    ),
    "coordinator-killed": Scenario(
        "SIGKILL to the source's coordinator after STOPPED: the supervisor resumes the guest (exit 1)",
        coordinator_killed,
        places=("switchover",),
    ),
    "commit-lost": Scenario(
        "the connection is cut after COMMIT is in the ledger: stopped and in doubt, both copies intact; then it heals",
        commit_lost,
        places=("before", "after"),
        relay=True,
        destination_hold=lambda stage: ["committed"] if stage.options.at == "after" else [],
    ),
    "cancelled": Scenario("cancel in pre-copy: the source runs on (exit 1)", cancelled),
}
