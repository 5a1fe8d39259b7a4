"""The short form of `make fuzz`: every target for a few seconds, by a seed that is shown when it fails; and one that breaks."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.run import TARGETS, Finding, Target, fuzz

SECONDS = 2.5


@pytest.mark.parametrize("name", TARGETS)
def test_no_damage_leads_to_anything_but_a_typed_refusal(name: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"{name}: seed {seed}")
    assert fuzz(TARGETS[name], seed, SECONDS) > 100


def test_a_reader_that_breaks_is_found_with_the_input_that_broke_it() -> None:
    def reader(data: bytes) -> None:
        if data[1:2] != b"b":
            raise KeyError("b")

    with pytest.raises(Finding, match="KeyError") as caught:
        fuzz(Target(reader, lambda: [b"abc"]), 7, 5.0)
    assert caught.value.data[1:2] != b"b"


def test_a_seed_gives_the_same_inputs_again() -> None:
    seen: list[list[bytes]] = [[], []]
    for found in seen:
        fuzz(Target(found.append, lambda: [b"abc", b"defg"]), 11, 0.05)
    count = min(map(len, seen))
    assert count > 10
    assert seen[0][:count] == seen[1][:count]
