"""`assert_migratable`: devices of ours pass, and each planted fault fails by its own message."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.testing.driver import Memory, Read, Wait, Write
from migrate.testing.migratable import MigrationDefect

PLANTED = str(Path(__file__).parent / "planted.py")
COUNT, SCRATCH, REPORT = 0, 8, 16
REGISTERS = [Read(COUNT), Read(SCRATCH), Read(REPORT)]
TRAFFIC = [Write(SCRATCH, 0x1234), Write(REPORT, 0x2000), Wait(0.05), Read(COUNT)]
Check = Callable[..., None]


def planted(fault: str) -> list[str]:
    return [sys.executable, PLANTED, fault]


def check(assert_migratable: Check, fault: str) -> None:
    assert_migratable(
        planted(fault),
        registers=REGISTERS,
        traffic=TRAFFIC,
        more=[Wait(0.02)],
        moving=["count"],
        moving_registers=[COUNT],
    )


def test_a_device_without_a_fault_passes(assert_migratable: Check) -> None:
    check(assert_migratable, "none")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (
            "forgets-register",
            r"register 0x8 .* reads as 0x1234 where the machine stayed, 0x5a5a where it arrived",
        ),
        ("wrong-timer", r"what was loaded is not what is saved again: \.count \d+ → \d+"),
        ("writes-after-stop", r"after STOP the device wrote to guest memory at 0x40"),
        ("half-load", r"loading what it saved: .*the second half does not fit"),
    ],
)
def test_each_planted_fault_fails_by_its_own_message(fault: str, says: str, assert_migratable: Check) -> None:
    with pytest.raises(MigrationDefect, match=says) as caught:
        check(assert_migratable, fault)
    assert "seed" in str(caught.value)


def test_a_uart_of_ours_passes_with_what_it_sends(assert_migratable: Check) -> None:
    registers = [Read(offset, 1) for offset in range(1, 8) if offset != 2]
    send = [Write(0, byte, 1) for byte in b"hello\n"]
    assert_migratable(
        [sys.executable, "-m", "devices.uart16550", "--option", "output={directory}/uart.out"],
        registers=registers,
        traffic=[Write(3, 0, 1), Write(2, 0x81, 1), Write(7, 0x5A, 1), *send],
        more=[*send, Read(5, 1)],
    )


def test_a_clock_of_ours_passes_where_time_may_move(assert_migratable: Check) -> None:
    assert_migratable(
        [sys.executable, "-m", "devices.rtc"],
        registers=[Read(0x10), Read(0x18, 4), Read(0x20)],
        traffic=[Write(0x10, 2**63), Write(0x18, 1, 4), Write(0x20, 77), Read(0), Read(4, 4)],
        more=[Read(0)],
        moving=["guest_ns", "mono_ns", "half_read"],
        moving_registers=[0, 4],
    )


def test_a_display_draws_on_where_it_left_off_with_what_it_streams(assert_migratable: Check) -> None:
    fill, checksum = Write(0x34, 1, 4), Write(0x34, 3, 4)
    box = [Write(offset, value, 4) for offset, value in ((0x08, 64), (0x0C, 64), (0x24, 32), (0x28, 32))]
    assert_migratable(
        [sys.executable, "-m", "devices.display", "--option", "vram=8M"],
        registers=[Read(0x00), Read(0x08, 4), Read(0x24, 4), Read(0x40), Read(0x58)],
        traffic=[*box, Write(0x30, 0xABCDEF, 4), fill],
        more=[checksum, Read(0x58), Write(0x30, 0x123456, 4), fill, checksum, Read(0x58)],
    )


def test_random_accesses_are_the_same_for_the_same_seed(assert_migratable: Check) -> None:
    registers = [Read(7, 1), Read(1, 1), Read(3, 1), Read(4, 1)]
    assert_migratable([sys.executable, "-m", "devices.uart16550"], registers=registers, seed=3)


def test_a_process_that_does_not_come_up_is_said_with_its_last_words(assert_migratable: Check) -> None:
    with pytest.raises(MigrationDefect, match=r"starting it: .*colour"):
        assert_migratable([sys.executable, "-m", "devices.rtc", "--option", "colour=red"])


def test_the_guests_own_memory_moves_with_it(assert_migratable: Check) -> None:
    traffic = [Memory(0x3000, b"guest")]
    assert_migratable(
        planted("none"),
        registers=[Read(SCRATCH)],
        traffic=traffic,
        moving=["count"],
        moving_registers=[COUNT],
    )
