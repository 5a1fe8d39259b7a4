"""The canonical encoding: one sequence of bytes a state, all others refused by their path, hostile ones cheaply."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schema_strategies import STRUCTS, spoilt, states

from migrate.errors import BlobError
from migrate.state import SchemaVersion, catalog
from migrate.state.kinds import Bytes, Field, Int, Kind, List, Str, Struct
from migrate.state.parse import parse

ALL = [catalog.load(name).at(number) for name in catalog.types() for number in catalog.load(name).versions]

MANY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

MIXED = parse(
    """
    type = "mixed"
    version = 1
    [[field]]
    name = "count"
    type = "u8"
    max = 9
    [[field]]
    name = "wide"
    type = "u64"
    [[field]]
    name = "delta"
    type = "i64"
    [[field]]
    name = "on"
    type = "bool"
    [[field]]
    name = "mode"
    type = "enum"
    values = ["off", "slow", "fast"]
    [[field]]
    name = "label"
    type = "str<=8"
    [[field]]
    name = "fifo"
    type = "bytes<=4"
    [[field]]
    name = "key"
    type = "bytes[2]"
    [[field]]
    name = "queues"
    type = "list<=3"
    [field.item]
    type = "struct"
    fields = [{ name = "head", type = "u16" }, { name = "ring", type = "list[2]", item = { type = "i8" } }]
    [[subsection]]
    name = "extra"
    [[subsection.field]]
    name = "left"
    type = "u8"
    """,
    "mixed.toml",
).at(1)


def with_field(kind: Kind) -> SchemaVersion:
    return SchemaVersion("one", 1, Struct((Field("v", kind, kind.default()),)))


def by_the_specification(value: Any) -> bytes:
    """A MessagePack encoder written from the specification alone, always choosing the shortest form."""

    def head(size: int, forms: list[tuple[int, int, str]], fix: tuple[int, int] | None) -> bytes:
        if fix and size < fix[1]:
            return bytes([fix[0] | size])
        for limit, tag, code in forms:
            if size < limit:
                return bytes([tag]) + struct.pack(">" + code, size)
        raise AssertionError(size)

    match value:
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int() if value >= 0:
            return head(
                value,
                [(2**8, 0xCC, "B"), (2**16, 0xCD, "H"), (2**32, 0xCE, "I"), (2**64, 0xCF, "Q")],
                (0x00, 128),
            )
        case int():
            if value >= -32:
                return struct.pack(">b", value)
            for bits, tag, code in ((8, 0xD0, "b"), (16, 0xD1, "h"), (32, 0xD2, "i"), (64, 0xD3, "q")):
                if value >= -(2 ** (bits - 1)):
                    return bytes([tag]) + struct.pack(">" + code, value)
        case bytes():
            return head(len(value), [(2**8, 0xC4, "B"), (2**16, 0xC5, "H"), (2**32, 0xC6, "I")], None) + value
        case str():
            raw = value.encode()
            return (
                head(len(raw), [(2**8, 0xD9, "B"), (2**16, 0xDA, "H"), (2**32, 0xDB, "I")], (0xA0, 32)) + raw
            )
        case list():
            body = b"".join(map(by_the_specification, value))
            return head(len(value), [(2**16, 0xDC, "H"), (2**32, 0xDD, "I")], (0x90, 16)) + body
        case dict():
            body = b"".join(by_the_specification(part) for pair in value.items() for part in pair)
            return head(len(value), [(2**16, 0xDE, "H"), (2**32, 0xDF, "I")], (0x80, 16)) + body
    raise AssertionError(value)


def ordered(kind: Kind, value: Any) -> Any:
    """A state with its fields in schema order: what the specification's encoder has to be given."""
    match kind:
        case Struct():
            return {
                entry.name: ordered(entry.kind, value[entry.name])
                for entry in kind.fields
                if entry.name in value
            }
        case List():
            return [ordered(kind.item, item) for item in value]
    return value


# -- what fits ------------------------------------------------------------------------------------------------------------


@MANY
@given(st.data())
def test_any_state_of_any_schema_comes_back_and_is_the_specifications_bytes(data: st.DataObject) -> None:
    version = SchemaVersion("any", 1, data.draw(STRUCTS))
    state = data.draw(states(version.struct))
    encoded = version.encode(state)
    assert version.decode(encoded) == state
    assert encoded == by_the_specification(ordered(version.struct, state))
    assert len(encoded) <= version.max_size


