"""rtc: time goes on evenly over hosts whose clocks have nothing to do with each other; alarms go off once."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from passage import Edges, carry, go, live_timers, payload_of, rest, run

from devices.rtc import Rtc

TIME, MONO, ALARM, CONTROL, STATUS, SCRATCH = 0x00, 0x08, 0x10, 0x18, 0x1C, 0x20
SECOND = 1_000_000_000
LAST = 2**64 - 1


@dataclass
class Host:
    """A host's clocks, in ns; they move only when told."""

    mono: int
    wall: int
    wall_reads: int = 0

    def advance(self, ns: int) -> None:
        self.mono += ns
        self.wall += ns


class RtcOn(Rtc):
    """An rtc on a given host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        super().__init__("rtc0")

    def monotonic_ns(self) -> int:
        return self.host.mono

    def wall_ns(self) -> int:
        self.host.wall_reads += 1
        return self.host.wall


def here() -> Host:
    return Host(mono=5_000 * SECOND, wall=1_700_000_000 * SECOND)


def elsewhere() -> Host:
    """Booted a moment ago, its wall clock a year behind."""
    return Host(mono=3 * SECOND, wall=1_670_000_000 * SECOND)


def get(device: Rtc, offset: int, size: int = 8) -> int:
    with device.lock:
        return device.read(0, offset, size)


def put(device: Rtc, offset: int, value: int, size: int = 8) -> None:
    with device.lock:
        device.write(0, offset, size, value)


# -- time -------------------------------------------------------------------------------------------------------------------


def test_the_hosts_wall_clock_is_read_at_the_first_start_and_never_again() -> None:
    host = here()
    rtc = RtcOn(host)
    rtc.reset()
    assert host.wall_reads == 0
    run(rtc)
    assert (get(rtc, TIME), get(rtc, MONO)) == (host.wall, 0)
    host.advance(7)
    host.wall += 3600 * SECOND  # somebody set it
    assert (get(rtc, TIME), get(rtc, MONO)) == (1_700_000_000 * SECOND + 7, 7)
    rest(rtc)
    run(rtc)
    assert host.wall_reads == 1


def test_time_stands_still_in_stop_and_goes_on_by_the_length_of_the_standstill() -> None:
    host = here()
    rtc = RtcOn(host)
    run(rtc)
    host.advance(10)
    rest(rtc)
    host.advance(500)
    assert get(rtc, MONO) == 10
    run(rtc, stopped_ns=500)
    host.advance(1)
    assert get(rtc, MONO) == 511
    assert get(rtc, TIME) == host.wall


def test_on_the_host_where_it_stopped_it_knows_the_length_of_the_standstill_untold() -> None:
    host = here()
    rtc = RtcOn(host)
    run(rtc)
    rest(rtc)
    host.advance(500)
    run(rtc)
    assert (get(rtc, TIME), get(rtc, MONO)) == (host.wall, 500)


def test_a_host_whose_clocks_differ_shows_the_guest_the_gap_and_nothing_else() -> None:
    old, new = here(), elsewhere()
    source, destination = RtcOn(old), RtcOn(new)
    run(source)
    old.advance(10)
    rest(source)
    carry(payload_of(source), destination)
    new.advance(12345)
    run(destination, stopped_ns=300)
    assert (get(destination, TIME), get(destination, MONO)) == (1_700_000_000 * SECOND + 310, 310)
    new.advance(5)
    assert get(destination, MONO) == 315
    assert new.wall_reads == 0


def test_a_device_that_stopped_here_once_and_then_took_a_state_goes_by_what_it_is_told() -> None:
    host = here()
    rtc, source = RtcOn(host), RtcOn(elsewhere())
    for device in (rtc, source):
        run(device)
        rest(device)
    host.advance(70 * SECOND)
    carry(payload_of(source), rtc)
    run(rtc, stopped_ns=5)
    assert get(rtc, MONO) == 5


def test_a_machine_that_never_ran_gets_its_time_where_it_first_runs() -> None:
    new = elsewhere()
    destination = RtcOn(new)
    carry(payload_of(RtcOn(here())), destination)
    run(destination, stopped_ns=9 * SECOND)
    assert (get(destination, TIME), get(destination, MONO)) == (new.wall, 0)


def test_the_clock_runs_in_p2p_where_the_device_still_answers() -> None:
    host = here()
    rtc = RtcOn(host)
    go(rtc, "RUNNING_P2P")
    host.advance(5)
    assert get(rtc, MONO) == 5
    go(rtc, "RUNNING")
    host.advance(5)
    go(rtc, "RUNNING_P2P")
    host.advance(5)
    assert get(rtc, MONO) == 15


def test_the_low_half_fixes_the_high_half_also_across_a_migration() -> None:
    source, destination = (RtcOn(Host(mono=100, wall=0x5_FFFF_FFFF)) for _ in range(2))
    run(source)
    assert get(source, TIME, 4) == 0xFFFF_FFFF
    source.host.advance(1)
    assert get(source, TIME) == 6 << 32
    assert get(source, TIME + 4, 4) == 5
    rest(source)
    carry(payload_of(source), destination)
    run(destination)
    assert get(destination, TIME + 4, 4) == 5
    assert get(destination, TIME, 4) == 0
    assert get(destination, TIME + 4, 4) == 6
    assert get(destination, MONO + 4, 4) == 0


def test_a_word_whose_low_half_was_read_before_the_stop_does_not_jump_where_its_high_half_wraps_on_the_way() -> (
    None
):
    """The low half's instant is of the source, and so must the high half be: 4.3 s that the guest's clock then ran back."""
    source, destination = RtcOn(Host(mono=100, wall=0x5_FFFF_0000)), RtcOn(elsewhere())
    run(source)
    source.host.advance(0xF000)
    low = get(source, TIME, 4)
    rest(source)
    carry(payload_of(source), destination)
    with destination.lock:
        destination.start(0x2000)  # the standstill goes past the wrap
        destination.leave_p2p()
    assert get(destination, TIME + 4, 4) << 32 | low == 0x5_FFFF_F000
    assert get(destination, TIME, 4) == 0x1000
    assert get(destination, TIME + 4, 4) == 6


def test_after_a_load_a_high_half_alone_is_of_now_once_anything_else_was_read() -> None:
    source, destination = RtcOn(Host(mono=100, wall=0x5_FFFF_0000)), RtcOn(elsewhere())
    run(source)
    rest(source)
    carry(payload_of(source), destination)
    with destination.lock:
        destination.start(1 << 32)
        destination.leave_p2p()
    assert get(destination, SCRATCH, 4) == 0
    assert get(destination, TIME + 4, 4) == 6


def test_a_reset_keeps_the_time_and_clears_the_rest() -> None:
    host = here()
    rtc = RtcOn(host)
    run(rtc)
    put(rtc, ALARM, 1)
    put(rtc, CONTROL, 1, 4)
    put(rtc, SCRATCH, 5)
    host.advance(10)
    rtc.reset()
    assert get(rtc, MONO) == 10
    assert [get(rtc, offset) for offset in (ALARM, CONTROL, SCRATCH)] == [0, 0, 0]


def test_the_clock_stops_at_the_end_of_64_bits_rather_than_begin_again() -> None:
    rtc = RtcOn(here())
    run(rtc)
    rest(rtc)
    rtc.host.advance(LAST)
    run(rtc)
    rtc.host.advance(1)
    assert (get(rtc, TIME), get(rtc, MONO)) == (LAST, LAST)
    payload_of(rtc)


# -- registers ----------------------------------------------------------------------------------------------------------------


def test_alarm_and_scratch_are_read_and_written_whole_or_by_halves() -> None:
    rtc = RtcOn(here())
    for offset in (ALARM, SCRATCH):
        put(rtc, offset, 0x1111_2222_3333_4444)
        put(rtc, offset, 0xAAAA_BBBB, 4)
        put(rtc, offset + 4, 0xCCCC_DDDD, 4)
        assert get(rtc, offset) == 0xCCCC_DDDD_AAAA_BBBB
        assert (get(rtc, offset, 4), get(rtc, offset + 4, 4)) == (0xAAAA_BBBB, 0xCCCC_DDDD)


def test_clocks_cannot_be_written_and_narrow_accesses_do_nothing() -> None:
    rtc = RtcOn(here())
    run(rtc)
    before = rtc.save()
    put(rtc, TIME, 0)
    put(rtc, MONO, 7)
    put(rtc, SCRATCH, 7, 2)
    assert get(rtc, TIME, 1) == 0
    assert rtc.save() == before


# -- alarm --------------------------------------------------------------------------------------------------------------------


def set_alarm(rtc: Rtc, at: int) -> None:
    put(rtc, ALARM, at)
    put(rtc, CONTROL, 1, 4)


def test_an_alarm_in_the_past_goes_off_at_once_and_once() -> None:
    rtc = RtcOn(here())
    edges = Edges(rtc)
    run(rtc)
    set_alarm(rtc, get(rtc, TIME) - 1)
    assert edges.take() == 1
    assert (get(rtc, CONTROL, 4), get(rtc, STATUS, 4)) == (0, 1)
    put(rtc, STATUS, 1, 4)
    assert get(rtc, STATUS, 4) == 0
    rest(rtc)
    run(rtc, stopped_ns=SECOND)
    assert edges.take() == 0
    edges.close()


def test_an_alarm_goes_off_by_itself_when_its_time_comes() -> None:
    rtc = Rtc("rtc0")
    edges = Edges(rtc)
    run(rtc)
    set_alarm(rtc, get(rtc, TIME) + 20_000_000)
    assert edges.wait()
    assert get(rtc, TIME) >= get(rtc, ALARM)
    assert get(rtc, STATUS, 4) == 1
    rest(rtc)
    edges.close()


def test_an_alarm_that_was_moved_nearer_goes_off_then() -> None:
    rtc = Rtc("rtc0")
    edges = Edges(rtc)
    run(rtc)
    set_alarm(rtc, LAST)
    assert rtc._timer is not None
    assert rtc._timer.seconds < threading.TIMEOUT_MAX, "or the thread of the timers dies of it"
    set_alarm(rtc, get(rtc, TIME) + 20_000_000)
    assert edges.wait()
    rest(rtc)
    edges.close()


def test_an_alarm_set_again_and_again_wakes_the_process_once() -> None:
    rtc = Rtc("rtc0")
    run(rtc)
    for _ in range(10):
        set_alarm(rtc, LAST)
    assert live_timers(rtc) == 1
    put(rtc, CONTROL, 0, 4)
    assert live_timers(rtc) == 0
    rest(rtc)


def test_an_alarm_switched_off_does_not_go_off() -> None:
    rtc = RtcOn(here())
    edges = Edges(rtc)
    run(rtc)
    set_alarm(rtc, get(rtc, TIME) + 10)
    put(rtc, CONTROL, 0, 4)
    rtc.host.advance(20)
    rtc._watch_alarm()
    assert edges.take() == 0
    edges.close()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_an_alarm_due_while_the_machine_stood_still_goes_off_once_when_it_runs(where: str) -> None:
    source = RtcOn(here())
    run(source)
    set_alarm(source, get(source, TIME) + 100)
    rest(source)
    rtc = source
    if where == "elsewhere":
        rtc = RtcOn(elsewhere())
        carry(payload_of(source), rtc)
    edges = Edges(rtc)
    rtc.host.advance(200)
    go(rtc, "RUNNING_P2P", stopped_ns=200)
    assert edges.take() == 0
    assert get(rtc, STATUS, 4) == 0, "nothing new begins before RUNNING"
    go(rtc, "RUNNING")
    assert edges.take() == 1
    rest(rtc)
    run(rtc)
    assert edges.take() == 0
    edges.close()


def test_an_alarm_not_yet_due_goes_off_at_the_destination_on_time() -> None:
    source, destination = RtcOn(here()), Rtc("rtc0")
    run(source)
    set_alarm(source, get(source, TIME) + SECOND)
    rest(source)
    carry(payload_of(source), destination)
    edges = Edges(destination)
    begun = time.monotonic()
    run(destination, stopped_ns=SECOND - 50_000_000)
    assert edges.wait()
    assert time.monotonic() - begun >= 0.05
    rest(destination)
    edges.close()


def test_who_reads_a_time_past_the_alarm_finds_that_it_went_off() -> None:
    rtc = RtcOn(here())
    edges = Edges(rtc)
    run(rtc)
    set_alarm(rtc, get(rtc, TIME) + 100)
    assert get(rtc, STATUS, 4) == 0
    rtc.host.advance(100)
    assert get(rtc, STATUS, 4) == 1
    rtc._watch_alarm()
    assert edges.take() == 1
    edges.close()


# -- properties -----------------------------------------------------------------------------------------------------------------

NS = st.one_of(st.integers(0, 1000), st.integers(0, 10**12))


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("run for"), NS, NS, NS),
            st.tuples(st.just("abort after"), NS, NS, NS),
            st.tuples(st.just("migrate after, to clocks at"), NS, NS, NS),
        ),
        max_size=20,
    )
)
def test_guest_time_is_the_true_time_since_the_first_start_over_any_number_of_hosts(
    steps: list[tuple[str, int, int, int]],
) -> None:
    host = here()
    begun = host.wall
    rtc = RtcOn(host)
    run(rtc)
    true = 0
    for step, first, second, third in steps:
        if step == "run for":
            rtc.host.advance(first)
        else:
            rest(rtc)
            rtc.host.advance(first)
            if step.startswith("migrate"):
                payload = payload_of(rtc)
                rtc = RtcOn(Host(mono=second, wall=third))
                carry(payload, rtc)
            run(rtc, stopped_ns=first)
        true += first
        assert (get(rtc, TIME), get(rtc, MONO)) == (begun + true, true)


U64 = st.integers(0, LAST)


def needed_or_not_there(state: dict[str, object]) -> bool:
    """No device sends high halves that are those of the time."""
    return state["half_read"] != {"time_high": state["guest_ns"] >> 32, "mono_high": state["mono_ns"] >> 32}  # type: ignore[operator]


@given(
    state=st.fixed_dictionaries(
        {
            **dict.fromkeys(("guest_ns", "mono_ns", "alarm_ns", "scratch"), U64),
            **{name: st.booleans() for name in ("alarm_enabled", "alarm_fired")},
            "half_read": st.none()
            | st.fixed_dictionaries(dict.fromkeys(("time_high", "mono_high"), st.integers(0, 2**32 - 1))),
        }
    ).filter(needed_or_not_there)
)
def test_a_state_that_is_loaded_and_saved_before_running_gives_the_same_bytes(
    state: dict[str, object],
) -> None:
    first, second = RtcOn(here()), RtcOn(elsewhere())
    first.load(state)
    assert first.save() == state
    payload = payload_of(first)
    first.host.advance(12345)
    assert payload_of(first) == payload
    carry(payload, second)
    assert payload_of(second) == payload


REGISTER = st.sampled_from(
    [TIME, TIME + 4, MONO, MONO + 4, ALARM, ALARM + 4, CONTROL, STATUS, SCRATCH, SCRATCH + 4]
)
ACCESS = st.one_of(
    st.tuples(st.just("read"), REGISTER, st.sampled_from([1, 4, 8]), st.just(0)),
    st.tuples(st.just("write"), REGISTER, st.sampled_from([1, 4, 8]), st.one_of(st.integers(0, 3), U64)),
    st.tuples(st.just("alarm in"), st.just(0), st.just(0), st.integers(-10, 2000)),
    st.tuples(st.just("advance"), st.just(0), st.just(0), st.integers(0, 1000)),
    st.tuples(st.sampled_from(["leave_p2p", "enter_p2p"]), st.just(0), st.just(0), st.just(0)),
)


def answers(rtc: RtcOn, edges: Edges, accesses: list[tuple[str, int, int, int]]) -> list[tuple[int, int]]:
    seen = []
    for kind, offset, size, value in accesses:
        answer = 0
        match kind:
            case "read" | "write":
                aligned = offset - offset % max(size, 1)
                if kind == "read":
                    answer = get(rtc, aligned, size)
                else:
                    put(rtc, aligned, value & (1 << 8 * size) - 1, size)
            case "alarm in":
                set_alarm(rtc, max(0, get(rtc, TIME) + value))
            case "advance":
                rtc.host.advance(value)
                rtc._watch_alarm()  # as the timer would
            case _:
                getattr(rtc, kind)()
        seen.append((answer, edges.take()))
    return seen


@given(before=st.lists(ACCESS, max_size=40), after=st.lists(ACCESS, max_size=40))
def test_after_any_accesses_a_device_that_loads_the_state_answers_the_rest_as_this_one(
    before: list[tuple[str, int, int, int]], after: list[tuple[str, int, int, int]]
) -> None:
    source, destination = RtcOn(here()), RtcOn(elsewhere())
    listeners = [Edges(source), Edges(destination)]
    source.start(0)
    source.leave_p2p()
    answers(source, listeners[0], before)
    source.enter_p2p()
    source.stop()
    carry(payload_of(source), destination)
    source.host.advance(50)
    for rtc in (source, destination):
        rtc.start(50)
    again = [("leave_p2p", 0, 0, 0), *after]
    assert answers(source, listeners[0], again) == answers(destination, listeners[1], again)
    assert payload_of(source) == payload_of(destination)
    for rtc, edges in zip((source, destination), listeners, strict=True):
        rtc.irq().connect(None)
        edges.close()
