"""A device's state leaves one process and enters another; what is refused changes nothing."""

from __future__ import annotations

import os

import pytest

from devices.kit.runtime import _ARCS
from migrate.bus import DeviceClient
from migrate.errors import BlobError, DeviceRefused, DeviceTimeout
from migrate.state import Blob, blob, catalog, lifecycle

COUNT, LIMIT, REPORT = 0, 8, 16


def values_in(data: bytes, machine) -> dict[str, object]:
    return blob.read(data, catalog.load("counter", [machine.here]))[1]


async def stopped_at(machine, name: str, count: int, *arguments: str):
    """A counter that stands at `count`, in STOP."""
    counter = await machine.device("counter", name, "--paused", *arguments)
    await counter.bus.set_state("RUNNING_P2P")
    with counter.vmm() as vmm:
        vmm.region_write(0, COUNT, 8, count)
        vmm.region_write(0, LIMIT, 8, 2**40)
    await counter.bus.set_state("STOP")
    return counter


def test_every_arc_of_vfio_migration_is_implemented():
    assert set(_ARCS) == {(state, to) for state, targets in lifecycle.ARCS.items() for to in targets}


def test_a_device_goes_on_in_another_process_where_it_stood(machines):
    async def scenario(here, there):
        source = await here.device("counter", "c0")
        target = await there.device("counter", "c0", "--incoming")
        with source.vmm() as vmm:
            vmm.region_write(0, LIMIT, 8, 2**40)
        await source.bus.set_state("STOP")
        data = await source.bus.save_as(2)
        await target.bus.check_incoming(data)
        await target.bus.stage(data)
        await target.bus.apply()
        assert await target.bus.set_state("STOP") == "STOP"
        assert await target.bus.fingerprint() == await source.bus.fingerprint()
        assert await target.bus.save_as(2) == data
        await target.bus.set_state("RUNNING_P2P", stopped_ns=1_000_000)
        with target.vmm() as vmm:
            assert vmm.region_read(0, COUNT, 8) == values_in(data, here)["count"]
        await target.bus.set_state("RUNNING")
        await target.bus.finish("completed")
        await source.bus.finish("completed")

    machines(scenario)


