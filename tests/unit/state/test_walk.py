"""The walk explains every byte of a blob once, says what `blob.read` says, and goes as far as damage lets it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schema_strategies import STRUCTS, states

from migrate.state import SchemaVersion, catalog
from migrate.state.blob import Blob, pack, read, unpack, write
from migrate.state.kinds import Struct
from migrate.state.walk import MAX_DEPTH, Part, walk

GOLDEN = Path(__file__).parents[2] / "golden"
BLOBS = sorted(GOLDEN.glob("*.blob"))


def parts_of(data: bytes, version: SchemaVersion | None = None) -> list[Part]:
    """All parts; they cover the data without gap or overlap, whatever it is."""
    parts = list(walk(data, version))
    at = 0
    for part in parts:
        assert part.offset == at, (part, at)
        at += part.length
    assert at == len(data)
    return parts


def values_of(parts: list[Part]) -> object:
    """The state again, from the parts of its values."""
    stack: list[object] = []
    root: object = None
    pending: list[tuple[object, int]] = []
    name = ""

    def put(value: object) -> None:
        nonlocal root
        if not pending:
            root = value
            return
        into, left = pending[-1]
        if isinstance(into, dict):
            into[name] = value
        else:
            assert isinstance(into, list)
            into.append(value)
        pending[-1] = (into, left - 1)

    for part in parts:
        if part.what == "name":
            name = str(part.value)
        elif part.what in ("map", "list"):
            made: object = {} if part.what == "map" else []
            put(made)
            assert isinstance(part.value, int)
            pending.append((made, part.value))
        elif part.is_value:
            put(bytes(part.value) if part.what == "bytes" else part.value)  # type: ignore[call-overload]
        while pending and pending[-1][1] == 0:
            pending.pop()
    assert not stack
    return root


@pytest.mark.parametrize("path", BLOBS, ids=lambda path: path.stem)
def test_every_byte_of_a_golden_blob_has_one_meaning_and_the_values_are_those_that_a_device_loads(
    path: Path,
) -> None:
    data = path.read_bytes()
    schema = catalog.load(unpack(data).type)
    version, values = read(data, schema)
    for known in (version, None):
        parts = parts_of(data, known)
        assert values_of(parts) == values
        assert [part for part in parts if part.what == "damage"] == []
        assert parts[-1].doc.endswith(": right")
    docs = {
        part.path.strip("."): part.doc
        for part in parts_of(data, version)
        if part.is_value and "." not in part.path[1:]
    }
    for field in version.fields:
        if field.name in docs:
            assert docs[field.name] == field.doc


@given(data=st.data())
@settings(max_examples=60)
def test_every_byte_of_any_state_of_any_schema_has_one_meaning(data: st.DataObject) -> None:
    struct: Struct = data.draw(STRUCTS)
    version = SchemaVersion("made", 1, struct)
    values = data.draw(states(struct))
    written = write(version, "made0", values)
    parts = parts_of(written, version)
    assert values_of(parts) == version.decode(unpack(written).payload)


@pytest.mark.parametrize("path", BLOBS, ids=lambda path: path.stem)
def test_a_blob_that_was_cut_off_is_shown_up_to_there_wherever_that_is(path: Path) -> None:
    data = path.read_bytes()
    whole = [part for part in parts_of(data) if part.is_value]
    for size in range(len(data)):
        parts = parts_of(data[:size])
        assert parts[-1].what == "damage", size
        assert parts[-1].value
        shown = [part for part in parts if part.is_value]
        assert [part.path for part in shown] == [part.path for part in whole[: len(shown)]]
        ends = [part.offset + part.length for part in whole if part.offset + part.length <= size]
        assert len(shown) == len(ends), "all that is there is shown"


@given(where=st.integers(0, 10**6), byte=st.integers(0, 255), path=st.sampled_from(BLOBS))
@settings(max_examples=300)
def test_one_wrong_byte_never_leaves_a_gap_and_never_raises(where: int, byte: int, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[where % len(data)] = byte
    parts_of(bytes(data))


def test_what_follows_a_blob_or_its_state_is_said_to_belong_to_nothing() -> None:
    data = BLOBS[0].read_bytes()
    assert parts_of(data + b"more")[-1].value == "bytes that belong to no blob follow"
    made = unpack(data)
    longer = pack(Blob(made.type, made.instance, made.version, made.digest, made.payload + b"\x01\x02"))
    [damage] = [part for part in parts_of(longer) if part.what == "damage"]
    assert (damage.length, damage.value) == (2, "bytes that belong to no value follow the state")


def test_a_wrong_checksum_is_shown_with_the_right_one() -> None:
    data = BLOBS[0].read_bytes()
    last = parts_of(data[:-4] + b"\0\0\0\0")[-1]
    assert "WRONG, it is 0x" in last.doc
    assert f"{int.from_bytes(data[-4:], 'big'):#010x}" in last.doc


def test_lists_in_lists_without_end_are_stopped() -> None:
    made = unpack(BLOBS[0].read_bytes())
    deep = pack(Blob(made.type, made.instance, made.version, made.digest, b"\x91" * 5000 + b"\x01"))
    [damage] = [part for part in parts_of(deep) if part.what == "damage"]
    assert f"more than {MAX_DEPTH}" in str(damage.value)


def test_a_list_that_claims_4_gi_items_costs_nothing() -> None:
    made = unpack(BLOBS[0].read_bytes())
    claims = pack(Blob(made.type, made.instance, made.version, made.digest, b"\xdd\xff\xff\xff\xff\x01\x02"))
    before = sys.getallocatedblocks()
    parts = parts_of(claims)
    assert sys.getallocatedblocks() - before < 1000
    assert [part.value for part in parts if part.what == "integer"] == [1, 2]
    assert [part.value for part in parts if part.what == "damage"] == ["a value is missing"]


@pytest.mark.parametrize("data", [b"", b"QEVM", b"\x89VMFB\r\n\x1b" + bytes(60), bytes(100)])
def test_what_is_no_blob_is_said_to_be_none(data: bytes) -> None:
    [part] = parts_of(data)
    assert (part.what, part.value) == ("damage", "this is no vmferry state blob")
