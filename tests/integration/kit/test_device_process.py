"""A device's process from its start to its end: arguments, bus, socket, memory, interrupts."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from devices.kit import Device
from devices.protocols.vfio_user.client import RequestRefused
from migrate.bus import Bus
from migrate.errors import DeviceRefused, MemoryFault, TrackerError
from migrate.memory.addresses import GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.memfd import create_memfd, read_sealed
from migrate.state import catalog

COUNT, LIMIT, REPORT = 0, 8, 16


def dirty_pages(bitmap: tuple[int, int], pages: int) -> list[int]:
    fd, count = bitmap
    found = DirtyBitmap.from_bytes(read_sealed(fd, -(-pages // 8), limit=1 << 20), pages)
    os.close(fd)
    assert found.count() == count
    return found.pages_array().tolist()


def until(condition: Callable[[], bool]) -> None:
    """A round trip to the device each time; a device that never gets there fails by the test's own deadline."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline


def wait_for_edge(eventfd: int) -> int:
    assert select.select([eventfd], [], [], 10)[0]
    return os.eventfd_read(eventfd)


def test_without_a_mode_it_runs_and_a_qemu_finds_it_under_both_names(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0")
        info = await counter.bus.info()
        assert (info.type, info.state, info.version, info.readable, info.writable) == (
            "counter",
            "RUNNING",
            2,
            (1, 2),
            (1, 2),
        )
        assert info.digest == catalog.load("counter", [machine.here]).at(2).digest
        assert info.tracker in ("scan", "log")
        assert not info.streams
        assert not info.opaque
        assert await machine.bus.queued_owners("org.qemu.VMState1") == [info.unique_name]
        with counter.vmm() as vmm:
            assert vmm.region_read(0, COUNT, 8) == 0

    machines(scenario)


def test_timers_run_in_running_and_pre_copy_only_and_an_interrupt_comes_through_its_eventfd(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0", "--paused")
        eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        with counter.vmm() as vmm:
            vmm.set_irq_eventfd(0, eventfd)
            await counter.bus.set_state("RUNNING_P2P")
            vmm.region_write(0, LIMIT, 8, 5)
            for state in ("RUNNING", "PRE_COPY"):
                await counter.bus.set_state(state)
                assert await asyncio.to_thread(wait_for_edge, eventfd) == 1
                count = vmm.region_read(0, COUNT, 8)
                vmm.region_write(0, LIMIT, 8, count + 5)
            await counter.bus.set_state("PRE_COPY_P2P")
            resting = vmm.region_read(0, COUNT, 8)
            vmm.region_write(0, LIMIT, 8, 2**63)
            # 20 periods of the timer: it had every chance to run.
            await asyncio.sleep(0.02)
            assert vmm.region_read(0, COUNT, 8) == resting
        os.close(eventfd)

    machines(scenario)


def test_an_interrupt_that_nobody_hears_is_signalled_to_the_next_vmm(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0")
        eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        with counter.vmm() as vmm:
            vmm.region_write(0, LIMIT, 8, 3)
            until(lambda: vmm.region_read(0, COUNT, 8) == 3)
        with counter.vmm() as vmm:
            vmm.set_irq_eventfd(0, eventfd)
            assert wait_for_edge(eventfd) == 1
        os.close(eventfd)

    machines(scenario)


@pytest.mark.parametrize("state", ["STOP", "STOP_COPY", "RESUMING"])
def test_where_it_is_stopped_accesses_are_refused_with_ebusy_and_a_vmm_can_still_set_up(machines, state):
    async def scenario(machine):
        counter = await machine.device("counter", "c0", "--paused")
        memory, eventfd = create_memfd("x", 4096), os.eventfd(0)
        await counter.bus.set_state(state)
        with counter.vmm() as vmm:
            for access in (
                lambda: vmm.region_read(0, COUNT, 8),
                lambda: vmm.region_write(0, LIMIT, 8, 5),
                lambda: vmm.trigger_irq(0),
                vmm.reset,
            ):
                with pytest.raises(RequestRefused) as caught:
                    access()
                assert caught.value.errno == errno.EBUSY
            vmm.dma_map(0, 4096, memory)
            vmm.set_irq_eventfd(0, eventfd)
        os.close(memory)
        os.close(eventfd)

    machines(scenario)


@pytest.mark.parametrize("tracker", ["scan", "log"])
def test_what_a_device_writes_is_collected_once_in_the_machines_numbering(machines, tracker):
    async def scenario(machine):
        counter = await machine.device("counter", "c0", "--tracker", tracker)
        memory = await machine.attach(counter.bus, sizes=(1 << 20, 2 << 20))
        assert (await counter.bus.info()).tracker == tracker
        high = memory.regions[1]
        target = high.gpa + 7 * 4096 + 16
        with counter.vmm() as vmm:
            for region in memory.regions:
                vmm.dma_map(region.gpa, region.size, region.fd)
            await counter.bus.start_tracking()
            assert dirty_pages(await counter.bus.collect_dirty(), memory.page_count) == []
            vmm.region_write(0, REPORT, 8, target)
            vmm.region_write(0, LIMIT, 8, 1)
            until(lambda: vmm.region_read(0, COUNT, 8) == 1)
            assert memory.find(GuestAddress(target), 8) == (1).to_bytes(8, "little")
            page = high.first_page + 7
            assert dirty_pages(await counter.bus.collect_dirty(), memory.page_count) == [page]
            assert dirty_pages(await counter.bus.collect_dirty(), memory.page_count) == []
            await counter.bus.stop_tracking()
            with pytest.raises(DeviceRefused, match="start tracking first"):
                await counter.bus.collect_dirty()

    machines(scenario)


def test_a_window_that_was_mapped_before_the_memory_was_attached_is_tracked_all_the_same(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0", "--tracker", "scan")
        memory = await machine.attach()
        with counter.vmm() as vmm:
            # The window lies elsewhere than the region: what counts is which memory it is.
            vmm.dma_map(0x4000_0000, 0x10000, memory.regions[0].fd, 0x20000)
            with pytest.raises(TrackerError, match="not the machine's"):
                await counter.bus.start_tracking()
            await machine.attach(counter.bus)
            await counter.bus.start_tracking()
            vmm.region_write(0, REPORT, 8, 0x4000_3000)
            vmm.region_write(0, LIMIT, 8, 1)
            until(lambda: vmm.region_read(0, COUNT, 8) == 1)
            assert dirty_pages(await counter.bus.collect_dirty(), memory.page_count) == [0x23]
            other = create_memfd("x", 4096)
            with pytest.raises(RequestRefused, match="EBUSY"):
                vmm.dma_map(0, 4096, other)
            os.close(other)

    machines(scenario)


def test_whatever_was_done_with_a_device_process_no_descriptor_is_left_in_it(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0", "--tracker", "scan")
        memory = await machine.attach(counter.bus)
        fds = f"/proc/{counter.process.pid}/fd"
        other, eventfd = create_memfd("x", 4096), os.eventfd(0)

        async def everything() -> int:
            with counter.vmm() as vmm:
                vmm.dma_map(0, 4096, memory.regions[0].fd)
                vmm.dma_map(0x10000, 4096, other)
                vmm.set_irq_eventfd(0, eventfd)
                vmm.set_irq_eventfd(0, eventfd)
                with pytest.raises(RequestRefused):
                    vmm.dma_map(0, 4096, other)
            # The next client is served when the one before was cleaned up after.
            counter.vmm().close()
            counter.vmm().close()
            await counter.bus.start_tracking()
            os.close((await counter.bus.collect_dirty())[0])
            await counter.bus.stop_tracking()
            for wrong in (memory.regions[0].fd, eventfd):
                with pytest.raises(MemoryFault):
                    await counter.bus.attach_memory(0, 4096, wrong)
            with counter.vmm():
                return len(os.listdir(fds))

        first = await everything()
        for _ in range(3):
            assert await everything() == first
        os.close(other)
        os.close(eventfd)

    machines(scenario)


def test_memory_that_is_no_sealed_memfd_or_too_short_is_refused(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0")
        bare, short = os.memfd_create("x", os.MFD_ALLOW_SEALING), create_memfd("x", 4096)
        os.ftruncate(bare, 4096)
        with counter.vmm() as vmm:
            for fd, size in ((bare, 4096), (short, 8192)):
                with pytest.raises(RequestRefused, match="EINVAL"):
                    vmm.dma_map(0, size, fd)
                with pytest.raises(MemoryFault):
                    await counter.bus.attach_memory(0, size, fd, 0)
            vmm.dma_map(0, 4096, short)
        os.close(bare)
        os.close(short)

    machines(scenario)


def test_a_device_that_writes_outside_its_windows_fails_that_access_and_runs_on(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0")
        with counter.vmm() as vmm:
            vmm.region_write(0, REPORT, 8, 0x1000)
            vmm.region_write(0, LIMIT, 8, 1)
            until(lambda: vmm.region_read(0, COUNT, 8) == 1)
        counter.process.terminate()
        await counter.process.wait()
        assert "guest address 0x1000 are not in a window" in await counter.log()

    machines(scenario)


def test_a_type_that_says_it_writes_no_memory_cannot():
    class Liar(Device):
        type = "liar"

    liar = Liar("l0")
    with pytest.raises(MemoryFault, match="set writes_memory = True"):
        liar.memory.write(0, b"x")


def test_a_timer_that_is_late_is_called_once_one_that_fails_goes_on_and_a_cancelled_one_is_not_called():
    class Clock(Device):
        type = "clock"

        def setup(self, options):
            self.calls, self.failures, self.cancelled = 0, 0, 0
            self.failed_thrice = threading.Event()
            self.slow = self.every(10, self.count)
            self.every(0.001, self.fail)
            self.every(0.001, self.never).cancel()

        def count(self):
            self.calls += 1

        def fail(self):
            self.failures += 1
            if self.failures == 3:
                self.failed_thrice.set()
            raise ZeroDivisionError

        def never(self):
            self.cancelled += 1

    clock = Clock("c0")
    with clock.lock:
        clock._set_active(True)
        clock.slow.due -= 1000  # a hundred periods late
    assert clock.failed_thrice.wait(10)
    with clock.lock:
        clock._set_active(False)
        assert (clock.calls, clock.cancelled) == (1, 0)
        assert clock.slow.due > time.monotonic()


def test_it_keeps_its_state_while_its_bus_dies_and_comes_back_to_the_new_one(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0")
        with counter.vmm() as vmm:
            vmm.region_write(0, LIMIT, 8, 7)
            await machine.bus.close()
            await machine.daemon.restart()
            machine.bus = await Bus.connect(machine.daemon.address)
            client = await machine.find("c0")
            info = await client.info()
            assert (info.pid, info.state, info.opaque) == (counter.process.pid, "RUNNING", False)
            assert vmm.region_read(0, LIMIT, 8) == 7

    machines(scenario)


def test_sigterm_ends_it_cleanly_and_takes_the_socket_along(machines):
    async def scenario(machine):
        counter = await machine.device("counter", "c0")
        with counter.vmm():
            counter.process.send_signal(signal.SIGTERM)
            assert await counter.process.wait() == 0
        assert counter.socket not in map(str, machine.directory.iterdir())

    machines(scenario)


def test_it_dies_with_the_process_that_started_it(machines):
    async def scenario(machine):
        parent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(1000)",
            *(
                sys.executable,
                str(machine.here / "counter.py"),
                "--id",
                "c0",
                "--bus",
                machine.daemon.address,
            ),
            env={**os.environ, "FERRY_SCHEMAS": str(machine.here)},
            cwd=machine.here.parents[2],
        )
        machine.processes.append(parent)
        client = await machine.find("c0")
        gone = asyncio.Event()
        machine.bus.watch_name(client.unique_name, gone.set)
        parent.kill()
        await asyncio.wait_for(gone.wait(), 10)

    machines(scenario)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--option", "colour=red"], 2, "colour"),
        (["--max-version", "3"], 2, "--max-version one of 1, 2"),
        (["--bus", "unix:path=/nowhere"], 1, "no bus at unix:path=/nowhere"),
        (["--bus", "carrier-pigeon"], 2, "carrier-pigeon"),
        (["--socket", "/nowhere/s"], 2, "/nowhere/s"),
        (["--socket", "/tmp/" + "x" * 120], 2, "at most 107 bytes"),
        (["--id", "a\nb"], 2, "is no Id"),
        (["--paused", "--incoming"], 2, "not allowed with"),
    ],
)
def test_what_cannot_work_is_one_clear_line_and_an_exit_code(machines, arguments, code, text):
    async def scenario(machine):
        process = await machine.spawn("counter", "c0", *arguments)
        _, errors = await process.communicate()
        lines = errors.decode().strip().splitlines()
        assert process.returncode == code
        assert text in lines[-1]
        assert "error: " in lines[-1]
        assert "Traceback" not in errors.decode()

    machines(scenario)


def test_no_address_of_a_bus_says_where_to_put_one(machines):
    async def scenario(machine):
        process = await machine.spawn("counter", "c0", DBUS_VMSTATE_ADDRESS="", DBUS_SESSION_BUS_ADDRESS="")
        _, errors = await process.communicate()
        assert process.returncode == 2
        assert "no address of a message bus (give --bus" in errors.decode().strip().splitlines()[-1]

    machines(scenario)


def test_a_process_with_a_type_that_has_no_schema_says_so(machines):
    async def scenario(machine):
        process = await machine.spawn("counter", "c0", FERRY_SCHEMAS="/nowhere")
        _, errors = await process.communicate()
        assert process.returncode == 1
        assert "no schema for device type 'counter'" in errors.decode().strip().splitlines()[-1]

    machines(scenario)
