"""Which version two sides use, and what they are told when there is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.state.versions import can_read, digests_differ, why_not

NUMBERS = st.frozensets(st.integers(1, 6), max_size=6)


@given(NUMBERS, NUMBERS)
def test_it_is_the_highest_that_one_writes_and_the_other_reads(
    readable: frozenset[int], writable: frozenset[int]
) -> None:
    found = can_read(readable, writable)
    common = [number for number in range(7) if number in readable and number in writable]
    assert found == (common[-1] if common else None)


@pytest.mark.parametrize(
    ("writable", "readable", "words", "remedy"),
    [
        (
            [2],
            [1],
            ["writes version 2 of uart", "reads version 1"],
            "on the destination to version 2 or later",
        ),
        (
            [1],
            [2, 3],
            ["writes version 1 of uart", "reads versions 2, 3"],
            "on the source to version 2 or later",
        ),
        ([1, 3], [2], ["writes versions 1, 3 of uart"], "same release"),
        ([1], [], ["reads no version"], "on the destination"),
        ([], [1], ["writes no version"], "on the source"),
    ],
)
def test_a_refusal_says_what_each_side_has_and_which_to_upgrade(
    writable: list[int], readable: list[int], words: list[str], remedy: str
) -> None:
    assert can_read(readable, writable) is None
    reason, advice = why_not("uart", readable=readable, writable=writable)
    for word in words:
        assert word in reason
    assert remedy in advice


def test_one_number_with_two_definitions_is_a_refusal() -> None:
    assert digests_differ("uart", 1, source=b"a" * 32, destination=b"a" * 32) is None
    found = digests_differ("uart", 1, source=b"a" * 32, destination=b"b" * 32)
    assert found is not None
    assert "uart version 1" in found[0]
    assert "61616161" in found[0]
    assert "62626262" in found[0]
