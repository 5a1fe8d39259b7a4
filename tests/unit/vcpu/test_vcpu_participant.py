"""The vCPU as a participant: states, what a save holds, and what happens when it cannot go on. One process, no bus."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import vcpu_programs as programs
from vcpu_box import ENTRY, MEMORY

from devices.kit.runtime import Runtime
from devices.vcpu.platform_file import DeviceEntry, PlatformFile
from devices.vcpu.vcpu import Vcpu
from migrate.errors import DeviceRefused, MemoryFault
from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory, RegionSpec
from migrate.state.lifecycle import DeviceState

COUNTER = 0x200000


class Process:
    """What the vCPU's process has in it, but for the bus."""

    def __init__(self, program: Path, memory: GuestMemory | None = None) -> None:
        incoming = memory is not None
        self.off: list[int] = []
        self.ended = threading.Event()
        self.vcpu = Vcpu(
            "vcpu0", PlatformFile((), guest=program), cold=not incoming, powered_off=self._powered_off
        )
        self.runtime = Runtime(self.vcpu)
        if incoming:
            self.runtime.set_state("RESUMING")
        self.memory = memory or GuestMemory.create([RegionSpec(GuestAddress(0), MEMORY)], "test")
        region = self.memory.regions[0]
        self.runtime.attach_memory(0, MEMORY, os.dup(region.fd), 0)

    def _powered_off(self, value: int) -> None:
        self.off.append(value)
        self.ended.set()

    def count(self) -> int:
        return int.from_bytes(self.memory.regions[0].view[COUNTER : COUNTER + 8], "little")

    def until_it_counts(self) -> None:
        before, deadline = self.count(), time.monotonic() + 10
        while self.count() == before:
            assert time.monotonic() < deadline, "the guest stands still"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def make(program: bytes, memory: GuestMemory | None = None) -> Process:
        path = tmp_path / "program.bin"
        path.write_bytes(program)
        made.append(Process(path, memory))
        return made[-1]

    yield make
    for process in made:
        process.vcpu.close()
    for memory in {id(process.memory): process.memory for process in made}.values():
        memory.close()


def test_it_executes_in_running_and_pre_copy_and_nowhere_else(start):
    process = start(programs.COUNT)
    for state in (
        "RUNNING_P2P",
        "STOP",
        "RUNNING",
        "PRE_COPY",
        "PRE_COPY_P2P",
        "STOP_COPY",
        "STOP",
        "RUNNING",
    ):
        process.runtime.set_state(state)
        if state in ("RUNNING", "PRE_COPY"):
            process.until_it_counts()
        else:
            resting = process.count()
            process.vcpu.save()
            assert process.count() == resting


def test_it_goes_on_in_another_process_with_the_next_instruction(start):
    source = start(programs.COUNT)
    source.runtime.set_state("RUNNING")
    source.until_it_counts()
    source.runtime.set_state("STOP_COPY")
    blob, counted = source.runtime.save_as(1), source.count()

    destination = start(programs.COUNT, source.memory)
    destination.runtime.stage(blob)
    destination.runtime.apply()
    destination.runtime.set_state("STOP")
    assert destination.runtime.save_as(1) == blob
    assert destination.count() == counted
    destination.runtime.set_state("RUNNING")
    destination.until_it_counts()
    destination.runtime.set_state("STOP")
    # The counter in memory and the one in rax differ by no more than the instruction between them.
    assert destination.count() - destination.vcpu.save()["gpr"][0] in (0, 1)


def test_a_save_while_it_runs_is_of_one_instant_and_it_runs_on(start):
    process = start(programs.COUNT)
    process.runtime.set_state("RUNNING")
    saved = [process.vcpu.save()["gpr"][0] for _ in range(20)]
    assert saved == sorted(saved)
    process.until_it_counts()


def test_interrupts_raised_while_it_stands_still_are_in_its_state_and_stay_signalled_once(start):
    process = start(programs.COUNT)
    process.runtime.set_state("RUNNING")
    process.runtime.set_state("RUNNING_P2P")
    os.eventfd_write(process.vcpu._page.line(5), 1)
    process.runtime.set_state("STOP")
    assert process.vcpu.save()["pending"] == process.vcpu.save()["pending"] == 1 << 5

    other = start(programs.COUNT, process.memory)
    other.runtime.stage(process.runtime.save_as(1))
    other.runtime.apply()
    assert other.vcpu._page.read(0, 4) == 1 << 5


def test_a_machine_that_comes_in_finds_its_memory_untouched(start):
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), MEMORY)], "incoming")
    start(programs.COUNT, memory)
    assert len(memory.data_extents()) == 0


def test_a_machine_that_was_never_started_moves_too(start):
    source = start(programs.COUNT)
    destination = start(programs.COUNT, source.memory)
    destination.runtime.stage(source.runtime.save_as(1))
    destination.runtime.apply()
    destination.runtime.set_state("RUNNING")
    destination.until_it_counts()


def test_a_guest_that_cannot_go_on_is_in_error_and_the_log_says_where(start, caplog):
    process = start(b"\x90\x0f\x0b")
    process.runtime.set_state("RUNNING")
    deadline = time.monotonic() + 10
    while process.vcpu.state is not DeviceState.ERROR:
        assert time.monotonic() < deadline
    assert f"cannot go on at {ENTRY + 1:#x}" in caplog.text
    with pytest.raises(DeviceRefused):
        process.runtime.set_state("STOP")
    with pytest.raises(DeviceRefused):
        process.runtime.save_as(1)


def test_power_off_is_told_and_is_no_error(start):
    process = start(programs.POWER_OFF)
    process.runtime.set_state("RUNNING")
    assert process.ended.wait(10)
    assert process.off == [7]
    assert process.vcpu.state is DeviceState.RUNNING
    with pytest.raises(DeviceRefused, match="powered the machine off"):
        process.runtime.set_state("STOP")


def test_a_state_with_interrupt_lines_that_do_not_exist_is_refused(start):
    process = start(programs.COUNT)
    state = process.vcpu.save()
    for field in ("pending", "mask"):
        with pytest.raises(DeviceRefused, match="interrupt lines"):
            process.vcpu.check(state | {field: 1 << 32})


def test_memory_that_reaches_into_the_devices_is_refused():
    device = DeviceEntry("uart0", "uart16550", "/nowhere", 0x100_0000, 0)
    vcpu = Vcpu("vcpu0", PlatformFile((device,)), cold=True, powered_off=lambda value: None)
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), 0x200_0000)], "large")
    with pytest.raises(MemoryFault, match="at most 16 MiB"):
        vcpu.memory_attached(memory.regions[0])
    vcpu.close()
    memory.close()