@MANY
@given(st.data())
@pytest.mark.parametrize("version", ALL, ids=repr)
def test_any_state_of_the_devices_comes_back(version: SchemaVersion, data: st.DataObject) -> None:
    state = data.draw(states(version.struct))
    assert version.decode(version.encode(state)) == state


@pytest.mark.parametrize("size", [0, 1, 15, 16, 31, 32, 255, 256, 65535, 65536])
def test_the_form_of_a_head_changes_where_the_specification_says(size: int) -> None:
    cases: list[tuple[Kind, object]] = [
        (Bytes(0, size), bytes(size)),
        (Str(size), "x" * size),
        (List(0, size, Int("u8", 0, 255)), [255] * size),
    ]
    for kind, value in cases:
        version = with_field(kind)
        encoded = version.encode({"v": value})
        assert encoded == by_the_specification({"v": value})
        assert version.decode(encoded) == {"v": value}
        assert len(encoded) == version.max_size


@pytest.mark.parametrize(
    "edge", [0, 127, 128, 255, 256, 2**16 - 1, 2**16, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
)
def test_u64_has_its_full_range(edge: int) -> None:
    version = with_field(Int("u64", 0, 2**64 - 1))
    assert version.decode(version.encode({"v": edge})) == {"v": edge}
    assert version.encode({"v": edge}) == by_the_specification({"v": edge})


def test_the_largest_state_has_exactly_max_size_bytes() -> None:
    largest = {
        "count": 9,
        "wide": 2**64 - 1,
        "delta": -(2**63),
        "on": True,
        "mode": "fast",
        "label": "12345678",
        "fifo": b"1234",
        "key": b"12",
        "queues": [{"head": 65535, "ring": [-128, -128]}] * 3,
        "extra": {"left": 255},
    }
    assert len(MIXED.encode(largest)) == MIXED.max_size


def test_the_order_in_which_a_device_saves_its_fields_does_not_matter() -> None:
    state = MIXED.defaults()
    assert MIXED.encode(dict(reversed(state.items()))) == MIXED.encode(state)


def test_a_subsection_that_is_not_needed_is_not_sent() -> None:
    state = MIXED.defaults()
    assert "extra" not in MIXED.decode(MIXED.encode(state))
    assert MIXED.encode(state | {"extra": None}) == MIXED.encode(state)
    needed = state | {"extra": {"left": 3}}
    assert MIXED.decode(MIXED.encode(needed)) == needed


def test_other_forms_of_bytes_and_lists_are_written_as_the_plain_ones() -> None:
    state = MIXED.defaults()
    odd = state | {
        "fifo": bytearray(b"ab"),
        "key": memoryview(b"cd"),
        "queues": ({"head": 1, "ring": (2, 3)},),
    }
    plain = state | {"fifo": b"ab", "key": b"cd", "queues": [{"head": 1, "ring": [2, 3]}]}
    assert MIXED.encode(odd) == MIXED.encode(plain)


def test_defaults_are_a_new_state_every_time() -> None:
    first = MIXED.defaults()
    first["queues"].append(1)  # type: ignore[attr-defined]
    assert MIXED.defaults()["queues"] == []


# -- what does not ----------------------------------------------------------------------------------------------------------


@MANY
@given(st.data())
def test_whatever_does_not_fit_is_refused_by_its_path_both_ways(data: st.DataObject) -> None:
    version = SchemaVersion("any", 1, data.draw(STRUCTS))
    path, wrong = data.draw(spoilt(version.struct, data.draw(states(version.struct))))
    with pytest.raises(BlobError) as caught:
        version.encode(wrong)
    # A misfit that is itself a map or a list may be wrong further inside; never elsewhere.
    assert caught.value.reason.startswith(path)
    try:
        raw = msgpack.packb(wrong)
    except (OverflowError, ValueError, UnicodeEncodeError):
        return  # MessagePack has no such value: it cannot arrive
    with pytest.raises(BlobError):
        version.decode(raw)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("count", 10, [".count", "is 10", "0..9"]),
        ("count", True, [".count", "is true", "0..9"]),
        ("count", None, [".count", "is nothing", "0..9"]),
        ("wide", -1, [".wide", "is -1", "0..18446744073709551615"]),
        ("wide", 1 << 64, [".wide", "an integer of 65 bits"]),
        ("on", 1, [".on", "is 1", "true or false"]),
        ("mode", "warp", [".mode", "'warp'", "off, slow, fast"]),
        ("label", "ééééé", [".label", "10 bytes", "8"]),
        ("fifo", b"12345", [".fifo", "5 bytes", "0..4"]),
        ("key", b"1", [".key", "1 bytes", "not 2"]),
        ("queues", [{"head": 1, "ring": [0, 200]}], [".queues[0].ring[1]", "is 200", "-128..127"]),
        ("queues", [{"head": 1, "ring": [0, 0]}, {"head": 1}], [".queues[1].ring", "missing"]),
        ("queues", [{"head": 1, "ring": [0, 0], "tail": 2}], [".queues[0].tail", "not in the schema"]),
        ("queues", [3, 4, 5, 6], [".queues", "4 items", "0..3"]),
        ("extra", {"left": 256}, [".extra.left", "is 256", "0..255"]),
    ],
)
def test_a_refusal_names_path_value_and_bound(field: str, value: object, words: list[str]) -> None:
    with pytest.raises(BlobError) as caught:
        MIXED.encode(MIXED.defaults() | {field: value})
    for word in (*words, "mixed version 1"):
        assert word in caught.value.reason
    if value != 1 << 64:
        with pytest.raises(BlobError) as caught:
            MIXED.decode(msgpack.packb(MIXED.defaults() | {field: value}))
        for word in words:
            assert word in caught.value.reason
        assert caught.value.remedy


