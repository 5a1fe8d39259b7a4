"""The envelope: its bytes as documented, every damage noticed, nothing believed before it is checked."""

from __future__ import annotations

import re
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import BlobError
from migrate.state import Blob, blob, catalog
from migrate.state.blob import MAGIC, MAX_BLOB, header_of, pack, read, unpack, write
from migrate.state.schema import MAX_PAYLOAD

ROOT = Path(__file__).parents[3]
SAMPLE = Blob("uart16550", "uart0", 2, bytes(range(32)), b"\x81\xa1a\x01")

_ROW = re.compile(r"^\|\s*([0-9+TIP]+)\s*\|\s*([0-9TIP]+)\s*\|\s*(.+?)\s*\|$", re.MULTILINE)


def table(text: str) -> list[tuple[str, str, str]]:
    return _ROW.findall(text)


def place(term: str, at: dict[str, int]) -> int:
    return sum(at[part] if part in at else int(part) for part in term.split("+"))


def resealed(data: bytes) -> bytes:
    """With the checksum that fits: for damage that is meant."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "big")


# -- the layout ---------------------------------------------------------------------------------------------------------------


def test_the_table_in_the_documentation_is_the_table_in_the_module() -> None:
    documented = table((ROOT / "docs" / "state.md").read_text())
    assert len(documented) == 12
    assert documented == table(blob.__doc__ or "")


@given(
    st.from_regex(r"[a-z][a-z0-9_-]{0,63}", fullmatch=True),
    st.text("abcöß0-9 .", min_size=1, max_size=80),
    st.integers(1, 2**32 - 1),
    st.binary(min_size=32, max_size=32),
    st.binary(max_size=300),
)
def test_every_byte_of_a_blob_is_where_the_table_says(
    kind: str, instance: str, version: int, digest: bytes, payload: bytes
) -> None:
    data = pack(Blob(kind, instance, version, digest, payload))
    sizes = {"T": len(kind), "I": len(instance.encode()), "P": len(payload)}
    expected = {
        "magic": bytes.fromhex("89 56 4D 46 42 0D 0A 1A"),
        "version of the envelope": (1).to_bytes(2, "big"),
        "T, bytes": sizes["T"].to_bytes(1, "big"),
        "I, bytes": sizes["I"].to_bytes(1, "big"),
        "schema version": version.to_bytes(4, "big"),
        "schema digest": digest,
        "P, bytes": sizes["P"].to_bytes(4, "big"),
        "reserved": bytes(4),
        "device type": kind.encode(),
        "instance": instance.encode(),
        "payload": payload,
        "CRC-32": zlib.crc32(data[:-4]).to_bytes(4, "big"),
    }
    end = 0
    for offset, size, what in table(blob.__doc__ or ""):
        assert place(offset, sizes) == end, what
        end += place(size, sizes)
        (meant,) = [value for words, value in expected.items() if what.startswith(words)]
        assert data[place(offset, sizes) : end] == meant, what
    assert end == len(data)
    assert unpack(data) == Blob(kind, instance, version, digest, payload)


# -- damage -----------------------------------------------------------------------------------------------------------------


def test_every_single_bit_of_a_blob_matters() -> None:
    data = pack(SAMPLE)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlobError):
            unpack(bytes(damaged))


def test_a_blob_cut_off_anywhere_says_after_how_many_bytes() -> None:
    data = pack(SAMPLE)
    for size in range(len(data)):
        with pytest.raises(BlobError, match=f"ends after {size} bytes"):
            unpack(data[:size])


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(BlobError, match="its header says"):
        unpack(pack(SAMPLE) + b"\0")


@given(st.binary(max_size=400), st.booleans(), st.booleans())
def test_anything_at_all_is_a_blob_or_a_blob_error(data: bytes, magic: bool, seal: bool) -> None:
    data = MAGIC + data if magic else data
    data = resealed(data) if seal and len(data) > 4 else data
    try:
        found = unpack(data)
    except BlobError:
        return
    assert pack(found) == data


@given(st.data())
def test_a_changed_header_with_its_checksum_made_right_is_refused_or_means_what_it_says(
    data: st.DataObject,
) -> None:
    mutant = bytearray(pack(SAMPLE))
    for _ in range(data.draw(st.integers(1, 3))):
        mutant[data.draw(st.integers(8, len(mutant) - 5))] = data.draw(st.integers(0, 255))
    changed = resealed(bytes(mutant))
    try:
        found = unpack(changed)
    except BlobError:
        return
    assert pack(found) == changed


def test_a_claimed_payload_of_four_gibibytes_costs_nothing() -> None:
    data = bytearray(pack(SAMPLE))
    data[48:52] = b"\xff\xff\xff\xff"
    tracemalloc.start()
    with pytest.raises(BlobError, match="claims a payload of 4294967295 bytes"):
        unpack(bytes(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16


def test_a_blob_of_the_largest_size_is_read_and_a_larger_one_not_written() -> None:
    full = replace(SAMPLE, type="t" * 64, instance="i" * 255, payload=bytes(MAX_PAYLOAD))
    data = pack(full)
    assert len(data) == MAX_BLOB
    assert unpack(data) == full
    with pytest.raises(BlobError, match="over 16777216"):
        pack(replace(SAMPLE, payload=bytes(MAX_PAYLOAD + 1)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": ""},
        {"type": "../etc"},
        {"type": "Üart"},
        {"type": "t" * 65},
        {"instance": ""},
        {"instance": "i" * 256},
        {"instance": "ü" * 128},
        {"instance": "uart0\x1b[2J"},
        {"instance": "uart\u202e0"},
        {"instance": "\ud800"},
        {"version": 0},
        {"version": 2**32},
        {"digest": b"short"},
    ],
)
def test_what_does_not_fit_its_place_is_not_written(wrong: dict[str, object]) -> None:
    with pytest.raises(BlobError):
        pack(replace(SAMPLE, **wrong))  # type: ignore[arg-type]


def test_an_id_that_would_write_to_a_terminal_is_refused_when_read_too() -> None:
    data = pack(SAMPLE).replace(b"uart0", b"\x1b[2Jx")
    with pytest.raises(BlobError, match="not printable") as caught:
        unpack(resealed(data))
    assert "\x1b" not in str(caught.value)


def test_a_later_envelope_is_refused_by_what_it_holds() -> None:
    data = bytearray(pack(SAMPLE))
    data[8:10] = b"\x00\x02"
    with pytest.raises(BlobError) as caught:
        unpack(resealed(bytes(data)))
    assert "uart16550, schema version 2" in caught.value.reason
    assert caught.value.device == "uart0"
    assert "newer" in caught.value.remedy


def test_a_header_is_read_without_its_payload_and_says_how_long_the_blob_is() -> None:
    data = pack(SAMPLE)
    header = header_of(data[: 56 + 9 + 5])
    assert (header.type, header.instance, header.version) == ("uart16550", "uart0", 2)
    assert header.size == len(data)
    assert data[header.payload_at : header.payload_at + header.payload_size] == SAMPLE.payload
    # As it stands inside a longer stream, QEMU's zero padding after it:
    stream = b"junk" + data + bytes(9)
    start = stream.index(MAGIC)
    assert unpack(stream[start : start + header_of(stream[start:]).size]) == SAMPLE


# -- with a schema ----------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_with_the_version_it_was_written_in() -> None:
    schema = catalog.load("uart16550")
    for number in schema.versions:
        state = schema.at(number).defaults() | {"rx_fifo": b"abc"}
        version, found = read(write(schema.at(number), "uart0", state), schema)
        assert version is schema.at(number)
        assert found == state


def test_a_blob_of_another_type_version_or_definition_is_refused_by_name() -> None:
    uart, rtc = catalog.load("uart16550"), catalog.load("rtc")
    with pytest.raises(BlobError, match="state of a rtc, not of a uart16550"):
        read(write(rtc.at(1), "rtc0", rtc.at(1).defaults()), uart)
    good = unpack(write(uart.at(2), "uart0", uart.at(2).defaults()))
    with pytest.raises(BlobError, match="version 4; known here: 1, 2, 3"):
        read(pack(replace(good, version=4)), uart)
    with pytest.raises(BlobError, match="defined otherwise"):
        read(pack(replace(good, digest=bytes(32))), uart)
    with pytest.raises(BlobError) as caught:
        read(pack(replace(good, payload=b"\x80")), uart)
    assert caught.value.device == "uart0"
    assert caught.value.reason.startswith(".ier is missing")
