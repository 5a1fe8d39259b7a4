"""A job followed from a terminal: its events shown, Ctrl-C turned into a cancel, its outcome into an exit code."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from typing import Any

from migrate.bus.host import HostClient
from migrate.cli.output import Output
from migrate.errors import FerryError, InterruptedByUser

Show = Callable[[dict[str, Any]], None]


async def follow(
    client: HostClient, job: str, machine: str, output: Output, show: Show, *, cancels: bool
) -> int:
    """Show a job to its end; answers with the exit code.

    :param cancels: whether Ctrl-C cancels the job. If not, or at the second Ctrl-C, the job is left to the daemon.
    :raises InterruptedByUser: when it is left. :raises BusError: when the daemon goes.
    """
    interrupts = 0
    cancelling: list[asyncio.Task[None]] = []

    async def cancel() -> None:
        try:
            await client.cancel(machine)
        except FerryError as error:
            output.complain(error)  # it has just ended, or cannot be taken back any more

    def interrupted() -> None:
        nonlocal interrupts
        interrupts += 1
        if cancels and interrupts == 1:
            output.say(f"cancelling; {machine} goes on here (Ctrl-C again: leave the job to the daemon)")
            cancelling.append(asyncio.ensure_future(cancel()))
        else:
            following.cancel()

    following = asyncio.ensure_future(_outcome(client, job, show, lambda: interrupts > 0 and cancels))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    try:
        outcome = await following
    except asyncio.CancelledError:
        if not interrupts:
            raise
        raise InterruptedByUser(
            f"the job {job} of {machine} goes on in the daemon", remedy="see `ferry list`"
        ) from None
    finally:
        following.cancel()
        for task in cancelling:
            task.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        await asyncio.gather(*cancelling, return_exceptions=True)
    return int(outcome.get("exit_code", 1))


async def _outcome(
    client: HostClient, job: str, show: Show, was_interrupted: Callable[[], bool]
) -> dict[str, Any]:
    async with contextlib.aclosing(client.follow(job)) as events:
        async for event in events:
            if event.get("event") == "outcome":
                if was_interrupted() and event.get("running_on") == "source":
                    event = {**event, "exit_code": InterruptedByUser.exit_code}
                show(event)
                return event
            show(event)
    raise AssertionError("a job that is followed ends with its outcome or an error")
