"""Invariant: a blob is read, or refused with a BlobError or a SchemaError; never anything else, and what is read is written back to
the byte."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from migrate.errors import BlobError, SchemaError
from migrate.state import blob, catalog

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def corpus() -> Sequence[bytes]:
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.blob"))]


def envelope(data: bytes) -> None:
    try:
        found = blob.unpack(data)
    except BlobError as error:
        assert error.reason
        assert error.remedy
        return
    assert blob.pack(found) == data


def state(data: bytes) -> None:
    """The payload with a checksum that is right, so that what is behind it is reached."""
    if len(data) > 4:
        data = data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "big")
    try:
        header = blob.header_of(data)
        schema = catalog.load(header.type)
        version, values = blob.read(data, schema)
    except (BlobError, SchemaError) as error:
        assert error.reason
        assert error.remedy
        return
    assert blob.write(version, header.instance, values) == data
