"""The parts of a downtime add up to it, and none is less than nothing."""

from __future__ import annotations

from dataclasses import asdict

from hypothesis import example, given
from hypothesis import strategies as st

from migrate.coordinator.outcome import Downtime

_PARTS = ("stop", "pages", "save", "send", "load", "commit", "resume")
_MS = st.floats(0, 1e4)


@given(st.fixed_dictionaries(dict.fromkeys(_PARTS, _MS)), _MS)
# As it was measured once: 5 ms of `send` were the other side's `load`.
@example(dict(zip(_PARTS, (5.818, 13.659, 5.075, 5.001, 10.553, 10.181, 5.04), strict=True)), 53.61)
def test_what_both_sides_have_counted_is_counted_once(parts: dict[str, float], total: float) -> None:
    downtime = Downtime(**parts)
    downtime.settle(total)
    found = asdict(downtime)
    assert abs(sum(found.values()) - total) < 1e-6
    others = parts["stop"] + parts["load"] + parts["commit"] + parts["resume"]
    if total >= others:  # what one side has measured by one clock is not more than all
        assert all(value >= -1e-6 for value in found.values()), found
    assert {name: found[name] for name in ("stop", "load", "commit", "resume")} == {
        name: parts[name] for name in ("stop", "load", "commit", "resume")
    }


def test_what_is_left_is_the_networks() -> None:
    downtime = Downtime(stop=1, pages=2, save=3, send=4, load=5, commit=6, resume=7)
    downtime.settle(30)
    assert (downtime.network, downtime.send) == (2, 4)
