"""The participants of a machine with a large state, as a coordinator handles them: streams of a machine that runs or is paused."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from migrate.bus import Bus, DeviceClient, DeviceInfo
from migrate.bus.supervisor import SupervisorClient
from migrate.coordinator import participants as module
from migrate.coordinator.participants import Member, Participants
from migrate.errors import Phase
from migrate.machine.config import DeviceConfig, MachineConfig, RegionConfig
from migrate.machine.process import MachineProcess, Spec
from migrate.machine.states import MachineState as S
from migrate.machine.supervisor import Supervisor
from migrate.memory import sealed_bytes

JOB = "a" * 32
DISPLAY = DeviceConfig("display0", "display", irq=1, options={"vram": "8M"})


@asynccontextmanager
async def display(*, paused: bool) -> AsyncIterator[tuple[Supervisor, Participants]]:
    """A machine that is nothing but a display, in a migration's hands."""
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as directory:
        machine = MachineConfig("web1", [RegionConfig(0, 1 << 20)], [DISPLAY], vcpu=False)
        process = MachineProcess(Spec(Path(directory), machine, incoming=False, fresh=False))
        try:
            supervisor = await process.build()
            if paused:
                await supervisor.pause()
            bus = await Bus.connect(process.private_bus.address)
            parts = await Participants.find(bus)
            await supervisor.begin_outgoing(JOB, "unix:/peer", bus.unique_name)
            yield supervisor, parts
            await bus.close()
        finally:
            await process.tear_down()


async def state_of(parts: Participants) -> str:
    return str((await parts.members[0].client.info()).state)


async def stream(parts: Participants, phase: Phase) -> list[bytes]:
    return [data async for _, data in parts.chunks({}, phase=phase)]


def test_nothing_of_a_paused_machine_runs_because_it_is_moved() -> None:
    async def play() -> None:
        async with display(paused=True) as (supervisor, parts):
            await parts.start_streams()
            assert await state_of(parts) == "STOP_COPY"
            await stream(parts, Phase.PRECOPY)
            await supervisor.quiesce(JOB)
            assert len(await parts.fingerprints({})) == 1  # only what stands still has one
            await supervisor.abort_outgoing(JOB, "why")
            assert supervisor.state is S.PAUSED
            # Out of that session: the next attempt begins one of its own, with all of the state in it.
            assert await state_of(parts) == "STOP"

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_running_display_streams_while_it_runs_and_goes_on_after_an_abort() -> None:
    async def play() -> None:
        async with display(paused=False) as (supervisor, parts):
            await parts.start_streams()
            assert await state_of(parts) == "PRE_COPY"
            await supervisor.abort_outgoing(JOB, "why")
            assert await state_of(parts) == "RUNNING"
            assert supervisor.state is S.RUNNING

    asyncio.run(asyncio.wait_for(play(), 60))


class Stream:
    """A participant with so many chunks left to give."""

    def __init__(self, chunks: int) -> None:
        self.left = chunks

    async def stream_read(self, max_bytes: int, *, phase: Phase) -> tuple[int, int, int]:
        data = b"x" * max_bytes if self.left else b""
        self.left = max(0, self.left - 1)
        return sealed_bytes(data, "chunk"), len(data), self.left * max_bytes


def test_a_round_takes_only_so_much_of_a_stream_and_the_last_pass_takes_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STREAM_ROUND_BYTES", 3 * 4096)
    monkeypatch.setattr(module, "MAX_CHUNK", 4096)
    info = DeviceInfo(
        id="display0", type="display", version=1, readable=(1,), writable=(1,), digest=bytes(32), state="PRE_COPY",
        tracker="none", streams=True, opaque=False, unique_name=":1.1", pid=1,
    )  # fmt: skip
    member = Member({}, cast(DeviceClient, Stream(20)), info)
    parts = Participants(cast(Bus, None), cast(SupervisorClient, None), {}, [member])

    async def play() -> None:
        left: dict[str, int] = {}
        first = [data async for _, data in parts.chunks(left, phase=Phase.PRECOPY)]
        assert (len(first), left) == (3, {"display0": 17 * 4096})
        # What is left at the stop belongs to the machine: none of it may stay behind.
        rest = [data async for _, data in parts.chunks(left, phase=Phase.SAVE)]
        assert (len(rest), left) == (17, {"display0": 0})

    asyncio.run(asyncio.wait_for(play(), 60))
