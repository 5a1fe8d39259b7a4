"""Passes over the whole content of a memfd: digests and comparison. Holes are not read, not allocated, not mapped.

Everything is copied out by preadv(2) in blocks, which on a hole copies zeros, where a load through a mapping would allocate.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migrate.errors import MemoryFault
from migrate.memory import holes
from migrate.memory.addresses import PAGE_SHIFT, PAGE_WORDS

if TYPE_CHECKING:
    from typing_extensions import Buffer

_COMPARE_BLOCK = 1 << 20


def read_exactly(fd: int, buffer: Buffer, offset: int) -> None:
    """Fill `buffer` from `offset` of a sealed memfd, whose size cannot shrink meanwhile."""
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise MemoryFault(
                f"guest memory ended at {offset + done}", remedy="report this: its size is sealed"
            )
        done += count


def block_digests(fd: int, offset: int, size: int, block: int) -> list[bytes]:
    """SHA-256 of each block of `block` bytes; one without data has the digest of as many zeros."""
    busy = blocks_with_data(fd, offset, size, block)
    zeros = hashlib.sha256(bytes(min(block, size))).digest()
    scratch = memoryview(bytearray(min(block, size)))
    digests = []
    for index, has_data in enumerate(busy.tolist()):
        start = index * block
        length = min(block, size - start)
        if has_data:
            read_exactly(fd, scratch[:length], offset + start)
            digests.append(hashlib.sha256(scratch[:length]).digest())
        else:
            digests.append(zeros if length == len(scratch) else hashlib.sha256(bytes(length)).digest())
    return digests


def differing_pages(fd: int, offset: int, other_fd: int, other_offset: int, size: int) -> NDArray[np.int64]:
    """Numbers of the pages, from the start of both ranges, whose bytes differ."""
    busy = blocks_with_data(fd, offset, size, _COMPARE_BLOCK)
    busy |= blocks_with_data(other_fd, other_offset, size, _COMPARE_BLOCK)
    mine, theirs = (np.empty((_COMPARE_BLOCK >> PAGE_SHIFT, PAGE_WORDS), dtype=np.uint64) for _ in range(2))
    found = [np.empty(0, dtype=np.int64)]
    for index in np.flatnonzero(busy).tolist():
        start = index * _COMPARE_BLOCK
        pages = min(_COMPARE_BLOCK, size - start) >> PAGE_SHIFT
        read_exactly(fd, mine[:pages].data, offset + start)
        read_exactly(other_fd, theirs[:pages].data, other_offset + start)
        if not np.array_equal(mine[:pages], theirs[:pages]):
            found.append(np.flatnonzero((mine[:pages] != theirs[:pages]).any(axis=1)) + (start >> PAGE_SHIFT))
    return np.concatenate(found)


def blocks_with_data(fd: int, offset: int, size: int, block: int) -> NDArray[np.bool_]:
    busy = np.zeros(-(-size // block), dtype=np.bool_)
    for first, count in (holes.extents(fd, offset, size) << PAGE_SHIFT).tolist():
        busy[first // block : -(-(first + count) // block)] = True
    return busy
