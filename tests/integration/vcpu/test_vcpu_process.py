"""The vCPU's process among real device processes: run, rest, move, lose a device, end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vcpu_processes import ROOT, SIZE, WRITERS, Machine

from migrate.errors import DeviceError, DeviceRefused, TrackerError
from migrate.memory import prove
from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory, RegionSpec

BUSY = "span=8 check=64 dirty=32 tick_us=5000 draw=2 loop=2"


@pytest.fixture(params=["scan", "log"])
def tracker(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        prove.prove(name)
    except TrackerError as error:
        pytest.skip(str(error))
    return name


def test_the_guest_ticks_finds_nothing_wrong_and_rests_when_told(machines):
    async def scenario(machine: Machine) -> None:
        await machine.start(BUSY)
        await machine.run()
        took = []
        for _ in range(10):
            await machine.until_ticks(3)
            began = time.monotonic()
            await machine.clients["vcpu0"].set_state("RUNNING_P2P")
            took.append(time.monotonic() - began)
            said = machine.said()
            assert (await machine.clients["vcpu0"].info()).state == "RUNNING_P2P"
            assert machine.said() == said
            await machine.clients["vcpu0"].set_state("RUNNING")
        await machine.until_ticks(10)
        assert machine.said()[0] == f"B {SIZE} 3 {8 << 8}"
        seen = machine.ticks()  # once: the guest goes on
        assert seen == list(range(1, len(seen) + 1))
        assert not machine.corrupt()
        # Of ten, the one that the rest of this host disturbed least.
        assert min(took) < 0.01

    machines(scenario)


def test_what_is_tracked_while_it_runs_makes_a_whole_copy_that_goes_on_in_other_processes(machines, tracker):
    async def scenario(source: Machine, destination: Machine) -> None:
        await source.start(BUSY, tracker=tracker)
        await destination.start(incoming=True, tracker=tracker)
        assert len(destination.memory.data_extents()) == 0
        await source.run()
        await source.until_ticks(20)
        for name in WRITERS:
            assert (await source.clients[name].info()).tracker in ("scan", "log")
            await source.clients[name].start_tracking()
        dirty = await source.collect()
        dirty.set_runs(source.memory.data_extents())
        for _ in range(10):
            copy(source, destination, dirty)
            await source.until_ticks(2)
            dirty = await source.collect()
            assert dirty.any()
        for name in source.clients:
            await source.clients[name].set_state("PRE_COPY")
        await source.rest(last="STOP_COPY")
        stopped = time.monotonic_ns()
        dirty |= await source.collect()
        copy(source, destination, dirty)
        assert source.memory.equal_to(destination.memory)

        await stream(source, destination)
        await destination.load(await source.save())
        for name in source.clients:
            theirs = await destination.clients[name].fingerprint()
            assert await source.clients[name].fingerprint() == theirs, name
        ticks = len(source.ticks())
        await destination.run(stopped_ns=time.monotonic_ns() - stopped)
        await destination.until_ticks(200)
        assert len(destination.ticks()) >= ticks + 200
        seen = destination.ticks()  # once: the guest goes on
        assert seen == list(range(1, len(seen) + 1))
        assert not destination.corrupt()

    machines(scenario)


def copy(source: Machine, destination: Machine, dirty) -> None:
    pages = dirty.pages_array()
    destination.memory.regions[0].pages[pages] = source.memory.regions[0].pages[pages]


async def stream(source: Machine, destination: Machine) -> None:
    size = 1
    while size:
        chunk, size, _ = await source.clients["display0"].stream_read(8 << 20)
        if size:
            await destination.clients["display0"].stream_write(chunk, size)
        os.close(chunk)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        pytest.param(signal.SIGKILL, "its device rtc0: vfio-user: the connection broke", id="vanishes"),
        # The guest's access ends by the deadline of vfio_user.client.TIMEOUT.
        pytest.param(signal.SIGSTOP, "its device rtc0: no answer to vfio-user", id="hangs"),
    ],
)
def test_a_device_that_is_lost_stops_the_vcpu_and_is_named(machines, number, says):
    async def scenario(machine: Machine) -> None:
        await machine.start(BUSY)
        await machine.run()
        await machine.until_ticks(3)
        machine.processes["rtc0"].send_signal(number)
        while (await machine.clients["vcpu0"].info()).state != "ERROR":
            await asyncio.sleep(0.01)
        said = machine.said()
        with pytest.raises(DeviceRefused):
            await machine.clients["vcpu0"].set_state("RUNNING_P2P")
        machine.processes["vcpu0"].terminate()
        assert await machine.processes["vcpu0"].wait() == 0
        log = await machine.log("vcpu0")
        assert "event=vcpu_failed id=vcpu0" in log
        assert says in log
        assert machine.said() == said

    machines(scenario)


def test_a_guest_that_powers_off_ends_the_process_without_an_error(machines):
    async def scenario(machine: Machine) -> None:
        await machine.start(BUSY + " ticks=5")
        await machine.run()
        assert await machine.processes["vcpu0"].wait() == 0
        assert machine.said()[-1] == "DONE"
        assert "event=powered_off" in await machine.log("vcpu0")

    machines(scenario)


def test_a_device_that_is_not_there_is_named_when_memory_is_attached(machines):
    async def scenario(machine: Machine) -> None:
        await machine.start(BUSY)
        await machine.spawn(
            "vcpu1", "devices.vcpu", "--paused", "--platform", str(machine.directory / "platform.json")
        )
        await machine.find_all()
        memory = GuestMemory.create([RegionSpec(GuestAddress(0), SIZE)], "other")
        machine.processes["uart0"].kill()
        await machine.processes["uart0"].wait()
        with pytest.raises(DeviceError, match="its device uart0: nobody serves vfio-user"):
            await machine.clients["vcpu1"].attach_memory(0, SIZE, memory.regions[0].fd, 0, timeout=15)
        memory.close()

    machines(scenario)


# -- before it begins ---------------------------------------------------------------------------------------------------------


def begin(tmp_path: Path, platform: str, path: str = "") -> subprocess.CompletedProcess[str]:
    (tmp_path / "platform.json").write_text(platform)
    words = [
        "--id",
        "vcpu0",
        "--bus",
        "unix:path=/nowhere",
        "--platform",
        str(tmp_path / "platform.json"),
        "--paused",
    ]
    return subprocess.run(
        [sys.executable, "-m", "devices.vcpu", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_without_unicorn_it_says_in_one_line_what_to_install(tmp_path):
    (tmp_path / "unicorn.py").write_text("raise ImportError('Failed to load the Unicorn dynamic library')")
    ended = begin(tmp_path, '{"devices": []}', str(tmp_path))
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "pip install vmferry[vcpu]" in ended.stderr


def test_a_platform_file_that_is_wrong_is_one_line_and_exit_2(tmp_path):
    pytest.importorskip("unicorn", reason="the vCPU needs Unicorn: pip install vmferry[vcpu]")
    ended = begin(tmp_path, '{"devices": [], "cpus": 2}')
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "'cpus'" in ended.stderr
