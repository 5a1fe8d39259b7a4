"""Messages made from the specification of their fields: every kind, to the edges of its bounds (lists and blobs shorter)."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from migrate.errors import MAX_TEXT, Reason
from migrate.protocol import messages as m
from migrate.protocol.fields import Bool, Bytes, Check, Int, List, Map, Reasons, Struct, Text, checks

#: Longest list, map or blob that is made. The bounds themselves have tests of their own.
MOST = 6

TEXT = st.characters(codec="utf-8")


def texts(limit: int) -> st.SearchStrategy[str]:
    return st.text(TEXT, max_size=min(limit, MOST)) | st.just("x" * limit)


REASONS = st.builds(Reason, st.none() | texts(255), texts(MAX_TEXT), texts(MAX_TEXT), texts(MAX_TEXT))


def values(check: Check) -> st.SearchStrategy[Any]:
    """What a field may hold, as a decoded message keeps it."""
    match check:
        case Int():
            return st.integers(0, check.limit - 1) | st.sampled_from([0, check.limit - 1])
        case Text():
            return texts(check.limit)
        case Bytes(exactly=True):
            return st.binary(min_size=check.limit, max_size=check.limit)
        case Bytes():
            return st.binary(max_size=min(check.limit, MOST))
        case Bool():
            return st.booleans()
        case List(exactly=True):
            return st.tuples(*[values(check.item)] * check.limit)
        case List():
            return st.lists(values(check.item), max_size=min(check.limit, MOST)).map(tuple)
        case Map():
            return st.dictionaries(values(check.key), values(check.item), max_size=min(check.limit, MOST))
        case Struct():
            return of_kind(check.kind)
        case Reasons():
            return st.lists(REASONS, max_size=MOST).map(tuple)
    raise AssertionError(f"no values are known for {check!r}")


def of_kind(kind: type[Any]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: values(check) for name, check in checks(kind).items()})


KINDS = sorted(m.REGISTRY.values(), key=lambda kind: kind.name)

ANY_MESSAGE: st.SearchStrategy[m.Message] = st.sampled_from(KINDS).flatmap(of_kind)


def least(check: Check) -> Any:
    """The smallest value that a field may hold."""
    match check:
        case Int():
            return 0
        case Text():
            return ""
        case Bytes():
            return bytes(check.limit) if check.exactly else b""
        case Bool():
            return False
        case Map():
            return {}
        case Struct():
            return sample(check.kind)
    return ()


def sample(kind: type[Any]) -> Any:
    """The one message of a kind that says least: for tests of what may be said when."""
    return kind(**{name: least(check) for name, check in checks(kind).items()})
