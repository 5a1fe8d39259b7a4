"""Invariant: a migration stream of QEMU is read to its end or to a named place; no exception, nothing kept that it claims."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

from migrate.qemu.stream import MAX_HELPER, read

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "qemu-7.2.stream.gz"


def corpus() -> Sequence[bytes]:
    """The sample without most of its pages: what is left is nearly all structure."""
    whole = gzip.decompress(SAMPLE.read_bytes())
    found = read(io.BytesIO(whole))
    pages = found.sections[2]
    short = whole[: pages.offset] + whole[pages.offset + pages.size :]
    return [
        short,
        whole[:3000],
        whole[pages.offset + pages.size - 500 :],
        b"QEVM\0\0\0\3" + whole[pages.offset + pages.size :],
    ]


def stream(data: bytes) -> None:
    found = read(io.BytesIO(data))
    assert 0 <= found.stopped_at <= len(data)
    assert (found.complaint is None) <= (found.stopped_at == len(data))
    assert all(len(helper.data) <= MAX_HELPER for helper in found.helpers)
    assert sum(section.size for section in found.sections) <= len(data)
