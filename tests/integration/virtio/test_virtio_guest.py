"""The built-in guest on a real disk process: it runs, stands still, moves and loses nothing that it was told lasts."""

from __future__ import annotations

import asyncio
import signal

import pytest
from disk_machine import DiskMachine, durable, missing

from migrate.errors import DeviceRefused, TrackerError
from migrate.memory import prove

BUSY = "span=4 check=32 dirty=16 tick_us=5000 loop=2 disk=8 disk_kb=512 flush=16"


@pytest.fixture(params=["scan", "log"])
def tracker(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        prove.prove(name)
    except TrackerError as error:
        pytest.skip(str(error))
    return name


def all_is_well(machine: DiskMachine) -> None:
    assert not machine.corrupt()
    assert machine.ticks() == list(range(1, len(machine.ticks()) + 1))
    assert not missing(machine.image, machine.said())


def test_it_works_on_the_disk_and_goes_on_after_it_stood_still(machines):
    async def scenario(machine: DiskMachine) -> None:
        await machine.start(BUSY)
        await machine.run()
        for _ in range(5):
            await machine.until_lasting(48)
            await machine.rest()
            all_is_well(machine)
            image = machine.image.read_bytes()
            blob = await machine.clients["disk0"].save_as(1)
            assert await machine.clients["disk0"].save_as(1) == blob
            assert machine.image.read_bytes() == image
            await machine.run()
        await machine.until_lasting(48)

    machines(scenario)


def test_it_moves_to_and_fro_with_requests_on_their_way_by_what_is_tracked(machines, tracker):
    async def scenario(first: DiskMachine, second: DiskMachine, third: DiskMachine) -> None:
        await first.start(BUSY, tracker=tracker)
        await first.run()
        source = first
        for destination in (second, third):
            await destination.start(incoming=True, tracker=tracker)
            await source.until_lasting(48)
            await source.flow(destination, tracker)
            assert source.memory.equal_to(destination.memory)
            for name in source.clients:
                theirs = await destination.clients[name].fingerprint()
                assert await source.clients[name].fingerprint() == theirs, name
            await destination.run(stopped_ns=1_000_000)
            source = destination
        await source.until_lasting(96)
        await source.rest()
        all_is_well(source)

    machines(scenario)


def test_a_move_that_is_taken_back_takes_the_image_back_with_it(machines):
    async def scenario(source: DiskMachine, destination: DiskMachine) -> None:
        await source.start(BUSY)
        await source.run()
        await source.until_lasting(16)
        await destination.start(incoming=True)
        await source.flow(destination, "log")
        await destination.clients["disk0"].set_state("RUNNING_P2P")
        with pytest.raises(DeviceRefused, match=r"disk0: the image .* is locked"):
            await source.clients["disk0"].set_state("RUNNING_P2P")
        assert (await source.clients["disk0"].info()).state == "STOP"
        destination.processes["disk0"].kill()
        await destination.processes["disk0"].wait()
        await source.run(stopped_ns=1_000_000)
        await source.until_lasting(48)
        await source.rest()
        all_is_well(source)

    machines(scenario)


def test_what_was_said_to_last_is_there_when_the_disks_process_is_killed(machines):
    async def scenario(machine: DiskMachine) -> None:
        await machine.start(BUSY)
        await machine.run()
        await machine.until_lasting(200)
        machine.processes["disk0"].send_signal(signal.SIGKILL)
        await machine.processes["disk0"].wait()
        # One that was killed amidst its work has said that it need not be told of more: then the guest never touches it again.
        touched = False
        for _ in range(1000):
            if touched := (await machine.clients["vcpu0"].info()).state == "ERROR":
                break
            await asyncio.sleep(0.01)
        assert durable(machine.said())[0] >= 200
        assert not machine.corrupt()
        assert not missing(machine.image, machine.said())
        machine.processes["vcpu0"].terminate()
        assert await machine.processes["vcpu0"].wait() == 0
        said = "its device disk0: vfio-user: the connection broke" in await machine.log("vcpu0")
        assert said is touched

    machines(scenario)
