"""Chunks of state that only its device understands: in order, told from anything else, and kept in a file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.state import chunks


@given(st.integers(0, 2**32 - 1), st.binary(max_size=100), st.booleans())
def test_a_chunk_comes_out_as_it_went_in(number: int, data: bytes, last: bool) -> None:
    packed = chunks.pack(number, data, last=last)
    assert len(packed) == len(data) + chunks.OVERHEAD
    assert chunks.unpack(packed) == (number, last, data)


@pytest.mark.parametrize(
    "wrong",
    [b"", chunks.MAGIC, chunks.pack(0, b"", last=True)[:-1], b"VMFMIGD2" + bytes(8), chunks.MAGIC + bytes(4) + b"\2\0\0\0"],
)  # fmt: skip
def test_what_is_no_chunk_is_told(wrong: bytes) -> None:
    assert chunks.unpack(wrong) is None


def test_the_bytes_of_a_chunk_do_not_change() -> None:
    assert chunks.pack(3, b"xy", last=True) == b"VMFMIGD1\3\0\0\0\1\0\0\0xy"


@given(st.lists(st.binary(max_size=50)), st.integers(0, 60))
def test_a_file_of_kept_chunks_gives_all_that_are_whole(sent: list[bytes], lost: int) -> None:
    file = chunks.KEPT + b"".join(map(chunks.keep, sent))
    assert list(chunks.kept(memoryview(file))) == sent
    cut = memoryview(file)[: max(len(chunks.KEPT), len(file) - lost)]
    assert list(chunks.kept(cut)) == sent[: len(list(chunks.kept(cut)))]
