"""The device states: every pair of them, against the rule and against what the kernel does."""

from __future__ import annotations

import itertools

import pytest

from migrate.errors import DeviceRefused
from migrate.state import lifecycle
from migrate.state.lifecycle import (
    ACTIVE,
    ARCS,
    PATHS,
    RESPONDING,
    SAVING_GROUP,
    DeviceState,
    parse,
    path,
)

S = DeviceState

#: What the comment above vfio_mig_get_next_state() says (Linux 037dd1308c6d, drivers/vfio/vfio_main.c) with all optional
#: features on: the moves of more than one arc, by their interiors.
KERNEL_COMBINATIONS = {
    ("PRE_COPY", "STOP_COPY"): "PRE_COPY_P2P",
    ("PRE_COPY", "RUNNING_P2P"): "RUNNING",
    ("PRE_COPY", "STOP"): "RUNNING RUNNING_P2P",
    ("PRE_COPY", "RESUMING"): "RUNNING RUNNING_P2P STOP",
    ("PRE_COPY_P2P", "RUNNING"): "RUNNING_P2P",
    ("PRE_COPY_P2P", "STOP"): "RUNNING_P2P",
    ("PRE_COPY_P2P", "RESUMING"): "RUNNING_P2P STOP",
    ("RESUMING", "RUNNING_P2P"): "STOP",
    ("RESUMING", "PRE_COPY_P2P"): "STOP RUNNING_P2P",
    ("RESUMING", "RUNNING"): "STOP RUNNING_P2P",
    ("RESUMING", "PRE_COPY"): "STOP RUNNING_P2P RUNNING",
    ("RESUMING", "STOP_COPY"): "STOP",
    ("RUNNING", "PRE_COPY_P2P"): "RUNNING_P2P",
    ("RUNNING", "STOP"): "RUNNING_P2P",
    ("RUNNING", "RESUMING"): "RUNNING_P2P STOP",
    ("RUNNING", "STOP_COPY"): "RUNNING_P2P STOP",
    ("RUNNING_P2P", "PRE_COPY"): "RUNNING",
    ("RUNNING_P2P", "RESUMING"): "STOP",
    ("RUNNING_P2P", "STOP_COPY"): "STOP",
    ("STOP", "PRE_COPY_P2P"): "RUNNING_P2P",
    ("STOP", "RUNNING"): "RUNNING_P2P",
    ("STOP", "PRE_COPY"): "RUNNING_P2P RUNNING",
    ("STOP_COPY", "RESUMING"): "STOP",
    ("STOP_COPY", "RUNNING_P2P"): "STOP",
    ("STOP_COPY", "RUNNING"): "STOP RUNNING_P2P",
}
KERNEL_ARCS = {
    ("PRE_COPY", "PRE_COPY_P2P"),
    ("PRE_COPY", "RUNNING"),
    ("PRE_COPY_P2P", "PRE_COPY"),
    ("PRE_COPY_P2P", "RUNNING_P2P"),
    ("PRE_COPY_P2P", "STOP_COPY"),
    ("RESUMING", "STOP"),
    ("RUNNING", "PRE_COPY"),
    ("RUNNING", "RUNNING_P2P"),
    ("RUNNING_P2P", "PRE_COPY_P2P"),
    ("RUNNING_P2P", "RUNNING"),
    ("RUNNING_P2P", "STOP"),
    ("STOP", "RESUMING"),
    ("STOP", "RUNNING_P2P"),
    ("STOP", "STOP_COPY"),
    ("STOP_COPY", "STOP"),
}
ALL_PAIRS = list(itertools.product(DeviceState, DeviceState))


def test_the_direct_arcs_are_the_fifteen_of_the_kernel() -> None:
    assert {(a.value, b.value) for a, targets in ARCS.items() for b in targets} == KERNEL_ARCS
    assert set(ARCS) == set(DeviceState)


@pytest.mark.parametrize(("current", "target"), ALL_PAIRS)
def test_every_move_is_the_kernels(current: DeviceState, target: DeviceState) -> None:
    pair = (current.value, target.value)
    if S.ERROR in (current, target) or pair in {("STOP_COPY", "PRE_COPY"), ("STOP_COPY", "PRE_COPY_P2P")}:
        assert (current, target) not in PATHS
        with pytest.raises(DeviceRefused) as caught:
            path(current, target)
        assert current in caught.value.reason or target in caught.value.reason
        assert caught.value.remedy
    elif current is target:
        assert path(current, target) == ()
    elif pair in KERNEL_ARCS:
        assert path(current, target) == (target,)
    else:
        assert path(current, target) == (*map(S, KERNEL_COMBINATIONS[pair].split()), target)


def _legal_ways(current: DeviceState, target: DeviceState) -> list[tuple[DeviceState, ...]]:
    """By brute force: all ways without a loop that the rule allows."""
    others = [state for state in DeviceState if state not in (current, target, S.ERROR)]
    inside_ok = current in SAVING_GROUP and target in SAVING_GROUP
    ways = []
    for count in range(len(others) + 1):
        for interior in itertools.permutations(others, count):
            way = (current, *interior, target)
            if all(b in ARCS[a] for a, b in itertools.pairwise(way)) and (
                inside_ok or not SAVING_GROUP.intersection(interior)
            ):
                ways.append(way[1:])
    return ways


def test_the_rule_names_one_way_and_no_other_is_as_short() -> None:
    for (current, target), way in PATHS.items():
        if current is not target:
            ways = _legal_ways(current, target)
            shortest = min(map(len, ways))
            assert [found for found in ways if len(found) == shortest] == [way], (current, target)


def test_the_rule_decides_and_not_the_order_in_which_the_table_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for turned in itertools.product((False, True), repeat=len(ARCS)):
        pairs = zip(ARCS.items(), turned, strict=True)
        monkeypatch.setattr(lifecycle, "ARCS", {a: arcs[::-1] if turn else arcs for (a, arcs), turn in pairs})
        assert lifecycle._all_paths() == PATHS


def test_a_device_in_error_stays_until_it_is_reset() -> None:
    assert ARCS[S.ERROR] == ()
    with pytest.raises(DeviceRefused, match="reset"):
        path(S.ERROR, S.RUNNING)


def test_who_works_by_itself_also_answers() -> None:
    assert ACTIVE < RESPONDING
    assert {S.STOP, S.STOP_COPY, S.RESUMING, S.ERROR} == set(DeviceState) - RESPONDING


def test_a_state_is_parsed_by_its_name_on_the_bus() -> None:
    for state in DeviceState:
        assert parse(state.name) is state
        assert str(state) == state.name
    with pytest.raises(DeviceRefused, match="running"):
        parse("running")
