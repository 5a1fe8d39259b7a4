"""`assert_migratable`: a device is used, moved, and used on, here and there, and all that a guest could see is the same.

    source   ── traffic ── stop ── save ─┬─ run again ── traffic ─┐
                                         │                        ├─ the same registers, memory, interrupts, output, state
    fresh process, waiting ── load ──────┴─ run ─────── traffic ──┘

The source goes on as after a migration that was aborted, so it is the measure of the destination.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from migrate.errors import FerryError
from migrate.state import blob, catalog
from migrate.state.compare import differences
from migrate.state.lifecycle import DeviceState
from migrate.testing.driver import Driver, MakeDriver, Memory, Read, Step, Wait, Write, driver, random_traffic
from migrate.testing.pair import Side, sides

#: How long a device is watched while it stands still, s.
_STILL: Final = 0.3
_MIB: Final = 1 << 20
#: The way to stand still, for a device that streams and for one that does not.
_STREAMED: Final = (DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P, DeviceState.STOP_COPY)
_PLAIN: Final = (DeviceState.RUNNING_P2P, DeviceState.STOP)


class MigrationDefect(AssertionError):
    """The device would not survive a migration as it is. The text says what differs, where, and what that means."""


def assert_migratable(
    command: Sequence[str],
    *,
    registers: Sequence[Read] = (),
    traffic: Sequence[Step] | None = None,
    more: Sequence[Step] | None = None,
    moving: Collection[str] = (),
    moving_registers: Collection[int] = (),
    memory: int = 4 * _MIB,
    driven_by: str | MakeDriver = "vfio-user",
    environment: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> None:
    """Move a device between two fresh processes, and fail with what a guest would notice.

    :param command: starts the device's process, without --id, --bus and --socket, which are added. `{directory}` in it is a
        directory of the process's own; what it writes to `{directory}/*.out` is its output.
    :param registers: those that may be read and written at random; every one is read after the move.
    :param traffic: what the guest does before the move; without it, random accesses to `registers`.
    :param more: what it does after the move, on both; without it, the same again.
    :param moving: fields of the state that time moves: not compared after the move.
    :param moving_registers: offsets of registers that time moves: read, and not compared.
    :param driven_by: how registers are reached: a name of the entry points `vmferry.drivers`, or what makes a driver.
    :param seed: of the random accesses; it is in the message when something differs.
    :raise MigrationDefect: what a guest would notice, or what a migration would fail at.
    """
    chosen = random.randrange(1 << 32) if seed is None else seed
    before = list(traffic) if traffic is not None else random_traffic(registers, chosen) if registers else []
    after = list(more) if more is not None else before
    make = driver(driven_by) if isinstance(driven_by, str) else driven_by
    run = _Run(command, make, [*registers], frozenset(moving), frozenset(moving_registers), environment or {})
    try:
        asyncio.run(run.play(before, after, memory))
    except FerryError as error:
        raise MigrationDefect(f"{run.doing}: {error.reason} (seed {chosen})") from error
    except MigrationDefect as defect:
        raise MigrationDefect(f"{defect} (seed {chosen})") from None


class _Run:
    """:ivar doing: what is under way, for the message where it fails."""

    def __init__(
        self, command: Sequence[str], make: MakeDriver, registers: list[Read], moving: frozenset[str],
        moving_registers: frozenset[int], environment: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._command, self._make, self._registers = command, make, registers
        self._moving, self._moving_registers, self._environment = moving, moving_registers, environment
        self.doing = "starting it"

    async def play(self, before: Sequence[Step], after: Sequence[Step], memory: int) -> None:
        async with sides(2, memory) as (source, target):
            await source.start(self._command, environment=self._environment)
            here = await asyncio.to_thread(self._make, source.socket, source.regions)
            try:
                self.doing = "the traffic before the move"
                await self._traffic(source, here, before)
                data = await self._stop_and_save(source, here)
                self.doing = "starting a fresh one that waits for the state"
                await target.start(self._command, "--incoming", environment=self._environment)
                there = await asyncio.to_thread(self._make, target.socket, target.regions)
                try:
                    await self._load(source, target, data)
                    await self._go_on(source, here, target, there, after)
                finally:
                    there.close()
            finally:
                here.close()

    # -- the source ------------------------------------------------------------------------------------------------------------

    async def _stop_and_save(self, source: Side, here: Driver) -> bytes:
        self.doing = "stopping it"
        info = await source.client.info()
        for state in _STREAMED if info.streams else _PLAIN:
            await source.client.set_state(state)
        here.interrupts()
        still = bytes(source.memory.regions[0].view)
        self.doing = "saving it"
        data = await source.client.save_as(version := info.version)
        await asyncio.sleep(_STILL)
        if (at := _differs(still, source.memory.regions[0].view)) is not None:
            raise MigrationDefect(
                f"after STOP the device wrote to guest memory at {at:#x}: the last pages are sent by then, what it writes is lost"
            )
        if raised := here.interrupts():
            raise MigrationDefect(
                f"after STOP the device raised interrupts {dict(raised)}: nobody hears them any more"
            )
        if (again := await source.client.save_as(version)) != data:
            raise MigrationDefect(f"stopped, it saves something else each time: {_of_states(data, again)}")
        return data

    # -- the destination -------------------------------------------------------------------------------------------------------

    async def _load(self, source: Side, target: Side, data: bytes) -> None:
        target.memory.regions[0].view[:] = source.memory.regions[0].view
        self.doing = "refusing a damaged state"
        for damaged in (data[: len(data) // 2], data[:-1] + bytes((data[-1] ^ 1,)), b""):
            try:
                await target.client.stage(damaged)
            except FerryError:
                continue
            raise MigrationDefect("it stages a damaged state: what is wrong would be loaded")
        self.doing = "moving what it streams"
        if (await source.client.info()).streams:
            await self._stream(source, target)
        self.doing = "loading what it saved"
        await target.client.check_incoming(data)
        await target.client.stage(data)
        await target.client.apply()
        await target.client.set_state(DeviceState.STOP)
        version = (await target.client.info()).version
        if (saved := await target.client.save_as(version)) != data:
            raise MigrationDefect(f"what was loaded is not what is saved again: {_of_states(data, saved)}")
        if await target.client.fingerprint() != await source.client.fingerprint():
            raise MigrationDefect(
                "what was streamed is not what is there: the large part of its state arrives otherwise"
            )

    async def _stream(self, source: Side, target: Side) -> None:
        while True:
            fd, size, _ = await source.client.stream_read(_MIB)
            try:
                if not size:
                    return
                await target.client.stream_write(fd, size)
            finally:
                os.close(fd)

    async def _go_on(
        self, source: Side, here: Driver, target: Side, there: Driver, after: Sequence[Step]
    ) -> None:
        self.doing = "running on, here and there"
        output = len(source.output())
        for side in (source, target):
            for state in (DeviceState.RUNNING_P2P, DeviceState.RUNNING):
                await side.client.set_state(state, stopped_ns=0)
        look = [*self._registers, *after, *self._registers]
        seen, found = [
            await self._traffic(side, guest, look) for side, guest in ((source, here), (target, there))
        ]
        for (step, left), (_, right) in zip(seen, found, strict=True):
            if left != right and step.offset not in self._moving_registers:
                raise MigrationDefect(
                    f"register {step.offset:#x} (region {step.region}) reads as {left:#x} where the machine stayed, {right:#x} "
                    "where it arrived: the device forgets it, or restores it otherwise"
                )
        for side in (source, target):
            for state in (DeviceState.RUNNING_P2P, DeviceState.STOP):
                await side.client.set_state(state)
        mine, theirs = dict(here.interrupts()), dict(there.interrupts())
        if not self._moving_registers and mine != theirs:
            raise MigrationDefect(
                f"interrupts raised: {mine} where the machine stayed, {theirs} where it arrived"
            )
        await self._compare(source, target, output)

    async def _compare(self, source: Side, target: Side, output: int) -> None:
        if (
            not self._moving
            and (at := _differs(source.memory.regions[0].view, target.memory.regions[0].view)) is not None
        ):
            raise MigrationDefect(f"guest memory differs from {at:#x} on, after the same traffic")
        version = (await source.client.info()).version
        left, right = await source.client.save_as(version), await target.client.save_as(version)
        text = _of_states(left, right, self._moving)
        if text:
            raise MigrationDefect(f"after the same traffic the states differ: {text}")
        stayed, arrived = source.output()[output:], target.output()
        if stayed != arrived:
            raise MigrationDefect(
                f"output: {stayed[:60]!r} where the machine stayed, {arrived[:60]!r} where it arrived"
            )

    async def _traffic(self, side: Side, guest: Driver, steps: Sequence[Step]) -> list[tuple[Read, int]]:
        """What was read."""
        found = []
        for step in steps:
            match step:
                case Read():
                    found.append(
                        (step, await asyncio.to_thread(guest.read, step.region, step.offset, step.size))
                    )
                case Write():
                    await asyncio.to_thread(guest.write, step.region, step.offset, step.size, step.value)
                case Memory():
                    side.memory.regions[0].view[step.gpa : step.gpa + len(step.data)] = step.data
                case Wait():
                    await asyncio.sleep(step.seconds)
        return found


def _differs(left: bytes | memoryview, right: bytes | memoryview) -> int | None:
    if left == right:
        return None
    return next(at for at, (one, other) in enumerate(zip(left, right, strict=True)) if one != other)


def _of_states(left: bytes, right: bytes, moving: Collection[str] = ()) -> str:
    """Field by field; "" where all that differs is moved by time."""
    schema = catalog.load(blob.header_of(left).type)
    found = list(differences(blob.read(left, schema)[1], blob.read(right, schema)[1]))
    told = [one for one in found if one.path.split("[")[0].split(".")[1] not in moving]
    return "; ".join(f"{one.path} {one.left!r} → {one.right!r}" for one in told)[:400]
