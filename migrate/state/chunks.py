"""State that is a device's own matter, in numbered chunks: how a bridge streams bytes whose meaning it does not know. No I/O.

A chunk, integers little-endian:

| offset | bytes | what                                                                     |
|--------|-------|--------------------------------------------------------------------------|
| 0      | 8     | magic: "VMFMIGD1"                                                        |
| 8      | 4     | number of the chunk in its session; 0 begins one: nothing came before it |
| 12     | 4     | 1: the last one; else 0                                                  |
| 16     | rest  | data                                                                     |

Streamed state that was kept in a file (`ferry migrate --keep`) is KEPT, then of each chunk 4 bytes of size and itself, whatever
device it is of.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

MAGIC: Final = b"VMFMIGD1"
KEPT: Final = b"VMFKEPT1"
_HEAD: Final = struct.Struct("<8sII")
_SIZE: Final = struct.Struct("<I")
#: Bytes that a chunk has beside its data, and beside itself where it is kept.
OVERHEAD: Final = _HEAD.size
KEPT_OVERHEAD: Final = _SIZE.size


class Chunk(NamedTuple):
    number: int
    last: bool
    data: memoryview


def pack(number: int, data: bytes | bytearray | memoryview, *, last: bool) -> bytes:
    return _HEAD.pack(MAGIC, number, last) + data


def unpack(chunk: bytes | memoryview) -> Chunk | None:
    """None: it is no such chunk."""
    if len(chunk) < _HEAD.size:
        return None
    magic, number, last = _HEAD.unpack_from(chunk)
    if magic != MAGIC or last > 1:
        return None
    return Chunk(number, bool(last), memoryview(chunk)[_HEAD.size :])


def keep(chunk: bytes) -> bytes:
    """What is added to a file of kept chunks."""
    return _SIZE.pack(len(chunk)) + chunk


def kept(file: memoryview) -> Iterator[memoryview]:
    """The chunks of such a file; it ends before one that is cut off."""
    at = len(KEPT)
    while at + _SIZE.size <= len(file):
        (size,) = _SIZE.unpack_from(file, at)
        at += _SIZE.size
        if at + size > len(file):
            return
        yield file[at : at + size]
        at += size