def test_no_guest_data_gets_into_a_refusal() -> None:
    for field, value in [
        ("fifo", b"SECRET"),
        ("label", "SECRET, long"),
        ("key", "SECRET"),
        ("count", "SECRET"),
    ]:
        with pytest.raises(BlobError) as caught:
            MIXED.encode(MIXED.defaults() | {field: value})
        assert "SECRET" not in str(caught.value)
        assert len(str(caught.value)) < 400


def damaged(version: SchemaVersion, state: dict[str, object], old: bytes, new: bytes) -> str:
    data = version.encode(state)
    assert data.count(old) == 1
    with pytest.raises(BlobError) as caught:
        version.decode(data.replace(old, new))
    return caught.value.reason


def test_a_field_given_twice_is_refused_by_its_path() -> None:
    state = with_two().defaults()
    assert ".b is given twice" in damaged(
        with_two(), state, b"\x82\xa1a\x00\xa1b\x00", b"\x83\xa1a\x00\xa1b\x01\xa1b\x00"
    )
    # The first one need not even be of the field's kind: msgpack drops it.
    assert ".a is given twice" in damaged(with_two(), state, b"\x82\xa1a\x00", b"\x83\xa1a\x91\xc0\xa1a\x00")


def test_fields_out_of_order_are_refused_by_their_path() -> None:
    assert ".a is out of order" in damaged(
        with_two(), with_two().defaults(), b"\xa1a\x00\xa1b\x00", b"\xa1b\x00\xa1a\x00"
    )


def test_order_and_doubles_are_found_inside_lists_of_structs_too() -> None:
    state = MIXED.defaults() | {"queues": [{"head": 1, "ring": [0, 0]}]}
    old = b"\x82\xa4head\x01\xa4ring\x92\x00\x00"
    assert ".queues[0].head is out of order" in damaged(
        MIXED, state, old, b"\x82\xa4ring\x92\x00\x00\xa4head\x01"
    )
    assert ".queues[0].head is given twice" in damaged(
        MIXED, state, old, b"\x83\xa4head\x01\xa4head" + old[6:]
    )


def test_an_integer_or_length_that_is_longer_than_needed_is_refused_by_its_offset() -> None:
    two = with_two()
    for old, new, offset in [
        (b"\xa1b\x00", b"\xa1b\xcc\x00", 6),
        (b"\xa1b\x00", b"\xa1b\xd0\x00", 6),
        (b"\xa1b\x00", b"\xd9\x01b\x00", 4),
        (b"\x82\xa1a", b"\xde\x00\x02\xa1a", 0),
    ]:
        assert f"not in its shortest form at byte {offset}" in damaged(two, two.defaults(), old, new)


def with_two() -> SchemaVersion:
    kind = Int("u32", 0, 2**32 - 1)
    return SchemaVersion("two", 1, Struct((Field("a", kind, 0), Field("b", kind, 0))))


