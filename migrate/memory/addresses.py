"""Numbers that must not be mixed up: where something is for the guest, within a region, and in pages.

A *page index* is a plain int: the position of a page over all regions of a machine in order of guest address, holes between
regions not counted. It is what bitmaps, page runs and the wire use.
"""

from __future__ import annotations

from typing import NewType

#: A guest physical address in bytes.
GuestAddress = NewType("GuestAddress", int)
#: Bytes from the start of a region.
RegionOffset = NewType("RegionOffset", int)

#: Bytes in a page, everywhere: what a bit of a dirty bitmap stands for.
PAGE_SIZE = 4096
PAGE_SHIFT = 12
#: 64-bit words in a page: the second dimension of every array of pages.
PAGE_WORDS = PAGE_SIZE // 8


def pages_for(length: int) -> int:
    """How many pages hold `length` bytes."""
    return -(-length // PAGE_SIZE)
