"""Frames: what is cut here is put together there, and damage of any kind is a RemoteProtocolError, before anything is allocated."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrate.errors import LocalProtocolError, RemoteProtocolError
from migrate.protocol import frames
from migrate.protocol.frames import LIMITS, Header, Kind

#: On a loaded machine a single example may take as long as it likes.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

PAGE = 4096

HEADERS = st.sampled_from(Kind).flatmap(
    lambda kind: st.builds(
        Header,
        st.just(kind),
        st.integers(0, LIMITS[kind]) | st.just(LIMITS[kind]),
        st.booleans() if kind is not Kind.CONTROL else st.just(False),
    )
)
TABLE_KINDS = st.sampled_from([Kind.PAGES, Kind.ZERO])


@st.composite
def tables(draw: st.DrawFn) -> tuple[Kind, int, NDArray[np.uint64], NDArray[np.uint64], bool]:
    kind = draw(TABLE_KINDS)
    count = draw(st.integers(0, 20))
    gpas = draw(st.lists(st.integers(0, 1 << 40), min_size=count, max_size=count))
    most = frames.MAX_PAGE_BYTES // PAGE // max(count, 1) if kind is Kind.PAGES else 1 << 30
    sizes = draw(st.lists(st.integers(1, most), min_size=count, max_size=count))
    return (
        kind,
        draw(st.integers(0, (1 << 32) - 1)),
        np.array(gpas, np.uint64) * np.uint64(PAGE),
        np.array(sizes, np.uint64) * np.uint64(PAGE),
        draw(st.booleans()),
    )


def read_table(frame: bytes) -> tuple[Header, frames.TableHead, Any]:
    """As a receiver does it, step by step."""
    header = frames.decode_header(frame[: frames.HEADER_SIZE])
    at = frames.HEADER_SIZE + frames.TABLE_HEAD.size
    head = frames.decode_table_head(header, frame[frames.HEADER_SIZE : at])
    return header, head, frames.decode_table(header, head, frame[at : at + head.table_bytes])


def header_of(kind: int, length: int, flags: int = 0, zero: int = 0, magic: bytes = b"VMF1") -> bytes:
    head = struct.pack(">4sBBHI", magic, kind, flags, zero, length)
    return head + struct.pack(">I", zlib.crc32(head))


def table_frame(kind: Kind, rows: list[tuple[int, int]], data: int, *, runs: int | None = None) -> bytes:
    """A frame with right checksums, whatever nonsense it says."""
    raw = b"".join(struct.pack(">QQ", gpa, size) for gpa, size in rows)
    start = struct.pack(">II", 1, len(rows) if runs is None else runs)
    head = start + struct.pack(">I", zlib.crc32(raw, zlib.crc32(start)))
    return header_of(kind, len(head) + len(raw) + data) + head + raw


# -- headers -----------------------------------------------------------------------------------------------------------


@patient
@given(HEADERS)
def test_a_header_is_read_as_it_was_written(header: Header) -> None:
    raw = frames.encode_header(header.kind, header.length, header.digested)
    assert len(raw) == frames.HEADER_SIZE == 16
    assert frames.decode_header(raw) == header


@patient
@given(HEADERS, st.integers(0, 15), st.integers(1, 255))
def test_every_damage_to_a_header_is_seen(header: Header, at: int, flip: int) -> None:
    raw = bytearray(frames.encode_header(header.kind, header.length, header.digested))
    raw[at] ^= flip
    with pytest.raises(RemoteProtocolError):
        frames.decode_header(raw)


@patient
@given(st.binary(min_size=16, max_size=16))
def test_arbitrary_bytes_are_no_header(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        frames.decode_header(raw)


@pytest.mark.parametrize("kind", Kind)
def test_a_length_over_the_limit_is_refused_with_its_size(kind: Kind) -> None:
    assert frames.decode_header(header_of(kind, LIMITS[kind])).length == LIMITS[kind]
    with pytest.raises(
        RemoteProtocolError, match=f"claims {LIMITS[kind] + 1} bytes, over the limit of {LIMITS[kind]}"
    ):
        frames.decode_header(header_of(kind, LIMITS[kind] + 1))


@pytest.mark.parametrize("kind", Kind)
def test_a_claim_of_four_gib_is_refused(kind: Kind) -> None:
    with pytest.raises(RemoteProtocolError, match="claims 4294967295 bytes"):
        frames.decode_header(header_of(kind, (1 << 32) - 1))


@pytest.mark.parametrize("kind", Kind)
def test_we_never_write_a_frame_that_the_peer_must_refuse(kind: Kind) -> None:
    with pytest.raises(LocalProtocolError, match="over the limit"):
        frames.encode_header(kind, LIMITS[kind] + 1)


@pytest.mark.parametrize(
    "raw",
    [
        header_of(0, 0),
        header_of(6, 0),
        header_of(Kind.PAGES, 12, flags=2),
        header_of(Kind.CONTROL, 12, flags=1),
        header_of(Kind.PAGES, 12, zero=1),
        header_of(Kind.PAGES, 12, magic=b"VMF2"),
    ],
    ids=["kind 0", "kind 6", "flag 2", "digested control", "reserved bytes", "another version's magic"],
)
def test_a_header_that_is_whole_and_says_what_is_unknown_is_refused(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        frames.decode_header(raw)


# -- control -----------------------------------------------------------------------------------------------------------


@patient
@given(st.binary(max_size=300))
def test_a_control_body_is_read_as_it_was_written(body: bytes) -> None:
    raw = frames.encode_control(body)
    header = frames.decode_header(raw[:16])
    assert header == Header(Kind.CONTROL, len(raw) - 16)
    assert frames.decode_control(raw[16:]) == body


@patient
@given(st.binary(max_size=100), st.data())
def test_every_damage_to_a_control_body_is_seen(body: bytes, data: st.DataObject) -> None:
    raw = bytearray(frames.encode_control(body)[16:])
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError, match="checksum"):
        frames.decode_control(bytes(raw))


@pytest.mark.parametrize("size", range(4))
def test_a_control_body_too_short_for_its_checksum_is_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match="checksum"):
        frames.decode_control(bytes(size))


# -- run tables --------------------------------------------------------------------------------------------------------


@patient
@given(tables())
def test_a_run_table_is_read_as_it_was_written(
    table: tuple[Kind, int, NDArray[np.uint64], NDArray[np.uint64], bool],
) -> None:
    kind, number, gpas, sizes, digested = table
    frame = frames.encode_table(kind, number, gpas, sizes, digested=digested)
    header, head, read = read_table(frame)
    assert (header.kind, header.digested, head.round_number) == (kind, digested, number)
    assert read["gpa"].tolist() == gpas.tolist()
    assert read["bytes"].tolist() == sizes.tolist()
    data = int(sizes.sum()) if kind is Kind.PAGES else 0
    assert frames.HEADER_SIZE + header.length == len(frame) + data


@patient
@given(tables(), st.data())
def test_every_damage_to_a_run_table_is_seen(
    table: tuple[Kind, int, NDArray[np.uint64], NDArray[np.uint64], bool], data: st.DataObject
) -> None:
    kind, number, gpas, sizes, digested = table
    frame = bytearray(frames.encode_table(kind, number, gpas, sizes, digested=digested))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError):
        read_table(bytes(frame))


@pytest.mark.parametrize("digested", [False, True])
def test_a_mark_says_its_round_and_whether_it_ends_the_last_pass(digested: bool) -> None:
    none = np.empty(0, np.uint64)
    header, head, read = read_table(frames.encode_table(Kind.MARK, 7, none, none, digested=digested))
    assert (header.kind, header.digested, head.round_number, len(read)) == (Kind.MARK, digested, 7, 0)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (table_frame(Kind.PAGES, [(0, PAGE)], PAGE, runs=frames.MAX_RUNS + 1), "claims 4097 runs"),
        (table_frame(Kind.PAGES, [(0, PAGE)], 0, runs=1 << 31), "claims 2147483648 runs"),
        (table_frame(Kind.PAGES, [(0, PAGE)], 0, runs=2), "claims 2 runs"),
        (header_of(Kind.PAGES, 5) + bytes(12), "frame of 5 bytes claims 0 runs"),
        (table_frame(Kind.MARK, [], 0, runs=1), "frame of 12 bytes claims 1 runs"),
        (table_frame(Kind.ZERO, [(0, PAGE)], PAGE), "4096 bytes after its table"),
        (table_frame(Kind.PAGES, [(0, PAGE)], frames.MAX_PAGE_BYTES + PAGE), "8392704 bytes after its table"),
        (table_frame(Kind.PAGES, [(0, PAGE)], 2 * PAGE), "bytes are not those of its table"),
        (table_frame(Kind.PAGES, [(0, 2 * PAGE)], PAGE), "bytes are not those of its table"),
        (table_frame(Kind.PAGES, [(0, PAGE + 1)], PAGE + 1), "whole pages"),
        (table_frame(Kind.PAGES, [(1, PAGE)], PAGE), "whole pages"),
        (table_frame(Kind.ZERO, [(0, 0)], 0), "whole pages"),
        (table_frame(Kind.ZERO, [(0, 1 << 49)], 0), "beyond any guest's memory"),
        (table_frame(Kind.ZERO, [(1 << 53, PAGE)], 0), "beyond any guest's memory"),
        # Two sizes whose sum is the frame's data, modulo 2^64.
        (table_frame(Kind.PAGES, [(0, (1 << 64) - PAGE), (0, 2 * PAGE)], PAGE), "beyond any guest's memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_that_is_whole_and_says_nonsense_is_refused(frame: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        read_table(frame)


def test_a_mark_with_runs_cannot_be_said() -> None:
    with pytest.raises(RemoteProtocolError, match="MARK frame claims 28 bytes, over the limit of 12"):
        read_table(table_frame(Kind.MARK, [(0, PAGE)], 0))


def test_we_never_write_more_runs_or_pages_than_fit_a_frame() -> None:
    gpas = np.arange(frames.MAX_RUNS + 1, dtype=np.uint64) * np.uint64(2 * PAGE)
    with pytest.raises(LocalProtocolError, match="do not fit one frame"):
        frames.encode_table(Kind.ZERO, 1, gpas, np.full(len(gpas), PAGE, np.uint64))
    with pytest.raises(LocalProtocolError, match="do not fit one frame"):
        frames.encode_table(Kind.PAGES, 1, gpas[:1], np.array([frames.MAX_PAGE_BYTES + PAGE], np.uint64))


def test_the_fullest_frame_of_each_kind_fits_its_limit() -> None:
    gpas = np.arange(frames.MAX_RUNS, dtype=np.uint64) * np.uint64(2 * PAGE)
    ones = np.full(len(gpas), PAGE, np.uint64)
    assert (
        frames.decode_header(frames.encode_table(Kind.ZERO, 1, gpas, ones)[:16]).length == LIMITS[Kind.ZERO]
    )
    few = gpas[: frames.MAX_PAGE_BYTES // PAGE]
    frames.decode_header(frames.encode_table(Kind.PAGES, 1, few, ones[: len(few)])[:16])
