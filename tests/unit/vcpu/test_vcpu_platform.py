"""What the vCPU process answers and reads itself: the platform page, the platform file, the boot page. No processor."""

from __future__ import annotations

import json
import os
import struct
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.vcpu import boot
from devices.vcpu.platform_file import BUILT_IN_GUEST, DeviceEntry, PlatformFile
from devices.vcpu.platform_page import EXIT, IDLE, MASK, PENDING, PlatformPage, PoweredOff
from migrate.errors import UsageError

# -- the page ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page():
    page = PlatformPage()
    yield page
    page.close()


def test_a_signalled_line_is_pending_until_it_is_cleared(page):
    os.eventfd_write(page.line(3), 1)
    assert page.read(PENDING, 4) == page.read(PENDING, 4) == 1 << 3
    page.write(PENDING, 4, 1 << 4)
    assert page.read(PENDING, 4) == 1 << 3
    page.write(PENDING, 4, 1 << 3)
    assert page.read(PENDING, 4) == 0


def test_a_masked_line_is_latched_beneath_its_mask(page):
    os.eventfd_write(page.line(3), 1)
    page.write(MASK, 4, 1 << 3)
    assert page.read(PENDING, 4) == 0
    assert page.read(MASK, 4) == 1 << 3
    assert page.pending == 1 << 3
    page.write(MASK, 4, 0)
    assert page.read(PENDING, 4) == 1 << 3


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("raise"), st.integers(0, 4)),
            st.tuples(st.sampled_from(["clear", "mask"]), st.integers(0, 31)),
            st.tuples(st.just("read"), st.just(0)),
        ),
        max_size=40,
    )
)
def test_no_edge_is_lost_and_none_invented(steps):
    page, raised, mask = PlatformPage(), 0, 0
    for line in range(5):
        page.line(line)
    for step, value in steps:
        match step:
            case "raise":
                os.eventfd_write(page.line(value), 1)
                raised |= 1 << value
            case "clear":
                page.latch()  # a guest clears what it has read
                page.write(PENDING, 4, value)
                raised &= ~value
            case "mask":
                page.write(MASK, 4, value)
                mask = value
        assert page.read(PENDING, 4) == raised & ~mask
    page.close()


def idle_for(page: PlatformPage, microseconds: int) -> float:
    began = time.monotonic()
    page.write(IDLE, 4, microseconds)
    return time.monotonic() - began


def test_idle_lasts_as_long_as_asked(page):
    assert 0.02 <= idle_for(page, 20_000) < 5


def test_idle_is_bounded_whatever_the_guest_asks_for(page):
    assert idle_for(page, 0xFFFF_FFFF) < 5


@pytest.mark.parametrize("how", ["signalled", "pending", "woken"])
def test_idle_ends_at_once_for_an_interrupt_and_when_it_is_woken(page, how):
    line = page.line(0)
    page.line(1)
    match how:
        case "signalled":
            os.eventfd_write(line, 1)
        case "pending":
            os.eventfd_write(line, 1)
            page.read(PENDING, 4)
        case "woken":
            page.wake()
    assert idle_for(page, 100_000) < 0.09


def test_idle_is_ended_by_an_interrupt_that_comes_while_it_lasts(page):
    line = page.line(0)
    timer = threading.Timer(0.01, os.eventfd_write, (line, 1))
    timer.start()
    assert idle_for(page, 100_000) < 0.09
    timer.join()


def test_idle_sleeps_through_a_masked_line_also_one_masked_before_it_was_there(page):
    page.write(MASK, 4, 0b11)
    os.eventfd_write(page.line(0), 1)
    assert idle_for(page, 20_000) >= 0.02
    page.write(MASK, 4, 0b10)
    assert idle_for(page, 100_000) < 0.09


def test_power_off_carries_the_guest_s_word(page):
    with pytest.raises(PoweredOff) as caught:
        page.write(EXIT, 4, 42)
    assert caught.value.value == 42


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (2, 2), (0x10, 4), (0xFFC, 4)])
def test_what_is_not_listed_reads_as_0_and_writes_nothing(page, offset, size):
    os.eventfd_write(page.line(0), 1)
    page.read(PENDING, 4)
    page.write(offset, size, 1)
    assert page.read(offset, size) == 0
    assert page.pending == 1


# -- the file ---------------------------------------------------------------------------------------------------------------

UART = {"id": "uart0", "type": "uart16550", "socket": "/s/uart0", "gpa": 0xD000_0000, "irq": 0}
RTC = {"id": "rtc0", "type": "rtc", "socket": "/s/rtc0", "gpa": 0xD100_0000, "irq": 1}


