"""When the guest is stopped: never where the estimate is over the limit, and every migration comes to an end."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate.coordinator.convergence import MAX_ROUNDS, STALLED_ROUNDS, TRIFLE_BYTES, Convergence, Verdict
from migrate.coordinator.limits import EXTEND_AT_MOST, OnStall

#: On a loaded machine a single example may take as long as it likes.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

MIB = 1 << 20
LIMITS = st.floats(0.001, 1e6)
SIZES = st.integers(0, 1 << 44)
ROUNDS = st.lists(
    st.tuples(SIZES, st.floats(1e-6, 1e4), SIZES, st.floats(0, 1e12)), min_size=1, max_size=2 * MAX_ROUNDS
)


def guest(policy: Convergence, size: int, dirty_rate: float, send_rate: float) -> tuple[Verdict, float, int]:
    """A guest that dirties so much a second, over a channel that sends so much, until the policy ends it."""
    remaining = float(size)
    for number in range(1, 10_000):
        seconds = max(remaining / send_rate, 1e-6)
        policy.sent(int(remaining), seconds)
        remaining = min(size, dirty_rate * seconds)
        decision = policy.decide(int(remaining), dirty_rate)
        if decision.verdict is not Verdict.GO_ON:
            return decision.verdict, decision.expected_downtime_ms, number
    raise AssertionError("it never ends")


@patient
@given(LIMITS, st.floats(0, 1e5), ROUNDS, st.sampled_from([OnStall.ABORT, OnStall.WAIT]))
def test_the_guest_is_never_stopped_over_the_limit(
    limit: float, overhead: float, rounds: list[tuple[int, float, int, float]], on_stall: OnStall
) -> None:
    policy = Convergence(limit, on_stall)
    policy.overhead_ms = overhead
    for sent, seconds, remaining, dirty_rate in rounds:
        policy.sent(sent, seconds)
        decision = policy.decide(remaining, dirty_rate)
        assert decision.expected_downtime_ms >= overhead
        if decision.verdict is Verdict.SWITCH_OVER:
            assert decision.expected_downtime_ms <= limit
            if remaining > TRIFLE_BYTES:
                assert remaining / max(policy.rate, 1.0) * 1000 + overhead <= limit * (1 + 1e-9)


@patient
@given(LIMITS, st.floats(0, 1e5), ROUNDS)
def test_every_migration_comes_to_a_decision(
    limit: float, overhead: float, rounds: list[tuple[int, float, int, float]]
) -> None:
    policy = Convergence(limit)
    policy.overhead_ms = overhead
    for number in range(1, MAX_ROUNDS + 1):
        sent, seconds, remaining, dirty_rate = rounds[number % len(rounds)]
        policy.sent(sent, seconds)
        decision = policy.decide(remaining, dirty_rate)
        if decision.verdict is not Verdict.GO_ON:
            assert decision.verdict is not Verdict.GIVE_UP or decision.why
            return
    raise AssertionError(f"no decision after {MAX_ROUNDS} rounds")


@patient
@given(LIMITS, ROUNDS)
def test_extending_the_downtime_stays_within_its_bound_and_says_so(
    limit: float, rounds: list[tuple[int, float, int, float]]
) -> None:
    policy = Convergence(limit, OnStall.EXTEND_DOWNTIME)
    for sent, seconds, remaining, dirty_rate in rounds:
        policy.sent(sent, seconds)
        decision = policy.decide(remaining, dirty_rate)
        if decision.verdict is Verdict.SWITCH_OVER:
            assert decision.expected_downtime_ms <= limit * EXTEND_AT_MOST
            assert decision.expected_downtime_ms <= limit or "extended" in decision.why


def test_a_guest_that_dirties_less_than_is_sent_converges() -> None:
    verdict, expected, rounds = guest(Convergence(50), 1024 * MIB, 100e6, 1000e6)
    assert verdict is Verdict.SWITCH_OVER
    assert expected <= 50
    assert rounds < 10


def test_a_guest_that_dirties_faster_than_is_sent_is_given_up_with_both_rates() -> None:
    policy = Convergence(50)
    verdict, _, rounds = guest(policy, 1024 * MIB, 2000e6, 1000e6)
    assert verdict is Verdict.GIVE_UP
    assert rounds <= STALLED_ROUNDS + 2
    why = policy.decide(1024 * MIB, 2000e6).why
    assert "dirties 2000 MB/s, the channel sends 1000 MB/s" in why


def test_a_state_that_takes_longer_than_the_limit_is_given_up_at_once_and_named() -> None:
    policy = Convergence(50)
    policy.sent(100 * MIB, 0.1)
    policy.overhead_ms, policy.slowest = 80.0, "display0"
    decision = policy.decide(0, 0.0)
    assert decision.verdict is Verdict.GIVE_UP
    assert "80.0 ms, most of it display0's" in decision.why


def test_the_estimate_counts_saving_and_loading_and_not_memory_alone() -> None:
    policy = Convergence(100)
    policy.sent(1000 * MIB, 1.0)
    policy.overhead_ms = 60.0
    assert policy.decide(50 * MIB, 1e9).verdict is Verdict.GO_ON  # 50 ms of memory, 60 of state
    assert policy.decide(39 * MIB, 1e9).verdict is Verdict.SWITCH_OVER


def test_a_round_of_a_few_pages_says_nothing_about_the_channel() -> None:
    policy = Convergence(100)
    policy.sent(100 * MIB, 0.1)
    rate = policy.rate
    policy.sent(4096, 0.05)  # all latency
    assert policy.rate == rate


def test_a_new_limit_counts_from_the_next_decision_on() -> None:
    policy = Convergence(10)
    policy.sent(1000 * MIB, 1.0)
    assert policy.decide(100 * MIB, 1e9).verdict is Verdict.GO_ON
    policy.set_limit(200)
    assert policy.decide(100 * MIB, 1e9).verdict is Verdict.SWITCH_OVER


def test_waiting_never_gives_up_a_stall() -> None:
    policy = Convergence(10, OnStall.WAIT)
    policy.sent(1000 * MIB, 1.0)
    for _ in range(5 * MAX_ROUNDS):
        assert policy.decide(1000 * MIB, 2e9).verdict is Verdict.GO_ON


@pytest.mark.parametrize("remaining", [0, 1, TRIFLE_BYTES])
def test_what_is_left_of_an_idle_guest_costs_no_further_round(remaining: int) -> None:
    policy = Convergence(1)
    policy.sent(100 * MIB, 0.1)
    decision = policy.decide(remaining, 0.0)
    assert decision.verdict is Verdict.SWITCH_OVER
    assert math.isclose(decision.expected_downtime_ms, 0.0)
