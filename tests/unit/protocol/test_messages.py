"""Control messages: what is said is heard, and what is not exactly one message within its bounds is refused by name."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages_made import ANY_MESSAGE, KINDS, of_kind, sample

from migrate.errors import Reason, RemoteProtocolError
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.protocol.fields import Bytes, Check, Int, List, Map, Reasons, Struct, Text, checks

#: On a loaded machine a single example may take as long as it likes.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

#: What msgpack can carry.
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.binary(), inner, max_size=4),
    max_leaves=12,
)


def packed(name: object, fields: object) -> bytes:
    return bytes(msgpack.packb([name, fields]))


def fields_of(message: m.Message) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(m.encode(message))[1]
    return fields


@patient
@given(ANY_MESSAGE)
def test_every_message_is_heard_as_it_was_said(message: m.Message) -> None:
    assert m.decode(m.encode(message)) == message


def test_every_kind_of_message_is_known_by_its_name() -> None:
    assert len(m.REGISTRY) == len(KINDS) > 25
    for kind in KINDS:
        assert m.REGISTRY[kind.__name__.upper()] is kind
        assert m.decode(m.encode(sample(kind))) == sample(kind)


@patient
@given(ANY_MESSAGE, st.data())
def test_damaged_bytes_are_refused_or_are_a_message_again(message: m.Message, data: st.DataObject) -> None:
    body = bytearray(m.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                body[at] = data.draw(st.integers(0, 255))
            case "cut":
                del body[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                body[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not body:
            break
    try:
        heard = m.decode(bytes(body))
    except RemoteProtocolError:
        return
    assert m.decode(m.encode(heard)) == heard


@patient
@given(st.binary(max_size=200) | ANYTHING.map(msgpack.packb))
def test_arbitrary_bytes_are_no_message(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode(body)


@patient
@given(st.sampled_from(KINDS), st.data())
def test_a_field_of_the_wrong_kind_is_named(kind: type[m.Message], data: st.DataObject) -> None:
    named = sorted(name for name, check in checks(kind).items() if not isinstance(check, Reasons))
    if not named:
        return
    fields = fields_of(data.draw(of_kind(kind)))
    name = data.draw(st.sampled_from(named))
    wrong: list[Any] = [None, -1, 1.5, {"a": {}}]
    fields[name] = data.draw(st.sampled_from(wrong))
    with pytest.raises(RemoteProtocolError, match=rf"{kind.name}\.{name}"):
        m.decode(packed(kind.name, fields))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_missing_or_unknown_field_is_named(kind: type[m.Message]) -> None:
    fields = fields_of(sample(kind))
    for name in fields:
        rest = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(RemoteProtocolError, match=f"{kind.name} lacks the field '{name}'"):
            m.decode(packed(kind.name, rest))
    with pytest.raises(RemoteProtocolError, match=f"{kind.name} has an unknown field 'colour'"):
        m.decode(packed(kind.name, fields | {"colour": 1}))


def too_much(check: Check) -> Any:
    """The least that is out of the bounds of a check."""
    match check:
        case Int():
            return check.limit if check.limit < 1 << 64 else None
        case Text():
            return "x" * (check.limit + 1)
        case Bytes():
            return bytes(check.limit + 1)
        case List():
            return [0] * (check.limit + 1)
        case Map():
            return {str(number): 0 for number in range(check.limit + 1)}
        case Reasons():
            return [None] * (check.limit + 1)
    return None


def bounded() -> list[tuple[type[m.Message], str]]:
    return [
        (kind, name) for kind in KINDS for name, check in checks(kind).items() if too_much(check) is not None
    ]


@pytest.mark.parametrize(("kind", "name"), bounded(), ids=lambda value: getattr(value, "name", value))
def test_one_more_than_the_bound_is_refused(kind: type[m.Message], name: str) -> None:
    # A list or map beyond what any message may have is refused before its field is known.
    with pytest.raises(RemoteProtocolError, match=rf"{kind.name}\.{name}|encoding"):
        m.decode(packed(kind.name, fields_of(sample(kind)) | {name: too_much(checks(kind)[name])}))


def test_a_wrong_value_deep_in_a_manifest_is_named_by_its_path() -> None:
    device = {**fields_of_struct(m.DeviceEntry), "versions": [1, 1 << 32]}
    fields = fields_of(sample(m.Manifest)) | {"devices": [fields_of_struct(m.DeviceEntry), device]}
    with pytest.raises(RemoteProtocolError, match=r"MANIFEST\.devices\[1\]\.versions\[1\] is not an integer"):
        m.decode(packed("MANIFEST", fields))


def fields_of_struct(kind: type[Any]) -> dict[str, Any]:
    return {name: getattr(sample(kind), name) for name in checks(kind)}


@pytest.mark.parametrize("extent", [[], [0], [0, 1, 2], 7])
def test_an_extent_is_exactly_an_address_and_a_length(extent: object) -> None:
    with pytest.raises(RemoteProtocolError, match=r"START\.extents\[0\] is not a list of 2"):
        m.decode(packed("START", {"connections": 1, "extents": [extent]}))


def test_an_odd_reason_is_shown_and_never_a_breach() -> None:
    heard = m.decode(packed("REFUSE", {"reasons": [7, {"device": 1, "reason": "x" * 9000}]}))
    assert isinstance(heard, m.Refuse)
    assert [reason.reason for reason in heard.reasons] == [
        "the peer gave a reason that cannot be read",
        "x" * 2000,
    ]
    assert heard.reasons[1] == Reason(None, "", "x" * 2000, "")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        packed("HELLO", {}) + b"\x00",
        packed("hello", {}),
        packed(7, {}),
        bytes(msgpack.packb(["PING"])),
        bytes(msgpack.packb({"PING": {"n": 1}})),
        bytes(msgpack.packb(["PING", {b"n": 1}])),
        bytes(msgpack.packb(["PING", {"n": msgpack.ExtType(4, b"")}])),
        bytes(msgpack.packb(["PING", {"n": msgpack.Timestamp(1)}])),
        b"\x92\xa4PING\x81\xa1n\xa2\xff\xfe",
        b"\x91" * 5000,
    ],
    ids=lambda body: body[:12].hex() or "nothing",
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode(body)


@pytest.mark.parametrize(
    "claim",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"],
)
def test_a_length_that_is_only_claimed_is_not_allocated(claim: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode(b"\x92\xa5HELLO" + claim)


def items(check: Check) -> int:
    """Lists, maps and entries of these in the largest value that a check lets through."""
    match check:
        case List():
            return 1 + check.limit * (1 + items(check.item))
        case Map():
            return 1 + check.limit * (1 + items(check.item))
        case Struct():
            return items_of(check.kind)
        case Reasons():
            return 1 + check.limit * (1 + 1 + 4)
    return 0


def items_of(kind: type[Any]) -> int:
    return 1 + sum(1 + items(check) for check in checks(kind).values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_largest_legal_message_is_not_taken_for_a_bomb(kind: type[m.Message]) -> None:
    assert 1 + 2 + items_of(kind) <= m.MAX_ITEMS


def test_a_frame_full_of_tiny_maps_costs_no_memory() -> None:
    size = frames.MAX_CONTROL - 64
    nested = b"\xdc\x10\x00" + b"\x80" * 4096
    count = min(4096, size // len(nested))
    body = b"\x92\xa5HELLO\xdc" + count.to_bytes(2, "big") + nested * count
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="encoding"):
            m.decode(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20  # unbounded, this frame makes more than 1 GiB of dicts
