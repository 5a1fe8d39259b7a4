"""Hypothesis strategies made from a schema: states that fit, and every kind of what does not. Needs Hypothesis, which is asked
for here and nowhere else in migrate.testing.

    @given(state=valid_states(catalog.load("my_device").at(1)))
    def test_every_state_is_taken_over(state): …
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import msgpack
from hypothesis import strategies as st

from migrate.state import SchemaVersion
from migrate.state.kinds import Bool, Bytes, Enum, Int, Kind, List, Str, Struct

#: Every length at which MessagePack changes the form of a head, and its neighbours.
EDGES = [0, 1, 15, 16, 31, 32, 255, 256, 65535, 65536]


def values(kind: Kind) -> st.SearchStrategy[object]:
    """Values that fit a kind."""
    match kind:
        case Int():
            edges = [
                n
                for b in (0, 5, 7, 8, 15, 16, 31, 32, 63, 64)
                for n in (2**b - 1, 2**b, -(2**b), -(2**b) - 1)
            ]
            inside = [n for n in (*edges, kind.low, kind.high) if kind.low <= n <= kind.high]
            return st.sampled_from(inside) | st.integers(kind.low, kind.high)
        case Bool():
            return st.booleans()
        case Bytes():
            inside = [n for n in (*EDGES, kind.low, kind.high) if kind.low <= n <= kind.high]
            some = st.binary(min_size=kind.low, max_size=min(kind.high, max(64, kind.low)))
            return st.sampled_from(inside).map(bytes) | some
        case Str():
            edges = [n for n in (*EDGES, kind.high) if n <= kind.high]
            text = st.text(max_size=kind.high // 4)
            return st.sampled_from(edges).map(lambda n: "x" * n) | text
        case Enum():
            return st.sampled_from(kind.values)
        case List():
            return st.lists(values(kind.item), min_size=kind.low, max_size=min(kind.high, max(kind.low, 20)))
        case Struct():
            return st.fixed_dictionaries(
                {entry.name: values(entry.kind) for entry in kind.fields if not entry.optional},
                optional={entry.name: values(entry.kind) for entry in kind.fields if entry.optional},
            )
    raise AssertionError(f"a kind without a strategy: {kind}")


def states(struct: Struct) -> st.SearchStrategy[dict[str, object]]:
    return values(struct)  # type: ignore[return-value]


def valid_states(version: SchemaVersion) -> st.SearchStrategy[dict[str, object]]:
    """States that fit a version; whether the device can be in them is the device's to say."""
    return states(version.struct)


def invalid_states(version: SchemaVersion) -> st.SearchStrategy[tuple[str, dict[str, object]]]:
    """What is wrong, by its path, and a state that is wrong there alone: missing, unknown, of another type, out of bounds."""
    return valid_states(version).flatmap(lambda state: spoilt(version.struct, state))


def invalid_payloads(version: SchemaVersion) -> st.SearchStrategy[tuple[str, bytes]]:
    """What is wrong, and bytes that are no canonical encoding of any state of a version."""

    def damaged(state: dict[str, object]) -> st.SearchStrategy[tuple[str, bytes]]:
        good = version.encode(state)
        found = [
            ("cut off", good[:-1]),
            ("something follows", good + b"\x00"),
            ("nothing", b""),
            ("not a map", msgpack.packb(list(state.values()))),
            ("an integer in a longer form", _longer(good)),
        ]
        if len(state) > 1:
            found.append(("fields in another order", msgpack.packb(dict(reversed(state.items())))))
        first, *_ = state
        twice = msgpack.packb(first) + msgpack.packb(state[first])
        if len(state) < 15:
            found.append(("a field given twice", bytes((0x80 + len(state) + 1,)) + good[1:] + twice))
        return st.sampled_from([(what, data) for what, data in found if data != good])

    return valid_states(version).flatmap(damaged)


def _longer(good: bytes) -> bytes:
    """The map's head in a form that has room for more."""
    if good[:1] and 0x80 <= good[0] < 0x90:
        return b"\xde" + (good[0] & 0x0F).to_bytes(2, "big") + good[1:]
    return good


def spoilt(struct: Struct, state: dict[str, object]) -> st.SearchStrategy[tuple[str, dict[str, object]]]:
    """A state that fits, made wrong at one place: (its path, the state)."""
    places = list(_wrongs(struct, state, "", lambda root: root))

    @st.composite
    def one(draw: st.DrawFn) -> tuple[str, dict[str, object]]:
        path, spoil = draw(st.sampled_from(places))
        wrong = deepcopy(state)
        spoil(wrong)
        return path, wrong

    return one()


_Spoil = Callable[[dict[str, object]], None]


def _wrongs(
    kind: Kind, value: object, path: str, reach: Callable[[object], object]
) -> list[tuple[str, _Spoil]]:
    """Every way to make something inside `value` wrong; `reach` finds `value` in a copy of the whole state."""
    found: list[tuple[str, _Spoil]] = []
    if isinstance(kind, Struct):
        assert isinstance(value, dict)

        def add(root: dict[str, object]) -> None:
            reach(root)["not_in_it"] = 0  # type: ignore[index]

        found.append((f"{path}.not_in_it", add))
        for entry in kind.fields:
            if entry.name not in value:
                continue
            step, inner = entry.name, value[entry.name]
            found += _at(entry.kind, inner, f"{path}.{step}", reach, step)
            if not entry.optional:

                def remove(root: dict[str, object], step: str = step) -> None:
                    del reach(root)[step]  # type: ignore[attr-defined]

                found.append((f"{path}.{step}", remove))
    elif isinstance(kind, List):
        assert isinstance(value, list)
        for number, inner in enumerate(value):
            found += _at(kind.item, inner, f"{path}[{number}]", reach, number)
    return found


def _at(
    kind: Kind, inner: object, path: str, reach: Callable[[object], object], step: str | int
) -> list[tuple[str, _Spoil]]:
    found = _wrongs(kind, inner, path, lambda root: reach(root)[step])  # type: ignore[index]
    for wrong in _misfits(kind):

        def put(root: dict[str, object], wrong: object = wrong) -> None:
            reach(root)[step] = wrong  # type: ignore[index]

        found.append((path, put))
    return found


def _misfits(kind: Kind) -> list[object]:
    """Values that do not fit a kind: of other types, and just outside its bounds."""
    others: list[object] = [1.5, {"a": 1, "b": 2, "not_in_it": 3}, [[]] * 18]
    match kind:
        case Int():
            return [*others, True, False, "1", b"1", kind.low - 1, kind.high + 1, 2**70, None]
        case Bool():
            return [*others, 0, 1, "true"]
        case Bytes():
            return [*others, "text", 1, bytes(kind.high + 1), *([bytes(kind.low - 1)] if kind.low else [])]
        case Str():
            return [*others, b"text", 1, "x" * (kind.high + 1), "\ud800"]
        case Enum():
            return [*others, b"text", 1, "", "no_such_word_of_any_enum_in_these_tests_at_all"]
        case List():
            item = kind.item.default()
            return [
                1.5,
                {"a": 1},
                1,
                "text",
                [item] * (kind.high + 1),
                *([[item] * (kind.low - 1)] if kind.low else []),
            ]
        case Struct():
            return [1.5, 1, "text", [], {}]
    raise AssertionError(f"a kind without misfits: {kind}")
