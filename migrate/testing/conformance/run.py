"""The order of a conformance run: who is there, then each process, and that it is left as it was found."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from migrate.bus import Bus
from migrate.bus.supervisor import NAME as SUPERVISOR
from migrate.errors import DeviceRefused, FerryError, UsageError
from migrate.testing.conformance import vmstate
from migrate.testing.conformance.device1 import Device1
from migrate.testing.conformance.findings import Finding, Verdict
from migrate.testing.conformance.process import Found, Process, find

#: What one answer may take, s.
TIMEOUT: Final = 30.0


async def conform(
    bus: Bus, wanted: str = "", *, timeout: float = TIMEOUT, force: bool = False
) -> AsyncIterator[Finding]:
    """Findings as they come, process by process.

    :param wanted: only the device of this Id. :param force: also where a machine's supervisor is on the bus.
    :raises UsageError: there is nobody to look at. DeviceRefused: it is part of a machine. BusError: the bus is gone.
    """
    if not force and await bus.queued_owners(SUPERVISOR):
        raise DeviceRefused(
            "a machine's supervisor is on this bus: its devices are not for testing",
            remedy="start an instance of the device for this, on a bus of its own (or give --force, and lose the machine's state)",
        )
    everybody = await find(bus, timeout)
    chosen = [found for found in everybody if not wanted or found.id in (wanted, None)]
    if not chosen:
        names = ", ".join(str(found.id) for found in everybody)
        raise UsageError(
            f"no process with the Id {wanted!r} is on this bus"
            if wanted
            else "nobody on this bus has org.qemu.VMState1",
            remedy=f"there are {names}"[:300] if names else "start the device with this bus's address",
        )
    for found in chosen:
        async for finding in _process(bus, found, everybody, timeout):
            yield finding


async def _process(bus: Bus, found: Found, everybody: list[Found], timeout: float) -> AsyncIterator[Finding]:
    name = found.id if found.id is not None else found.name

    def say(seen: vmstate.Seen) -> Finding:
        return Finding(seen[0], name, seen[1], seen[2])

    if found.id is None:
        yield say(("vmstate.identity", Verdict.FAIL, found.why))
        return
    yield say(("vmstate.identity", Verdict.OK, found.id))
    twins = [other.name for other in everybody if other.id == found.id and other is not found]
    yield say(
        (
            "vmstate.unique",
            Verdict.FAIL if twins else Verdict.OK,
            f"{', '.join(twins)} has it, too" if twins else "no other has it",
        )
    )
    process = Process(bus, found, timeout)
    try:
        async for finding in _checked(process):
            yield say(finding)
    except FerryError as error:
        yield say(("device.as-found", Verdict.FAIL, error.reason))


async def _checked(process: Process) -> AsyncIterator[vmstate.Seen]:
    if not process.found.typed:
        async for seen in vmstate.check(process, streams=False, still=False):
            yield seen
        return
    try:
        info = await process.client.info(timeout=process.timeout)
    except FerryError as error:
        yield "device.properties", Verdict.FAIL, error.reason
        return
    # VMState1 first, as QEMU uses it, on the device as it is; then it is stopped.
    async for seen in vmstate.check(process, streams=info.streams, still=info.state in ("STOP", "STOP_COPY")):
        yield seen
    if (await process.client.info(timeout=process.timeout)).state == "ERROR":
        yield "device.as-found", Verdict.FAIL, "it is in ERROR now: nothing more can be tried"
        return
    async for seen in Device1(process, info).check():
        yield seen
    try:
        reached = await process.client.set_state(info.state, timeout=process.timeout)
        verdict = Verdict.OK if reached == info.state else Verdict.FAIL
        yield "device.as-found", verdict, f"it is in {reached} again"
    except FerryError as error:
        yield "device.as-found", Verdict.FAIL, error.reason