def read(tmp_path, content: object) -> PlatformFile:
    path = tmp_path / "platform.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return PlatformFile.read(path)


def test_a_platform_file_is_read_as_it_was_written(tmp_path):
    found = read(
        tmp_path, {"devices": [UART, RTC], "guest": "/g.bin", "cmdline": "a=1", "entry_gpa": 0x20_0000}
    )
    assert found.devices == (DeviceEntry(**UART), DeviceEntry(**RTC))
    assert read(tmp_path, {"devices": [{**UART, "vectors": 3}]}).devices[0].lines == range(3)
    assert (str(found.guest), found.cmdline, found.entry_gpa) == ("/g.bin", "a=1", 0x20_0000)
    assert read(tmp_path, {"devices": [], "guest": None}) == PlatformFile(())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Expecting"),
        ([], "not an object"),
        ({}, "lacks devices"),
        ({"devices": [], "colour": 1}, "'colour'"),
        ({"devices": [{**UART, "irq": "0"}]}, "irq is '0'"),
        ({"devices": [{**UART, "irq": True}]}, "irq is True"),
        ({"devices": [{k: v for k, v in UART.items() if k != "gpa"}]}, "lacks gpa"),
        ({"devices": [{**UART, "irq": 32}]}, "irq 32"),
        ({"devices": [{**UART, "irq": -1}]}, "irq -1"),
        ({"devices": [{**UART, "vectors": 0}]}, "vectors 0"),
        ({"devices": [{**UART, "irq": 30, "vectors": 3}]}, "irq 30, vectors 3"),
        ({"devices": [{**UART, "vectors": 2}, RTC]}, "same irq, 1"),
        ({"devices": [{**UART, "gpa": 0xD000_1000}]}, "gpa 0xd0001000"),
        ({"devices": [{**UART, "gpa": 0xFE00_0000}]}, "gpa 0xfe000000"),
        ({"devices": [UART, {**RTC, "id": "uart0"}]}, "same id"),
        ({"devices": [UART, {**RTC, "irq": 0}]}, "same irq"),
        ({"devices": [UART, {**RTC, "gpa": UART["gpa"]}]}, "same gpa"),
    ],
)
def test_a_platform_file_that_is_wrong_is_refused_with_what_is_wrong(tmp_path, content, says):
    with pytest.raises(UsageError, match=says):
        read(tmp_path, content)


def test_a_platform_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.json"):
        PlatformFile.read(tmp_path / "nowhere.json")


# -- the boot page ------------------------------------------------------------------------------------------------------------

PLATFORM = PlatformFile((DeviceEntry(**UART), DeviceEntry(**RTC, vectors=3)), cmdline="dirty=1 span=2")


def test_a_guest_finds_the_program_and_the_boot_page_where_they_belong():
    memory = memoryview(bytearray(4 << 20))
    boot.write(memory, PLATFORM)
    code = BUILT_IN_GUEST.read_bytes()
    assert bytes(memory[0x10_0000 : 0x10_0000 + len(code)]) == code
    page = bytes(memory[0x1000:0x2000])
    assert struct.unpack_from("<8sQII", page) == (b"VMFERRY1", 4 << 20, 2, 0xFEE0_0000)
    assert struct.unpack_from("<24sQII", page, 0x20) == (b"uart16550".ljust(24, b"\0"), 0xD000_0000, 0, 1)
    assert struct.unpack_from("<24sQII", page, 0x20 + 40) == (b"rtc".ljust(24, b"\0"), 0xD100_0000, 1, 3)
    assert page[0x800:].rstrip(b"\0") == b"dirty=1 span=2"
    assert not any(memory[:0x1000])


def test_what_does_not_fit_is_refused():
    small = memoryview(bytearray(2 << 20))
    entry = DeviceEntry(**UART)
    long = DeviceEntry("x", "t" * 24, "/s", 0xD100_0000, 2)
    for platform in (
        PlatformFile((entry,), cmdline="x" * 2048),
        PlatformFile((entry,), cmdline="x\0"),
        PlatformFile((long,)),
        PlatformFile((), entry_gpa=0x1800),
        PlatformFile((), entry_gpa=(2 << 20) - 16),
        PlatformFile((), guest=BUILT_IN_GUEST.parent / "nowhere"),
    ):
        with pytest.raises(UsageError):
            boot.write(small, platform)
    assert not any(small)