def test_an_abort_after_the_save_leaves_a_source_that_runs_on(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0")
        with counter.vmm() as vmm:
            vmm.region_write(0, LIMIT, 8, 2**40)
            await counter.bus.set_state("STOP")
            before = values_in(await counter.bus.save_as(2), machine)["count"]
            await counter.bus.finish("aborted")
            assert await counter.bus.set_state("RUNNING", stopped_ns=5) == "RUNNING"
            while vmm.region_read(0, COUNT, 8) == before:
                pass

    machines(scenario)


def test_qemu_saves_and_loads_it_while_it_runs(machines):
    async def scenario(here, there):
        source = await here.device("counter", "c0")
        target = await there.device("counter", "c0")
        with source.vmm() as vmm:
            vmm.region_write(0, COUNT, 8, 41)
        data = await source.bus.save()
        assert (await source.bus.info()).state == "RUNNING"
        await target.bus.load(data)
        assert (await target.bus.info()).state == "RUNNING"
        with target.vmm() as vmm:
            assert vmm.region_read(0, COUNT, 8) == 41

    machines(scenario)


def test_resuming_is_left_only_by_a_state_that_was_applied(machines):
    async def scenario(machine):
        source = await stopped_at(machine, "c0", 5)
        data = await source.bus.save_as(2)
        with pytest.raises(DeviceRefused, match="RESUMING only, not in STOP"):
            await source.bus.stage(data)
        await source.bus.set_state("RESUMING")
        with pytest.raises(DeviceRefused, match="no staged state"):
            await source.bus.apply()
        with pytest.raises(DeviceRefused, match="no state was applied"):
            await source.bus.set_state("STOP")
        for refused in (source.bus.save_as(2), source.bus.fingerprint()):
            with pytest.raises(DeviceRefused):
                await refused
        await source.bus.stage(data)
        with pytest.raises(DeviceRefused, match="no state was applied"):
            await source.bus.set_state("RUNNING")
        await source.bus.apply()
        assert await source.bus.set_state("RUNNING_P2P") == "RUNNING_P2P"
        with source.vmm() as vmm:
            assert vmm.region_read(0, COUNT, 8) == 5

    machines(scenario)


def test_a_rehearsal_leaves_nothing_behind(machines):
    async def scenario(here, there):
        first, second = await stopped_at(here, "c0", 5), await stopped_at(there, "c0", 6)
        rehearsed = await first.bus.save_as(2)
        await second.bus.set_state("RESUMING")
        await second.bus.stage(rehearsed)
        await second.bus.apply()
        await second.bus.set_state("STOP")
        await second.bus.set_state("RESUMING")
        with pytest.raises(DeviceRefused, match="no staged state"):
            await second.bus.apply()

    machines(scenario)


def test_a_blob_that_is_refused_leaves_the_one_that_was_staged_and_says_why(machines):
    async def scenario(machine):
        source = await stopped_at(machine, "c0", 5)
        other = await stopped_at(machine, "other", 6)
        good = await source.bus.save_as(2)
        elsewhere = await other.bus.save_as(2)
        schema = catalog.load("counter", [machine.here])
        newest = schema.at(2)
        damaged = bytearray(good)
        damaged[-8] ^= 1
        twisted = blob.unpack(good)
        wrong = {
            "checksum": bytes(damaged),
            "no vmferry state blob": b"x" * 100,
            "header says": good[:-1],
            "state of 'other'": elsewhere,
            "state of a rtc": blob.pack(Blob("rtc", "c0", 1, bytes(32), b"")),
            "the blob is version 9": blob.pack(Blob("counter", "c0", 9, newest.digest, twisted.payload)),
            "defined otherwise": blob.pack(Blob("counter", "c0", 2, bytes(32), twisted.payload)),
            "cannot be read as counter version 2": blob.pack(
                Blob("counter", "c0", 2, newest.digest, twisted.payload + b"\xc0")
            ),
        }
        await source.bus.set_state("RESUMING")
        await source.bus.stage(good)
        for text, data in wrong.items():
            for call in (source.bus.check_incoming, source.bus.stage):
                with pytest.raises((BlobError, DeviceRefused), match=text) as caught:
                    await call(data)
                assert caught.value.device == "c0"
        await source.bus.apply()
        await source.bus.set_state("STOP")
        assert values_in(await source.bus.save_as(2), machine)["count"] == 5

    machines(scenario)


def test_an_older_release_is_played_by_max_version(machines):
    async def scenario(here, there):
        old = await stopped_at(here, "c0", 5, "--max-version", "1")
        new = await there.device("counter", "c0", "--incoming")
        info = await old.bus.info()
        assert (info.version, info.readable, info.writable) == (1, (1,), (1,))
        with pytest.raises(DeviceRefused, match="writes counter version 1, not 2"):
            await old.bus.save_as(2)
        # A newer one takes it over, what the older did not have at its default.
        await new.bus.stage(await old.bus.save_as(1))
        await new.bus.apply()
        await new.bus.set_state("STOP")
        state = await new.bus.save_as(2)
        assert values_in(state, here) == {"count": 5, "limit": 2**40, "report_gpa": 0}
        # The other way there is no version in common.
        await old.bus.set_state("RESUMING")
        with pytest.raises(DeviceRefused, match="reads counter version 1, and the blob is version 2"):
            await old.bus.stage(state)

    machines(scenario)


def test_the_words_of_the_bus_are_checked(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0", "--paused")
        with pytest.raises(DeviceRefused, match="no device state 'WALKING'"):
            await counter.bus.set_state("WALKING")
        with pytest.raises(DeviceRefused, match="does not end as 'maybe'"):
            await counter.bus.finish("maybe")
        with pytest.raises(DeviceRefused, match="no streamed state"):
            await counter.bus.stream_read(1 << 20)
        assert (await counter.bus.info()).state == "STOP"

    machines(scenario)


async def uart(machine, fault: str, *arguments: str) -> DeviceClient:
    return (await machine.device(f"devices.faulty uart16550 --fail {fault}", "uart0", *arguments)).bus


async def uart_blob(machine) -> bytes:
    device = await machine.device("devices.uart16550", "uart0", "--paused")
    return await device.bus.save_as(2)


def test_a_load_that_fails_is_refused_with_the_reason_and_ends_in_error(machines):
    async def scenario(here, there):
        data = await uart_blob(here)
        faulty = await uart(there, "apply", "--incoming")
        await faulty.stage(data)
        with pytest.raises(DeviceRefused, match="uart0: Apply: RuntimeError: told to fail") as caught:
            await faulty.apply()
        assert caught.value.phase == "load"
        assert (await faulty.info()).state == "ERROR"
        with pytest.raises(DeviceRefused, match="it is in ERROR: Apply: RuntimeError: told to fail"):
            await faulty.set_state("STOP")

    machines(scenario)


def test_a_reset_by_the_vmm_leads_out_of_error_to_stop(machines):
    async def scenario(here, there):
        data = await uart_blob(here)
        faulty = await there.device("devices.faulty uart16550 --fail apply", "uart0", "--incoming")
        await faulty.bus.stage(data)
        with pytest.raises(DeviceRefused):
            await faulty.bus.apply()
        with faulty.vmm() as vmm:
            vmm.reset()
            # Where it then runs is not the guest's to say.
            assert (await faulty.bus.info()).state == "STOP"
            await faulty.bus.set_state("RUNNING")
            assert vmm.region_read(0, 5, 1) == 0x60

    machines(scenario)


def test_a_stage_that_is_refused_leaves_the_device_waiting(machines):
    async def scenario(here, there):
        data = await uart_blob(here)
        faulty = await uart(there, "stage", "--incoming")
        with pytest.raises(DeviceRefused, match="uart0: told to refuse"):
            await faulty.stage(data)
        assert (await faulty.info()).state == "RESUMING"

    machines(scenario)


def test_a_save_that_fails_leaves_a_device_that_can_run_again(machines):
    async def scenario(machine):
        faulty = await uart(machine, "save")
        await faulty.set_state("STOP")
        with pytest.raises(DeviceRefused, match="save: RuntimeError"):
            await faulty.save_as(2)
        assert await faulty.set_state("RUNNING") == "RUNNING"

    machines(scenario)


def test_a_stop_or_start_that_fails_leaves_the_state_before_that_arc(machines):
    async def scenario(here, there):
        stuck = await uart(here, "stop")
        with pytest.raises(DeviceRefused, match="RUNNING_P2P to STOP: RuntimeError"):
            await stuck.set_state("STOP")
        assert (await stuck.info()).state == "RUNNING_P2P"
        assert await stuck.set_state("RUNNING") == "RUNNING"
        lame = await uart(there, "start", "--paused")
        with pytest.raises(DeviceRefused, match="STOP to RUNNING_P2P: RuntimeError"):
            await lame.set_state("RUNNING")
        assert (await lame.info()).state == "STOP"

    machines(scenario)


@pytest.mark.parametrize("fault", ["hang-save", "hang-apply"])
def test_a_device_that_hangs_misses_its_deadline_is_named_still_answers_and_can_be_ended(machines, fault):
    async def scenario(here, there):
        data = await uart_blob(here)
        process = await there.device(
            f"devices.faulty uart16550 --fail {fault}",
            "uart0",
            "--incoming" if "apply" in fault else "--paused",
        )
        if fault == "hang-apply":
            await process.bus.stage(data)
            hanging = process.bus.apply(timeout=0.2)
        else:
            hanging = process.bus.save_as(2, timeout=0.2)
        with pytest.raises(DeviceTimeout, match=r"uart0 did not answer (Apply|SaveAs) within 0\.2 s"):
            await hanging
        assert (await process.bus.info()).id == "uart0"
        process.process.terminate()
        assert await process.process.wait() == 0
        assert not os.path.exists(process.socket)  # noqa: ASYNC240

    machines(scenario)


def test_the_faults_of_a_type_that_does_not_exist_are_a_usage_error(machines):
    async def scenario(machine):
        process = await machine.spawn("devices.faulty teapot --fail save", "t0")
        _, errors = await process.communicate()
        assert process.returncode == 2
        assert "there is no device type 'teapot'" in errors.decode()

    machines(scenario)
