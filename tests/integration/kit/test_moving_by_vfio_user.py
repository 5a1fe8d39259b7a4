"""Device processes moved from one to another over vfio-user alone. The bus only looks: it says whether both are the same."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.protocols.vfio_user.client import Client
from devices.protocols.vfio_user.feature_messages import MigrationFlags, MigrationState
from devices.protocols.vfio_user.migration_client import Migration
from migrate.errors import DeviceRefused
from migrate.memory.memfd import create_memfd

S = MigrationState
PAGE = 4096
RAM, RAM_SIZE = 1 << 30, 1 << 20
BY_VMM = ("--migration", "vfio-user")


def bits(bitmap: bytes) -> set[int]:
    return {at for at in range(8 * len(bitmap)) if bitmap[at >> 3] >> (at & 7) & 1}


def carry(source: Migration, destination: Migration) -> int:
    carried = 0
    for data in source.read_all():
        destination.write(data)
        carried += len(data)
    return carried


def test_a_uart_is_moved_by_its_vmm_alone(machines) -> None:
    async def scenario(here, there) -> None:
        a = await here.device("devices.uart16550", "uart0", *BY_VMM)
        b = await there.device("devices.uart16550", "uart0", *BY_VMM)
        with a.vmm() as source, b.vmm() as destination:
            source.region_write(0, 7, 1, 0x5A)
            out, into = Migration(source), Migration(destination)
            assert out.flags() == MigrationFlags.STOP_COPY
            assert out.envelope().version in into.envelope().readable
            out.set_state(S.STOP_COPY)
            into.set_state(S.RESUMING)
            carry(out, into)
            into.set_state(S.STOP)
            assert await a.bus.fingerprint() == await b.bus.fingerprint()
            into.set_state(S.RUNNING)
            assert destination.region_read(0, 7, 1) == 0x5A

    machines(scenario)


def test_a_display_is_moved_while_it_draws_with_its_vram_and_the_memory_it_writes(machines) -> None:
    async def scenario(here, there) -> None:
        a = await here.device("devices.display", "display0", "--option", "vram=4M", *BY_VMM)
        b = await there.device("devices.display", "display0", "--option", "vram=4M", *BY_VMM)
        memory = create_memfd("ram", RAM_SIZE)
        with a.vmm() as source, b.vmm() as destination:
            for client in (source, destination):
                client.dma_map(RAM, RAM_SIZE, memory)

            def fill(colour: int, y: int, rows: int, fence: int) -> None:
                values = (
                    (0x1C, y),
                    (0x20, 1024),
                    (0x24, rows),
                    (0x30, colour),
                    (0x48, fence),
                    (0x50, colour),
                )
                for register, value in values:
                    source.region_write(0, register, 8 if register in (0x48, 0x50) else 4, value)
                source.region_write(0, 0x34, 4, 1)

            fill(0x112233, 0, 700, 0)
            out, into = Migration(source), Migration(destination)
            assert out.flags() == MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
            out.start_logging(PAGE)
            out.set_state(S.PRE_COPY)
            into.set_state(S.RESUMING)
            assert out.remaining().initial >= 700 * PAGE
            carried = carry(out, into)
            assert carried >= 700 * PAGE
            fill(0x445566, 100, 10, RAM + 5 * PAGE)
            left = out.remaining()
            assert (left.initial, left.dirty) == (0, 10 * PAGE)
            out.set_state(S.STOP_COPY)
            assert carry(out, into) < 20 * PAGE
            assert bits(out.dirty(RAM, RAM_SIZE, PAGE)) == {5}
            into.set_state(S.STOP)
            assert await a.bus.fingerprint() == await b.bus.fingerprint()
            into.set_state(S.RUNNING)
            assert destination.region_read(0, 0x40, 8) == 2
            source.region_info(0)  # a stopped source still answers its VMM
        os.close(memory)

    machines(scenario)


def test_the_bus_looks_at_what_a_vmm_moves_and_moves_nothing(machines) -> None:
    async def scenario(machine) -> None:
        a = await machine.device("devices.display", "display0", "--option", "vram=1M", *BY_VMM)
        assert (await a.bus.info()).state == "RUNNING"
        for refused in (
            a.bus.set_state("STOP"),
            a.bus.stage(b"x"),
            a.bus.apply(),
            a.bus.release_locks(),
            a.bus.stream_read(1 << 20),
            a.bus.finish("completed"),
        ):
            with pytest.raises(DeviceRefused, match="its VMM moves it"):
                await refused
        assert (await a.bus.info()).state == "RUNNING"

    machines(scenario)


def test_a_device_of_a_supervisor_refuses_its_vmm(machines) -> None:
    async def scenario(machine) -> None:
        a = await machine.device("devices.uart16550", "uart0", "--paused")
        with a.vmm() as vmm, pytest.raises(DeviceRefused, match="EBUSY"):
            Migration(vmm).set_state(S.RUNNING)
        assert (await a.bus.info()).state == "STOP"

    machines(scenario)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as path:
        yield Path(path)


def test_a_device_that_its_vmm_moves_needs_no_bus_and_ends_when_it_is_told_to(directory: Path) -> None:
    async def scenario() -> None:
        environment = {key: value for key, value in os.environ.items() if "DBUS" not in key}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "devices.uart16550", "--id", "uart0"),
            *("--socket", str(directory / "s"), *BY_VMM),
            env=environment,
            cwd=Path(__file__).parents[3],
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            with Client.connect(str(directory / "s"), timeout=20) as client:
                Migration(client).set_state(S.STOP_COPY)
                assert Migration(client).state() is S.STOP_COPY
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 10) == 0
            assert time.monotonic() - began < 5
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    asyncio.run(scenario())


def test_a_vmm_that_is_to_move_a_device_needs_its_socket() -> None:
    async def scenario() -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "devices.uart16550", "--id", "uart0", *BY_VMM),
            cwd=Path(__file__).parents[3],
            stderr=asyncio.subprocess.PIPE,
        )
        _, log = await process.communicate()
        assert process.returncode == 2
        assert b"--migration vfio-user without a socket" in log

    asyncio.run(scenario())
