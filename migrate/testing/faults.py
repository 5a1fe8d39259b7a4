"""Helpers that do one thing wrong, as processes on a bus: to see how what you write takes a `Save` that hangs or dies half-way.

    with faulty_helper(address, "dev0", "hang-save"): …

Devices of the kit that fail on purpose are `python -m devices.faulty TYPE --fail HOOK`.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

from migrate.bus import Bus
from migrate.errors import UsageError
from migrate.testing.helper import FAULTS

__all__ = ["FAULTS", "faulty_helper"]

#: How long a helper may take to be on the bus, s.
_PATIENCE = 20.0


@contextlib.contextmanager
def faulty_helper(address: str, device_id: str, fault: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that exports org.qemu.VMState1 with that fault, from when it is on the bus to the end of the block.

    :param fault: of FAULTS; "right" has none.
    :raise UsageError: there is no such fault. TimeoutError: it did not come up.
    """
    if fault not in FAULTS:
        raise UsageError(f"there is no fault {fault!r}", remedy=f"one of: {', '.join(FAULTS)}")
    command = [sys.executable, "-m", "migrate.testing.helper", fault, "--id", device_id, "--bus", address]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        asyncio.run(_until_it_is_there(address, process.pid))
        yield process
    finally:
        process.kill()
        process.wait()


async def _until_it_is_there(address: str, pid: int) -> None:
    bus = await Bus.connect(address)
    try:
        deadline = time.monotonic() + _PATIENCE
        while pid not in [await bus.pid_of(name) for name in await bus.queued_owners("org.qemu.VMState1")]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the helper is not on the bus after {_PATIENCE:g} s")
            await asyncio.sleep(0.02)
    finally:
        await bus.close()
