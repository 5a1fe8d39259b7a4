"""Hypothesis strategies made from kinds and schemas: states that fit, states that do not, and schemas themselves."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

from hypothesis import strategies as st

from migrate.state.kinds import INTEGERS, Bool, Bytes, Enum, Field, Int, Kind, List, Str, Struct

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


_NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,40}", fullmatch=True)


def _integer(name: str, bounds: tuple[int, int]) -> st.SearchStrategy[Kind]:
    pair = st.tuples(st.integers(*bounds), st.integers(*bounds))
    return pair.map(lambda two: Int(name, min(two), max(two)))


def _field(name: str, kind: Kind, optional: bool) -> Field:
    return Field(name, kind, None if optional else kind.default(), optional=optional)


def _structs(kinds: st.SearchStrategy[Kind], *, sections: bool = False) -> st.SearchStrategy[Struct]:
    plain = st.lists(st.tuples(_NAMES, kinds), min_size=1, max_size=20, unique_by=lambda pair: pair[0])
    if not sections:
        return plain.map(lambda pairs: Struct(tuple(_field(name, kind, False) for name, kind in pairs)))

    def split(pairs: list[tuple[str, Kind]], at: int) -> Struct:
        return Struct(
            tuple(
                _field(name, kind, isinstance(kind, Struct) and number >= at)
                for number, (name, kind) in enumerate(pairs)
            )
        )

    return st.builds(split, plain, st.integers(0, 20))


_LEAVES: st.SearchStrategy[Kind] = st.one_of(
    *(_integer(name, bounds) for name, bounds in INTEGERS.items()),
    st.just(Bool()),
    st.tuples(st.sampled_from(EDGES[:8]), st.booleans()).map(
        lambda two: Bytes(two[0] if two[1] else 0, two[0])
    ),
    st.sampled_from(EDGES[:8]).map(Str),
    st.lists(_NAMES, min_size=1, max_size=5, unique=True).map(lambda names: Enum(tuple(names))),
)

#: Kinds of every sort, nested.
KINDS: st.SearchStrategy[Kind] = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.integers(0, 17), st.booleans(), inner).map(
            lambda of: List(of[0] if of[1] else 0, of[0], of[2])
        ),
        _structs(inner),
    ),
    max_leaves=8,
)

#: Whole states' structs, with subsections.
STRUCTS = _structs(KINDS, sections=True)


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