# -- hostile bytes ----------------------------------------------------------------------------------------------------------


def judge(version: SchemaVersion, data: bytes) -> None:
    """The invariant: a BlobError, or a state whose only encoding these bytes are."""
    try:
        state = version.decode(data)
    except BlobError:
        return
    assert version.encode(state) == data


@MANY
@given(st.data())
@pytest.mark.parametrize("version", [MIXED, *ALL], ids=repr)
def test_mutated_bytes_are_refused_or_canonical(version: SchemaVersion, data: st.DataObject) -> None:
    mutant = bytearray(version.encode(data.draw(states(version.struct))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutant)))
        end = data.draw(st.integers(at, min(len(mutant), at + 8)))
        inserted = data.draw(st.binary(max_size=9) | st.just(bytes(mutant[at:end]) * 2))
        mutant[at:end] = inserted
    judge(version, bytes(mutant))


_JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=9)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["count", "wide", "queues", "head", "ring", "extra"]) | st.integers(-9, 9),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@MANY
@given(st.binary(max_size=200) | _JUNK.map(msgpack.packb))
def test_anything_at_all_is_refused_or_canonical(data: bytes) -> None:
    judge(MIXED, data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\x81" * 20,
        b"\x91" * 20,
        b"\x81\xa5count\xd4\x05\x00",
        b"\x81\xa5count\xd6\xff\x00\x00\x00\x00",
        b"\x81\xa2\xff\xfe\x00",
        b"\x81\x01\x00",
        b"\x81\xc0\x00",
        b"\x81\x90\x00",
        b"\x81\xa5count\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    ],
)
def test_what_msgpack_stumbles_over_is_a_blob_error(data: bytes) -> None:
    with pytest.raises(BlobError, match="mixed version 1"):
        MIXED.decode(data)


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(BlobError):
        MIXED.decode(MIXED.encode(MIXED.defaults()) + b"\x00")


def test_more_bytes_than_any_state_has_are_refused_unread() -> None:
    with pytest.raises(BlobError, match=f"{MIXED.max_size} is the most"):
        MIXED.decode(bytes(MIXED.max_size + 1))


def peak_of_refusing(version: SchemaVersion, data: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(BlobError):
            version.decode(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_sixteen_mebibytes_of_empty_lists_cost_no_memory() -> None:
    version = with_field(Bytes(0, (16 << 20) - 16))
    item = b"\xdc\x00\x40" + b"\x90" * 64  # within the limits on one list
    data = (b"\x81\xa1v\xdc\x00\x40" + item * (1 << 18))[: version.max_size]
    assert len(data) == version.max_size
    assert peak_of_refusing(version, data) < 1 << 20
    deep = b"\x81\xa1v" + (b"\x9f" + b"\x90" * 14) * (1 << 20)
    assert peak_of_refusing(version, deep[: version.max_size]) < 1 << 20


def test_heads_that_claim_long_lists_inside_each_other_cost_no_memory() -> None:
    version = with_field(Bytes(0, 1 << 20))
    claims = b"\x81\xa1v" + b"\xdd\x00\x0f\xff\xff" * 300
    assert peak_of_refusing(version, claims + bytes((1 << 20) - len(claims))) < 1 << 20
    longest = with_field(List(0, 16_384, Int("u64", 0, 2**64 - 1)))
    assert peak_of_refusing(longest, b"\x81\xa1v" + b"\xdc\x40\x00" * 300) < 4 << 20


def test_msgpack_without_its_c_extension_is_no_weaker() -> None:
    """Where no binary wheel is to be had, msgpack falls back to Python, which has no depth limit of its own."""
    program = """
import msgpack
from migrate.errors import BlobError
from migrate.state import catalog
assert msgpack.Packer.__module__ == "msgpack.fallback"
schema = catalog.load("vcpu")
version = schema.at(1)
assert version.decode(version.encode(version.defaults())) == version.defaults()
hostile = [b"\\x91" * 618, b"\\x81\\xa1a" * 200, b"\\x81\\x90\\x00", b"\\xc1"]
hostile += [b"\\xdd\\xff\\xff\\xff\\xff", b"\\x81\\xa1\\xff\\x00"]
for data in hostile:
    try:
        version.decode(data)
    except BlobError:
        continue
    raise AssertionError(data)
"""
    environment = {**os.environ, "MSGPACK_PUREPYTHON": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
