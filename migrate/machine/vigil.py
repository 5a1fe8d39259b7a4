"""Watching over a coordinator while the machine stands still for it: one that hangs is as bad as one that died, and no bus tells.

Only an answer counts, whatever it is: an error is an answer, too. Who is silent may wake later; it then finds that its job is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from migrate.errors import DeviceGone, DeviceTimeout, FerryError

log = logging.getLogger(__name__)

#: How often it is asked, and how long it may take to answer, s. Its event loop does nothing that lasts: page threads do.
EVERY: Final = 2.0
PATIENCE: Final = 10.0

#: Asks a process on the bus for a sign of life, within so many seconds.
Ping = Callable[[str, float], Awaitable[None]]


async def silent(
    name: str, ping: Ping, wanted: Callable[[], bool], *, every: float = EVERY, patience: float = PATIENCE
) -> bool:
    """True once it does not answer in time; False once nobody wants to know any more."""
    while True:
        await asyncio.sleep(every)
        if not wanted():
            return False
        try:
            await ping(name, patience)
        except (DeviceTimeout, DeviceGone):
            return wanted()
        except FerryError:
            pass  # it answered


async def logged(work: object) -> None:
    """What goes on in the background fails into the log."""
    try:
        await work  # type: ignore[misc]
    except FerryError as error:
        log.error("event=background error=%s", error)
