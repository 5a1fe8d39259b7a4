"""uart16550 against its data sheet, and its bytes against loss: driven by register accesses, with real files behind it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from passage import Edges, carry, live_timers, payload_of, rest, run

from devices.uart16550 import Uart16550
from migrate.errors import DeviceRefused, UsageError

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
LOOPBACK = 0x10
READY = 0x60
F_SETPIPE_SZ = 1031


@pytest.fixture
def where() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def uart() -> Iterator[Uart16550]:
    device = Uart16550("uart0")
    run(device)
    yield device
    rest(device)
    device.close()


@pytest.fixture
def edges(uart: Uart16550) -> Iterator[Edges]:
    listener = Edges(uart)
    yield listener
    listener.close()


def get(device: Uart16550, register: int) -> int:
    with device.lock:
        return device.read(0, register, 1)


def put(device: Uart16550, register: int, *values: int) -> None:
    with device.lock:
        for value in values:
            device.write(0, register, 1, value)


# -- registers ------------------------------------------------------------------------------------------------------------


def test_after_a_reset_the_registers_read_as_in_the_data_sheet(uart: Uart16550) -> None:
    for register, value in ((IER, 0x1F), (LCR, 0x1B), (MCR, LOOPBACK | 0x0F), (FCR, 0xC1), (THR, 65)):
        put(uart, register, value)
    uart.reset()
    assert [get(uart, register) for register in (IER, IIR, LCR, MCR, LSR, MSR)] == [0, 0x01, 0, 0, 0x60, 0xB0]


def test_the_divisor_latch_hides_the_data_and_interrupt_enable_registers(uart: Uart16550) -> None:
    put(uart, IER, 0x05)
    put(uart, LCR, 0x83)
    put(uart, DLL, 0x34)
    put(uart, DLM, 0x12)
    assert (get(uart, DLL), get(uart, DLM)) == (0x34, 0x12)
    put(uart, LCR, 0x03)
    assert (get(uart, RBR), get(uart, IER)) == (0, 0x05)


def test_reserved_bits_of_ier_and_mcr_read_as_zero_and_scratch_keeps_all(uart: Uart16550) -> None:
    for register in (IER, MCR, SCR):
        put(uart, register, 0xFF)
    assert (get(uart, IER), get(uart, MCR), get(uart, SCR)) == (0x0F, 0x1F, 0xFF)


def test_wider_accesses_and_writes_to_status_registers_do_nothing(uart: Uart16550) -> None:
    before = uart.save()
    uart.write(0, 0, 4, 0x41414141)
    put(uart, LSR, 0)
    put(uart, MSR, 0)
    assert uart.read(0, 4, 4) == 0
    assert uart.save() == before


def test_switching_the_fifos_empties_them(uart: Uart16550) -> None:
    put(uart, FCR, 1)
    put(uart, MCR, LOOPBACK)
    put(uart, THR, *b"abc")
    put(uart, FCR, 0)
    assert get(uart, LSR) == READY
    assert get(uart, IIR) & 0xC0 == 0


def test_fcr_bits_do_nothing_while_its_first_bit_is_zero(uart: Uart16550) -> None:
    put(uart, MCR, LOOPBACK)
    put(uart, THR, 0x41)
    put(uart, FCR, 0xC6)
    assert get(uart, RBR) == 0x41


def test_fcr_clears_the_receive_fifo_alone(uart: Uart16550) -> None:
    put(uart, FCR, 1)
    put(uart, MCR, LOOPBACK)
    put(uart, THR, *b"abc")
    put(uart, FCR, 0x03)
    assert get(uart, LSR) == READY


# -- interrupts -----------------------------------------------------------------------------------------------------------


def test_enabling_the_thr_interrupt_while_empty_raises_it_and_reading_iir_ends_it(
    uart: Uart16550, edges: Edges
) -> None:
    put(uart, IER, 0x02)
    assert edges.take() == 1
    assert get(uart, IIR) == 0x02
    assert get(uart, IIR) == 0x01
    put(uart, IER, 0x02)
    assert edges.take() == 0


def test_each_byte_that_leaves_is_a_new_edge_even_when_iir_was_not_read(
    uart: Uart16550, edges: Edges
) -> None:
    put(uart, IER, 0x02)
    edges.take()
    put(uart, THR, *b"abc")
    assert edges.take() == 3


def test_iir_names_causes_in_the_order_of_their_priority(uart: Uart16550) -> None:
    put(uart, MCR, LOOPBACK)
    get(uart, MSR)
    put(uart, IER, 0x0F)
    put(uart, THR, 1, 2)  # the second overruns the first
    put(uart, MCR, LOOPBACK | 0x02)  # RTS comes back as CTS
    seen = [get(uart, IIR)]
    get(uart, LSR)
    seen.append(get(uart, IIR))
    get(uart, RBR)
    seen += [get(uart, IIR), get(uart, IIR)]
    get(uart, MSR)
    seen.append(get(uart, IIR))
    assert seen == [0x06, 0x04, 0x02, 0x00, 0x01]


def test_a_cause_that_is_not_enabled_interrupts_when_it_is(uart: Uart16550, edges: Edges) -> None:
    put(uart, MCR, LOOPBACK)
    put(uart, THR, 1)
    assert edges.take() == 0
    put(uart, IER, 0x01)
    assert edges.take() == 1


@pytest.mark.parametrize(("bits", "trigger"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_received_data_interrupts_at_the_trigger_and_ends_below_it(bits: int, trigger: int) -> None:
    uart = Uart16550("uart0")
    uart.leave_p2p()
    put(uart, FCR, bits | 1)
    put(uart, MCR, LOOPBACK)
    get(uart, MSR)
    put(uart, IER, 0x01)
    put(uart, THR, *range(trigger - 1))
    assert get(uart, IIR) == 0xC1
    put(uart, THR, 99)
    assert get(uart, IIR) == 0xC4
    get(uart, RBR)
    assert get(uart, IIR) == 0xC1


def test_bytes_below_the_trigger_interrupt_after_four_character_times(uart: Uart16550, edges: Edges) -> None:
    put(uart, FCR, 0xC1)
    put(uart, MCR, LOOPBACK)
    get(uart, MSR)
    put(uart, IER, 0x01)
    put(uart, THR, *b"ab")
    assert edges.wait()
    assert get(uart, IIR) == 0xCC
    assert edges.take() == 1
    assert get(uart, RBR) == ord("a")
    assert edges.wait(), "the second byte waits four character times of its own"
    assert get(uart, RBR) == ord("b")
    assert get(uart, IIR) == 0xC1
    assert live_timers(uart) == 0


def test_the_character_timeout_follows_the_divisor_and_the_format(uart: Uart16550) -> None:
    put(uart, LCR, 0x83)  # 8 data bits, no parity, 1 stop bit
    put(uart, DLL, 1)
    assert uart._four_characters() == pytest.approx(40 / 115200)
    put(uart, DLL, 12)
    put(uart, LCR, 0x1F)  # 8 data bits, parity, 2 stop bits
    assert uart._four_characters() == pytest.approx(48 / 9600)


def test_an_overrun_keeps_the_oldest_with_fifos_and_the_newest_without(uart: Uart16550) -> None:
    put(uart, MCR, LOOPBACK)
    put(uart, THR, 1, 2)
    assert get(uart, LSR) == READY | 0x03
    assert get(uart, LSR) == READY | 0x01
    assert get(uart, RBR) == 2
    put(uart, FCR, 1)
    put(uart, THR, *range(17))
    assert get(uart, LSR) & 0x02
    assert [get(uart, RBR) for _ in range(16)] == list(range(16))
    assert not get(uart, LSR) & 0x01


def test_in_loopback_our_own_outputs_come_back_as_modem_lines(uart: Uart16550) -> None:
    put(uart, MCR, LOOPBACK)
    get(uart, MSR)
    put(uart, MCR, LOOPBACK | 0x0F)
    assert get(uart, MSR) == 0xF0 | 0x0B  # RI rose: that is not a change
    put(uart, MCR, LOOPBACK)
    assert get(uart, MSR) == 0x0F  # RI fell: that is one
    assert get(uart, MSR) == 0x00


def test_clearing_the_receive_fifo_ends_its_character_timeout(uart: Uart16550, edges: Edges) -> None:
    put(uart, FCR, 0xC1)
    put(uart, MCR, LOOPBACK)
    put(uart, IER, 0x01)
    put(uart, THR, 1)
    assert edges.wait()
    put(uart, FCR, 0xC3)
    assert get(uart, IIR) == 0xC1


def test_clearing_a_transmit_fifo_that_waits_makes_thr_empty() -> None:
    uart = Uart16550("uart0", {"output": "/dev/full"})
    uart.leave_p2p()
    put(uart, IER, 0x02)
    put(uart, FCR, 0x01)
    put(uart, THR, 1, 2)
    assert (get(uart, LSR), get(uart, IIR)) == (0, 0xC1)
    put(uart, FCR, 0x05)
    assert (get(uart, LSR), get(uart, IIR)) == (READY, 0xC2)
    uart.close()


# -- the line ---------------------------------------------------------------------------------------------------------------


def test_what_is_sent_is_appended_to_the_output_before_the_write_returns(where: Path) -> None:
    output = where / "console"
    output.write_bytes(b"earlier\n")
    uart = Uart16550("uart0", {"output": str(output)})
    run(uart)
    put(uart, THR, *b"hello")
    assert output.read_bytes() == b"earlier\nhello"
    assert get(uart, LSR) == READY
    uart.close()


def test_loopback_sends_nothing_out_and_takes_nothing_in(where: Path) -> None:
    output = where / "console"
    os.mkfifo(where / "keys")
    uart = Uart16550("uart0", {"output": str(output), "input": str(where / "keys")})
    put(uart, MCR, LOOPBACK)
    put(uart, FCR, 1)
    (where / "keys").open("r+b", buffering=0).write(b"typed")
    run(uart)
    put(uart, THR, *b"ab")
    assert [get(uart, RBR), get(uart, RBR)] == list(b"ab")
    assert get(uart, LSR) == READY
    assert output.read_bytes() == b""
    rest(uart)
    uart.close()


def test_bytes_written_at_rest_are_state_and_go_out_once_wherever_the_machine_runs_next(where: Path) -> None:
    output = where / "console"
    source = Uart16550("uart0", {"output": str(output)})
    destination = Uart16550("uart0", {"output": str(output)})
    put(source, FCR, 1)
    run(source)
    put(source, THR, *b"1")
    source.enter_p2p()
    put(source, THR, *b"23")
    source.stop()
    assert output.read_bytes() == b"1"
    assert get(source, LSR) == 0
    carry(payload_of(source), destination)
    destination.start(0)
    assert output.read_bytes() == b"1"
    destination.leave_p2p()
    assert output.read_bytes() == b"123"
    source.start(0)  # had the migration been aborted instead
    source.leave_p2p()
    assert output.read_bytes() == b"12323"
    source.close()
    destination.close()


def test_a_back_end_that_takes_nothing_keeps_bytes_in_the_fifo_until_it_does(where: Path) -> None:
    os.mkfifo(where / "console")
    uart = Uart16550("uart0", {"output": str(where / "console")})
    edges = Edges(uart)
    reader = os.open(where / "console", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, F_SETPIPE_SZ, 4096)
    run(uart)
    put(uart, FCR, 1)
    sent = 0
    while get(uart, LSR) & 0x20:
        put(uart, THR, sent & 0xFF)
        sent += 1
    assert sent == 4096 + 1
    put(uart, THR, *(value & 0xFF for value in range(sent, sent + 15)))
    put(uart, THR, 0xEE)  # one more than the FIFO holds: lost, as on the chip
    put(uart, IER, 0x02)
    assert edges.take() == 0
    received = os.read(reader, 4096)
    assert edges.wait(), "THR is empty again"
    assert live_timers(uart) == 0
    received += os.read(reader, 4096)
    assert received == bytes(value & 0xFF for value in range(4096 + 16))
    rest(uart)
    uart.close()
    edges.close()
    os.close(reader)


def test_an_output_error_is_told_once_and_the_bytes_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    uart = Uart16550("uart0", {"output": "/dev/full"})
    put(uart, FCR, 1)
    uart.leave_p2p()
    put(uart, THR, *b"abc")
    assert uart.save()["tx_fifo"] == b"abc"
    assert [record.message for record in caplog.records] == [
        "event=output-failed reason='No space left on device'; sent bytes are kept and tried again"
    ]
    uart.close()


def test_input_is_taken_only_as_fast_as_the_guest_reads_it_and_never_overruns(where: Path) -> None:
    os.mkfifo(where / "keys")
    uart = Uart16550("uart0", {"input": str(where / "keys")})
    edges = Edges(uart)
    put(uart, FCR, 0x01)
    put(uart, IER, 0x01)
    run(uart)
    typed = bytes(range(100))
    (where / "keys").open("r+b", buffering=0).write(typed)
    assert edges.wait()
    received = bytes(get(uart, RBR) for _ in range(100))
    assert received == typed
    assert get(uart, LSR) == READY
    rest(uart)
    uart.close()
    edges.close()


def test_a_byte_that_takes_the_place_of_the_one_just_read_is_a_new_edge(where: Path) -> None:
    os.mkfifo(where / "keys")
    uart = Uart16550("uart0", {"input": str(where / "keys")})
    edges = Edges(uart)
    put(uart, IER, 0x01)
    with (where / "keys").open("r+b", buffering=0) as keys:
        keys.write(b"abc")
        uart.leave_p2p()
    for value in b"abc":
        assert edges.take() == 1
        assert get(uart, RBR) == value
    assert edges.take() == 0
    uart.close()
    edges.close()


def test_what_a_stopped_machine_did_not_read_is_read_by_the_destination(where: Path) -> None:
    os.mkfifo(where / "keys")
    source, destination = (Uart16550("uart0", {"input": str(where / "keys")}) for _ in range(2))
    with (where / "keys").open("r+b", buffering=0) as keys:
        keys.write(b"abc")
        source.leave_p2p()  # FIFOs off: it takes one byte
        source.enter_p2p()
        keys.write(b"d")
        carry(payload_of(source), destination)
        source.close()
        destination.leave_p2p()
        assert bytes(get(destination, RBR) for _ in range(4)) == b"abcd"
    destination.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output": "/nowhere/console"}, "output=/nowhere/console cannot be written: No such file"),
        ({"output": "/tmp"}, "output=/tmp cannot be written: Is a directory"),
        ({"input": "/nowhere/keys"}, "input=/nowhere/keys cannot be read: No such file"),
        ({"input": "/etc/passwd"}, "input=/etc/passwd is not a FIFO or a terminal"),
    ],
)
def test_a_back_end_that_cannot_be_used_is_refused_at_start_with_a_remedy(
    options: dict[str, str], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Uart16550("uart0", options)
    assert caught.value.remedy


# -- state ------------------------------------------------------------------------------------------------------------------


def test_an_edge_that_no_vmm_heard_of_is_raised_at_the_destination_and_one_that_was_heard_is_not() -> None:
    source, unheard, heard = (Uart16550("uart0") for _ in range(3))
    source.leave_p2p()
    put(source, IER, 0x02)
    carry(payload_of(source), unheard)
    Edges(source).close()
    carry(payload_of(source), heard)
    for destination, count in ((unheard, 1), (heard, 0)):
        edges = Edges(destination)
        destination.leave_p2p()
        assert edges.take() == count
        edges.close()


def test_a_character_timeout_under_way_comes_at_the_destination() -> None:
    source, destination = Uart16550("uart0"), Uart16550("uart0")
    source.leave_p2p()
    put(source, FCR, 0xC1)
    put(source, IER, 0x01)
    put(source, MCR, LOOPBACK)
    put(source, THR, 7)
    carry(payload_of(source), destination)
    edges = Edges(destination)
    run(destination)
    assert edges.wait()
    assert get(destination, IIR) == 0xCC
    rest(destination)
    edges.close()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"fcr": 0xC0, "rx_trigger": 14}, "fcr has a bit that is never kept"),
        ({"fcr": 0x03}, "fcr has a bit that is never kept"),
        ({"lsr_errors": 0x04}, "lsr_errors has an error"),
        ({"rx_fifo": b"ab"}, "rx_fifo is longer"),
        ({"tx_fifo": b"ab"}, "tx_fifo is longer"),
        ({"rx_trigger": 4}, "rx_trigger contradicts fcr"),
        ({"rx_timeout_pending": True}, "rx_timeout_pending without bytes"),
        ({"msr": 0x30}, "msr has other lines than mcr gives"),
    ],
)
def test_a_state_that_no_uart_can_be_in_is_refused_before_it_is_taken(
    wrong: dict[str, object], words: str
) -> None:
    device = Uart16550("uart0")
    before = device.save()
    with pytest.raises(DeviceRefused, match=words):
        device.check(before | wrong)
    assert device.save() == before


ACCESS = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 7), st.just(0)),
    st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just("write"), st.just(MCR), st.just(LOOPBACK)),
    st.tuples(st.just("write"), st.just(FCR), st.sampled_from([0x01, 0x41, 0xC1])),
    st.tuples(st.sampled_from(["leave_p2p", "enter_p2p"]), st.just(0), st.just(0)),
)


def answers(device: Uart16550, edges: Edges, accesses: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    """What each access answered, and how many edges it caused."""
    seen = []
    for kind, register, value in accesses:
        answer = 0
        if kind == "read":
            answer = get(device, register)
        elif kind == "write":
            put(device, register, value)
        else:
            getattr(device, kind)()
        seen.append((answer, edges.take()))
    return seen


@given(before=st.lists(ACCESS, max_size=60), after=st.lists(ACCESS, max_size=60))
def test_after_any_accesses_a_device_that_loads_the_state_answers_the_rest_as_this_one(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    outputs = [os.memfd_create("output") for _ in range(2)]
    source, destination = (Uart16550("uart0", {"output": f"/proc/self/fd/{fd}"}) for fd in outputs)
    listeners = [Edges(source), Edges(destination)]
    try:
        source.leave_p2p()
        answers(source, listeners[0], before)
        source.enter_p2p()
        source.stop()
        payload = payload_of(source)
        carry(payload, destination)
        assert payload_of(destination) == payload
        sent = os.pread(outputs[0], 1 << 16, 0)
        again = [("leave_p2p", 0, 0), *after]
        assert answers(source, listeners[0], again) == answers(destination, listeners[1], again)
        assert payload_of(source) == payload_of(destination)
        assert os.pread(outputs[0], 1 << 16, 0) == sent + os.pread(outputs[1], 1 << 16, 0)
    finally:
        for fd in outputs:
            os.close(fd)
        for device in (source, destination):
            device.close()
            device.irq().connect(None)
        for edges in listeners:
            edges.close()


@given(
    steps=st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=40), st.sampled_from(["migrate", "abort", "rest", "read", "fifos"])
        ),
        max_size=40,
    )
)
def test_what_a_careful_guest_sends_comes_out_once_and_in_order_whatever_the_machine_does(
    steps: list[bytes | str],
) -> None:
    """The back end is a pipe with 32 bytes of room that is read now and then: it takes all, some or nothing."""
    where = tempfile.mkdtemp(prefix="vf-", dir="/tmp")
    path = f"{where}/console"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    fcntl.fcntl(pipe, F_SETPIPE_SZ, 4096)
    filling = bytes(4096 - 32)
    os.write(pipe, filling)
    device = Uart16550("uart0", {"output": path})
    device.leave_p2p()
    written, received = bytearray(), bytearray()
    try:
        for step in steps:
            if isinstance(step, bytes):
                for value in step:
                    if get(device, LSR) & 0x20 or (device.fcr & 1 and len(device.tx) < 16):
                        put(device, THR, value)
                        written.append(value)
            elif step == "read":
                received += all_in(pipe)
            elif step == "fifos":
                if get(device, LSR) & 0x20:
                    put(device, FCR, 1)
            else:
                device.enter_p2p()
                device.stop()
                if step == "migrate":
                    source, device = device, Uart16550("uart0", {"output": path})
                    carry(payload_of(source), device)
                    source.close()
                if step != "rest":
                    device.start(0)
                    device.leave_p2p()
        received += all_in(pipe)
        device.leave_p2p()
        received += all_in(pipe)
        assert received == filling + written
    finally:
        device.close()
        os.close(pipe)
        shutil.rmtree(where)


def all_in(pipe: int) -> bytes:
    try:
        return os.read(pipe, 8192)
    except BlockingIOError:
        return b""
