"""The processor: that it can be interrupted between any two instructions and at any access, and nothing is seen of that."""

from __future__ import annotations

import random

import numpy as np
import pytest
import vcpu_programs as programs
from hypothesis import given, settings
from hypothesis import strategies as st
from vcpu_box import ENTRY, MEMORY, Box

from devices.vcpu.engine import Engine, GuestFault

WINDOW = 0xD000_0000
CALL = 5  # times a Hypothesis test makes a box: each costs some milliseconds


class Device:
    """Remembers what was done to it, and answers by how often it was asked."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size))
        return len(self.log) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))


@pytest.mark.parametrize("name", programs.WRITERS)
@settings(max_examples=CALL, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(1, 3000) | st.integers(1, 40), min_size=2, max_size=30)
)
def test_slices_of_any_length_end_in_the_state_of_one_slice(name: str, eax: int, slices: list[int]) -> None:
    with Box(programs.WRITERS[name], eax) as whole, Box(programs.WRITERS[name], eax) as sliced:
        whole.step(sum(slices))
        for instructions in slices:
            sliced.step(instructions)
        assert sliced.engine.registers() == whole.engine.registers()
        assert np.array_equal(sliced.region.pages, whole.region.pages)


@settings(max_examples=CALL * 4, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_a_refused_access_is_carried_out_once_when_the_guest_goes_on(seed: int, most: int) -> None:
    def run(refusals: float) -> list[object]:
        chance, device = random.Random(seed), Device()
        with Box(programs.DEVICE) as box:

            def read(offset: int, size: int) -> int:
                # As if another thread asked for a stop now: the next access is refused. Not between two halves of one.
                box.engine.stop_requested = offset != 8 and chance.random() < refusals
                return device.read(offset, size)

            box.engine.map_window(WINDOW, 0x1000, read, device.write)
            while len(device.log) < 200:
                box.step(chance.randint(1, most))
            return [device.log[:200], box.word(0x200000) - len(device.log) // 6 <= 1]

    assert run(0.5) == run(0)


def test_a_window_s_error_comes_out_and_the_guest_stands_before_the_access():
    device = Device()
    with Box(programs.DEVICE) as box:

        def write(offset: int, size: int, value: int) -> None:
            if len(device.log) == 11 and not box.failures:
                box.failures.append(LookupError("gone"))
                raise box.failures[0]
            device.write(offset, size, value)

        box.engine.map_window(WINDOW, 0x1000, device.read, write)
        with pytest.raises(LookupError, match="gone"):
            box.step(1000)
        assert len(device.log) == 11
        box.step(1000)
        interrupted = device.log[:100]

    device = Device()
    with Box(programs.DEVICE) as box:
        box.engine.map_window(WINDOW, 0x1000, device.read, device.write)
        box.step(1000)
    assert interrupted == device.log[:100]


def test_eight_bytes_arrive_as_two_accesses_of_four_low_half_first():
    device = Device()
    with Box(programs.DEVICE) as box:
        box.engine.map_window(WINDOW, 0x1000, device.read, device.write)
        box.step(12)
    assert device.log == [
        ("write", 0, 4, 0),
        ("read", 4, 4),
        ("read", 8, 4),
        ("read", 12, 4),
        ("read", 16, 1),
    ]


def test_while_a_stop_is_requested_nothing_is_executed():
    with Box(programs.COUNT) as box:
        box.engine.stop_requested = True
        box.engine.run_slice(1000)
        assert box.word(0x200000) == 0
        assert box.engine.rip == ENTRY


def test_registers_go_over_to_another_processor_and_come_back_the_same():
    chance = random.Random(1)
    with Box(programs.VECTORS, 5) as box:
        box.step(5000)
        registers = box.engine.registers() | {
            "gpr": [chance.getrandbits(64) for _ in range(16)],
            "fs_base": 0x1234_5678_9ABC,
            "gs_base": 0x7654_3210_FEDC,
            "rflags": 0x8D7,
            "cr2": 0xDEAD_BEEF,
            "mxcsr": 0x7FA0,
        }
    other = Engine()
    other.set_registers(registers)
    assert other.registers() == registers


def test_a_reset_forgets_everything():
    with Box(programs.VECTORS, 5) as box:
        fresh = box.engine.registers()
        box.step(5000)
        assert box.engine.registers() != fresh
        box.engine.reset(ENTRY)
        assert box.engine.registers() == fresh | {"gpr": [0] * 16}


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("0f0b", "an invalid instruction"),
        ("8b042500000090", "a load where nothing is"),
        ("cc", "an interrupt"),
    ],
)
def test_a_guest_that_cannot_go_on_is_a_fault_that_says_where(program: str, what: str) -> None:
    with (
        Box(bytes.fromhex("90" + program)) as box,
        pytest.raises(GuestFault, match=r"cannot go on at 0x10000[12]"),
    ):
        box.step(10)


def test_code_that_was_changed_from_outside_is_executed_as_it_is_now():
    with Box(programs.COUNT) as box:
        box.step(100)
        box.region.view[ENTRY : ENTRY + 2] = b"\x0f\x0b"
        box.engine.set_registers(box.engine.registers() | {"rip": ENTRY})
        with pytest.raises(GuestFault):
            box.step(1)


# -- the log of written pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", programs.WRITERS)
@settings(max_examples=CALL, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4000) | st.integers(1, 20), min_size=3, max_size=20)
)
def test_every_page_that_changed_was_logged(name: str, eax: int, slices: list[int]) -> None:
    written = bytearray(MEMORY >> 12)
    with Box(programs.WRITERS[name], eax) as box:
        box.step(slices[0])
        box.engine.log_writes([(0, written)])
        changes = 0
        for instructions in slices:
            before = box.region.pages.copy()
            box.step(instructions)
            changed = (before != box.region.pages).any(axis=1)
            logged = np.frombuffer(bytes(written), dtype=np.uint8).astype(bool)
            assert not (changed & ~logged).any(), "a page changed and was not logged"
            changes += int(changed.sum())
            written[:] = bytes(len(written))
            box.engine.flush_tlb()
        if sum(slices) > 100:
            assert changes


def test_pages_that_are_only_read_are_not_logged():
    written = bytearray(MEMORY >> 12)
    with Box(programs.READS_THEN_WRITES, 5) as box:
        box.engine.log_writes([(0, written)])
        before = box.region.pages.copy()
        box.step(3000)
        assert sum(written) <= int((before != box.region.pages).any(axis=1).sum()) + 2
        assert sum(written) < 50


def test_after_logging_the_guest_runs_on_and_nothing_is_logged():
    written = bytearray(MEMORY >> 12)
    with Box(programs.STORES, 5) as box, Box(programs.STORES, 5) as other:
        other.step(3000)
        box.step(1000)
        box.engine.log_writes([(0, written)])
        box.step(1000)
        logged = bytes(written)
        box.engine.stop_logging()
        box.step(1000)
        assert bytes(written) == logged
        assert box.engine.registers() == other.engine.registers()
        assert np.array_equal(box.region.pages, other.region.pages)
