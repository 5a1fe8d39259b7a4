"""Hypothesis strategies for schemas themselves; those for states made from them are migrate.testing.strategies."""

from __future__ import annotations

from hypothesis import strategies as st

from migrate.state.kinds import INTEGERS, Bool, Bytes, Enum, Field, Int, Kind, List, Str, Struct
from migrate.testing.strategies import EDGES, spoilt, states

__all__ = ["KINDS", "STRUCTS", "spoilt", "states"]

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
