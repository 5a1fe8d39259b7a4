"""Dirty bitmaps in the layout of vhost and vfio-user: bit i is page i, least significant bit of each byte first.

Pure data: no locks, no clocks, no memory. Whoever shares one between threads holds a lock around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migrate.errors import MemoryFault
from migrate.memory.runs import PageRuns

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["DirtyBitmap", "PageRuns"]

#: Up to so many runs it is cheaper to fill each than to build a mask over all that they span.
_FEW_RUNS = 32


class DirtyBitmap:
    """A set of pages of a machine with `pages` pages.

    Every method that takes pages raises MemoryFault when one is not below `pages`: bitmaps come from other processes.
    """

    __slots__ = ("_bits", "pages")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        # Whole 64-bit words, so that an empty stretch is skipped eight bytes at a time; bits past `pages` stay 0.
        self._bits: NDArray[np.uint8] = np.zeros(-(-pages // 64) * 8, dtype=np.uint8)

    @classmethod
    def from_bytes(cls, data: Buffer, pages: int) -> DirtyBitmap:
        bitmap = cls(pages)
        bitmap.or_bytes(data)
        return bitmap

    @classmethod
    def from_runs(cls, runs: PageRuns, pages: int) -> DirtyBitmap:
        bitmap = cls(pages)
        bitmap.set_runs(runs)
        return bitmap

    @classmethod
    def full(cls, pages: int) -> DirtyBitmap:
        bitmap = cls(pages)
        bitmap.set_range(0, pages)
        return bitmap

    @property
    def nbytes(self) -> int:
        """Length of to_bytes()."""
        return -(-self.pages // 8)

    def to_bytes(self) -> bytes:
        return self._bits[: self.nbytes].tobytes()

    def or_bytes(self, data: Buffer) -> None:
        """Add the pages of another process's bitmap. :raise MemoryFault: wrong length, or bits past the last page."""
        other = np.asarray(memoryview(data).cast("B"))
        if len(other) != self.nbytes:
            raise MemoryFault(
                f"a dirty bitmap of {len(other)} bytes where {self.pages} pages need {self.nbytes}",
                remedy="see that every participant was given the same memory regions",
            )
        if self.pages % 8 and other[-1] >> (self.pages % 8):
            raise MemoryFault(
                f"a dirty bitmap has bits set past the last of {self.pages} pages",
                remedy="see that every participant was given the same memory regions",
            )
        self._bits[: self.nbytes] |= other

    def copy(self) -> DirtyBitmap:
        other = DirtyBitmap(0)
        other.pages, other._bits = self.pages, self._bits.copy()
        return other

    def take(self) -> DirtyBitmap:
        """Move the content out: a new bitmap has it and this one is empty."""
        other = DirtyBitmap(0)
        other.pages, other._bits = self.pages, self._bits
        self._bits = np.zeros_like(other._bits)
        return other

    def __ior__(self, other: DirtyBitmap) -> DirtyBitmap:
        self._bits |= self._same(other)
        return self

    def __iand__(self, other: DirtyBitmap) -> DirtyBitmap:
        self._bits &= self._same(other)
        return self

    def __isub__(self, other: DirtyBitmap) -> DirtyBitmap:
        self._bits &= ~self._same(other)
        return self

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, DirtyBitmap)
            and self.pages == other.pages
            and np.array_equal(self._bits, other._bits)
        )

    __hash__ = None  # type: ignore[assignment]  # changes

    def __repr__(self) -> str:
        return f"DirtyBitmap({self.count()} of {self.pages} pages)"

    def clear(self) -> None:
        self._bits[:] = 0

    def any(self) -> bool:
        return bool(self._words().any())

    def count(self) -> int:
        """Pages in the set."""
        return int.from_bytes(self._bits.tobytes(), "little").bit_count()

    def contains(self, page: int) -> bool:
        self._check(page, page + 1)
        return bool(self._bits[page >> 3] >> (page & 7) & 1)

    def contains_pages(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """One answer a page."""
        if pages.size:
            self._check(int(pages.min()), int(pages.max()) + 1)
        bits: NDArray[np.bool_] = (self._bits[pages >> 3] >> (pages & 7).astype(np.uint8) & 1).astype(
            np.bool_
        )
        return bits

    def set_range(self, first: int, count: int) -> None:
        end = first + count
        self._check(first, end)
        if count:
            low, high = first >> 3, end >> 3
            head, tail = 0xFF << (first & 7) & 0xFF, (1 << (end & 7)) - 1
            if low == high:
                self._bits[low] |= head & tail
            else:
                self._bits[low] |= head
                self._bits[low + 1 : high] = 0xFF
                if tail:
                    self._bits[high] |= tail

    def set_pages(self, pages: NDArray[np.int64]) -> None:
        """Add pages given by index, in any order."""
        byte, packed = self._packed(pages)
        self._bits[byte : byte + len(packed)] |= packed

    def clear_pages(self, pages: NDArray[np.int64]) -> None:
        """Take out pages given by index, in any order."""
        byte, packed = self._packed(pages)
        self._bits[byte : byte + len(packed)] &= ~packed

    def set_runs(self, runs: PageRuns) -> None:
        if len(runs) <= _FEW_RUNS:
            for first, count in runs:
                self.set_range(first, count)
            return
        starts, ends = runs.array[:, 0], runs.array.sum(axis=1)
        low, high = int(starts[0]), int(ends[-1])
        self._check(low, high)
        # +1 where a run starts, -1 where it ends (never the same place, runs are apart): the running sum is the mask.
        base = low & ~7
        edges = np.zeros(high - base + 1, dtype=np.int8)
        edges[starts - base] = 1
        edges[ends - base] = -1
        packed = np.packbits(np.cumsum(edges[:-1], dtype=np.int8).view(np.uint8), bitorder="little")
        self._bits[low >> 3 : (low >> 3) + len(packed)] |= packed

    def clear_runs(self, runs: PageRuns) -> None:
        self -= DirtyBitmap.from_runs(runs, self.pages)

    def pages_array(self) -> NDArray[np.int64]:
        """Every page index, rising: eight bytes a page."""
        return _positions(self._words())

    def runs(self) -> PageRuns:
        words = self._words()
        # A bit differs from the one before it exactly where a run starts or has just ended.
        edges = np.append(words, np.uint64(0)).astype("<u8")
        edges[:-1] ^= words << np.uint64(1)
        edges[1:] ^= words >> np.uint64(63)
        return PageRuns.from_edges(_positions(edges))

    def _words(self) -> NDArray[np.uint64]:
        return self._bits.view("<u8")

    def _packed(self, pages: NDArray[np.int64]) -> tuple[int, NDArray[np.uint8]]:
        """A bitmap of just these pages: its first byte's place in ours, and its bytes."""
        if not pages.size:
            return 0, np.empty(0, dtype=np.uint8)
        low, high = int(pages.min()), int(pages.max()) + 1
        self._check(low, high)
        base = low & ~7
        mask = np.zeros(high - base, dtype=np.uint8)
        mask[pages - base] = 1
        return low >> 3, np.packbits(mask, bitorder="little")

    def _same(self, other: DirtyBitmap) -> NDArray[np.uint8]:
        if other.pages != self.pages:
            raise MemoryFault(
                f"dirty bitmaps of {self.pages} and {other.pages} pages cannot be joined",
                remedy="see that every participant was given the same memory regions",
            )
        return other._bits

    def _check(self, low: int, high: int) -> None:
        if low < 0 or high > self.pages or high < low:
            raise MemoryFault(
                f"pages {low} to {high} are not all among the {self.pages} of this machine",
                remedy="see that every participant was given the same memory regions",
            )


def _positions(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Indices of the set bits; only words that are not zero are unpacked."""
    used = np.flatnonzero(words)
    bits = np.unpackbits(words[used].astype("<u8").view(np.uint8), bitorder="little")
    flat = np.flatnonzero(bits)
    positions: NDArray[np.int64] = (used[flat >> 6] << 6) + (flat & 63)
    return positions
