"""The thread that executes: it runs when it is told to, and rests at once."""

from __future__ import annotations

import threading
import time

import pytest
import vcpu_programs as programs
from vcpu_box import Box

from devices.vcpu.engine import GuestFault
from devices.vcpu.platform_page import PoweredOff
from migrate.errors import DeviceTimeout

COUNTER = 0x200000


def until_it_counts(box: Box) -> int:
    """Wait until the guest has got further. It counts thousands of times in what this takes to look twice."""
    before, deadline = box.word(COUNTER), time.monotonic() + 10
    while box.word(COUNTER) == before:
        assert time.monotonic() < deadline, "the guest stands still"
    return box.word(COUNTER)


def test_it_runs_and_rests_and_runs_and_loses_nothing():
    with Box(programs.COUNT) as box:
        for _ in range(50):
            box.runner.run()
            until_it_counts(box)
            box.runner.rest()
            resting = box.word(COUNTER)
            registers = box.engine.registers()
            # Stopped between the two instructions that count, or after both.
            assert registers["gpr"][0] in (resting, resting - 1)
            assert box.word(COUNTER) == resting


def test_it_rests_within_milliseconds():
    with Box(programs.COUNT) as box:
        took = []
        for _ in range(20):
            box.runner.run()
            until_it_counts(box)
            began = time.monotonic()
            box.runner.rest()
            took.append(time.monotonic() - began)
        # The best of many: other work on this machine is not what is measured.
        assert min(took) < 0.002


def test_a_guest_that_sleeps_is_woken_to_rest():
    with Box(programs.SLEEP) as box:
        took = []
        for _ in range(10):
            box.runner.run()
            # It asks for 100 ms each time; that it sleeps is seen by nothing better than the lapse of some of them.
            time.sleep(0.01)
            began = time.monotonic()
            box.runner.rest()
            took.append(time.monotonic() - began)
        assert min(took) < 0.01
        assert box.engine.registers()["gpr"][0] > 5


def test_while_it_is_held_nothing_is_executed_and_it_runs_on_by_itself():
    with Box(programs.COUNT) as box:
        box.runner.run()
        for _ in range(20):
            until_it_counts(box)
            with box.runner.hold():
                held = box.word(COUNTER)
                box.engine.registers()
                assert box.word(COUNTER) == held
        until_it_counts(box)


def test_holders_take_turns_and_one_that_rests_it_stays_obeyed():
    with Box(programs.COUNT) as box:
        inside = 0

        def hold() -> None:
            nonlocal inside
            for _ in range(50):
                with box.runner.hold():
                    inside += 1
                    assert inside == 1
                    box.engine.registers()
                    inside -= 1

        box.runner.run()
        threads = [threading.Thread(target=hold) for _ in range(3)]
        for thread in threads:
            thread.start()
        box.runner.rest()
        resting = box.word(COUNTER)
        for thread in threads:
            thread.join()
        assert box.word(COUNTER) == resting


def test_a_fault_ends_the_run_is_told_once_and_to_whoever_wants_it_to_rest():
    told = threading.Event()
    with Box(b"\x0f\x0b") as box:
        box.runner._failed = lambda failure: (box.failures.append(failure), told.set())
        box.runner.run()
        assert told.wait(10)
        assert [type(failure) for failure in box.failures] == [GuestFault]
        with pytest.raises(GuestFault):
            box.runner.rest()


def test_power_off_ends_the_run_with_the_guest_s_word():
    told = threading.Event()
    with Box(programs.POWER_OFF) as box:
        box.runner._failed = lambda failure: (box.failures.append(failure), told.set())
        box.runner.run()
        assert told.wait(10)
        (failure,) = box.failures
        assert isinstance(failure, PoweredOff)
        assert failure.value == 7


def test_a_device_that_does_not_let_go_is_a_missed_deadline_and_not_a_hang(monkeypatch):
    monkeypatch.setattr("devices.vcpu.runner.DEADLINE", 0.05)
    entered, release = threading.Event(), threading.Event()

    def hang(offset: int, size: int, value: int) -> None:
        entered.set()
        release.wait(10)

    with Box(programs.DEVICE) as box:
        box.engine.map_window(0xD000_0000, 0x1000, lambda offset, size: 0, hang)
        box.runner.run()
        assert entered.wait(10)
        with pytest.raises(DeviceTimeout):
            box.runner.rest()
        release.set()
        box.runner.rest()
