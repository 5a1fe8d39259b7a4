"""A supervisor with real participants on a real bus, when that bus dies under it."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from migrate.bus import Bus
from migrate.bus.supervisor import SupervisorClient
from migrate.errors import FerryError
from migrate.machine.config import DeviceConfig, MachineConfig, RegionConfig
from migrate.machine.process import MachineProcess, Spec
from migrate.machine.states import MachineState as S
from migrate.machine.supervisor import Supervisor

JOB = "a" * 32
MACHINE = MachineConfig(
    "web1", [RegionConfig(0, 1 << 20)], [DeviceConfig("rtc0", "rtc", irq=1), DeviceConfig("uart0", "uart16550", irq=2)],
    vcpu=False,
)  # fmt: skip


@asynccontextmanager
async def machine(*, incoming: bool = False) -> AsyncIterator[tuple[MachineProcess, Supervisor]]:
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as directory:
        process = MachineProcess(Spec(Path(directory), MACHINE, incoming=incoming, fresh=False))
        try:
            yield process, await process.build()
        finally:
            await process.tear_down()


async def kill_bus(process: MachineProcess) -> None:
    """SIGKILL to the machine's dbus-daemon; returns when another has taken its place and the supervisor is on it."""
    pid = process.private_bus.pid
    assert pid is not None
    lost = process.bus
    os.kill(pid, signal.SIGKILL)
    while process.bus is lost or process.private_bus.pid in (None, pid):
        await asyncio.sleep(0.01)
    while True:
        try:
            await describe(process)
            return
        except FerryError:
            await asyncio.sleep(0.01)


async def describe(process: MachineProcess) -> dict[str, object]:
    bus = await Bus.connect(process.private_bus.address)
    try:
        return await SupervisorClient(bus).describe()
    finally:
        await bus.close()


@asynccontextmanager
async def coordinator(process: MachineProcess) -> AsyncIterator[str]:
    """Somebody on the machine's bus; its unique name."""
    bus = await Bus.connect(process.private_bus.address)
    try:
        yield bus.unique_name
    finally:
        await bus.close()


async def until(supervisor: Supervisor, state: S) -> None:
    while supervisor.state is not state:
        await asyncio.sleep(0.01)


def test_a_bus_that_dies_comes_back_with_everybody_on_it() -> None:
    async def play() -> None:
        async with machine() as (process, supervisor):
            await kill_bus(process)
            await supervisor.pause()  # reaches every participant, over the new bus
            await supervisor.run()
            assert (await describe(process))["state"] == "running"

    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize("state", [S.OUTGOING, S.STOPPED])
def test_a_machine_whose_bus_dies_under_a_migration_runs_on(state: S) -> None:
    async def play() -> None:
        async with machine() as (process, supervisor), coordinator(process) as name:
            await supervisor.begin_outgoing(JOB, "unix:/peer", name)
            if state is S.STOPPED:
                await supervisor.quiesce(JOB)
            await kill_bus(process)
            await until(supervisor, S.RUNNING)
            assert supervisor.job is None

    asyncio.run(asyncio.wait_for(play(), 60))


def test_in_doubt_nothing_changes_when_the_bus_dies() -> None:
    async def play() -> None:
        async with machine() as (process, supervisor), coordinator(process) as name:
            epoch = await supervisor.begin_outgoing(JOB, "unix:/peer", name)
            await supervisor.quiesce(JOB)
            await supervisor.commit(JOB, epoch)
            await kill_bus(process)
            assert (await describe(process))["state"] == "in-doubt"
            await supervisor.peer_said(JOB, epoch, "aborted", "[]")
            assert supervisor.state is S.RUNNING

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_stop_during_which_the_bus_dies_is_a_stop() -> None:
    async def play() -> None:
        async with machine() as (process, supervisor), coordinator(process) as name:
            await supervisor.begin_outgoing(JOB, "unix:/peer", name)
            stopping = asyncio.create_task(supervisor.quiesce(JOB))
            await asyncio.sleep(0)
            await kill_bus(process)
            try:
                await stopping
            except FerryError:
                pass  # it may have been too late for that as well: then the machine runs
            await until(supervisor, S.RUNNING)

    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize(("ready", "after"), [(False, S.ENDED), (True, S.HELD)])
def test_an_incoming_machine_whose_bus_dies_ends_or_is_held(ready: bool, after: S) -> None:
    async def play() -> None:
        async with machine(incoming=True) as (process, supervisor), coordinator(process) as name:
            await supervisor.begin_incoming(JOB, 1, "unix:/peer", name)
            if ready:
                await supervisor.ready(JOB)
            await kill_bus(process)
            await until(supervisor, after)

    asyncio.run(asyncio.wait_for(play(), 60))
