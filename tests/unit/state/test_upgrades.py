"""A state in another version: what is new, what is gone, what would be lost, and what needs a function of its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schema_strategies import states

from migrate.errors import BlobError, SchemaError
from migrate.state import catalog
from migrate.state.parse import parse
from migrate.state.upgrades import convert

MADE = parse(
    """
type = "made"
version = 3
[[field]]
name = "count"
type = "u8"
until = 2
[[field]]
name = "count"
type = "u32"
since = 3
default = 0
[[field]]
name = "mode"
type = "enum"
values = ["slow", "fast"]
since = 2
default = "slow"
[[subsection]]
name = "pending"
since = 3
[[subsection.field]]
name = "bytes"
type = "bytes<=8"
""",
    "made",
)


def test_what_is_new_comes_in_at_its_default_and_a_subsection_is_not_needed() -> None:
    assert convert(MADE, {"count": 200}, 1, 3) == {"count": 200, "mode": "slow"}


def test_going_down_loses_only_what_says_nothing() -> None:
    assert convert(MADE, {"count": 200, "mode": "slow"}, 3, 1) == {"count": 200}
    assert convert(MADE, {"count": 200, "mode": "fast"}, 3, 2) == {"count": 200, "mode": "fast"}


@pytest.mark.parametrize(
    ("state", "to", "says"),
    [
        ({"count": 200, "mode": "fast"}, 1, r"\.mode is needed"),
        ({"count": 300, "mode": "slow"}, 2, r"\.count is 300, outside 0\.\.255"),
        ({"count": 1, "mode": "slow", "pending": {"bytes": b""}}, 2, r"\.pending is needed"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(state: dict[str, object], to: int, says: str) -> None:
    with pytest.raises(BlobError, match=says) as caught:
        convert(MADE, state, 3, to)
    assert f"in version {to}" in caught.value.reason
    assert caught.value.remedy


def test_a_version_that_is_not_there_is_refused() -> None:
    with pytest.raises(SchemaError, match="no schema version 4"):
        convert(MADE, {"count": 1}, 1, 4)


ALL = [(name, version) for name in catalog.types() for version in catalog.load(name).versions]


@given(data=st.data())
def test_up_and_down_again_gives_the_same_state(data: st.DataObject) -> None:
    for schema in (
        MADE,
        *(catalog.load(name) for name in catalog.types() if len(catalog.load(name).versions) > 1),
    ):
        low, high = schema.versions[0], schema.versions[-1]
        state = schema.at(low).struct.canonical(data.draw(states(schema.at(low).struct)))
        up = convert(schema, state, low, high)
        assert schema.at(high).struct.canonical(up) == up
        assert convert(schema, up, high, low) == state


@pytest.mark.parametrize(("name", "version"), ALL)
def test_the_same_version_is_the_same_state(name: str, version: int) -> None:
    schema = catalog.load(name)
    state = schema.at(version).defaults()
    assert convert(schema, state, version, version) == state
