"""Runs of pages: sorted, disjoint, never touching; two integers a run in one NumPy array, and no Python object a page."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from migrate.errors import MemoryFault


class PageRuns:
    """An immutable set of pages as (first page, count) pairs.

    :ivar array: int64, shape (n, 2), read-only.
    :raise MemoryFault: the pairs are not sorted, disjoint, apart and positive; they may come from a peer.
    """

    __slots__ = ("array", "pages")

    array: NDArray[np.int64]
    #: Pages in all runs.
    pages: int

    def __init__(self, pairs: ArrayLike = ()) -> None:
        array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        starts, ends = array[:, 0], array.sum(axis=1)
        if np.any(starts < 0) or np.any(ends <= starts) or np.any(starts[1:] <= ends[:-1]):
            raise MemoryFault(
                "page runs are not sorted, disjoint and apart",
                remedy="report this; if a peer sent them, look at its log",
            )
        self._set(array)

    def _set(self, array: NDArray[np.int64]) -> None:
        array.flags.writeable = False
        self.array = array
        self.pages = int(array[:, 1].sum())

    @classmethod
    def _trusted(cls, array: NDArray[np.int64]) -> PageRuns:
        runs = cls.__new__(cls)
        runs._set(array)
        return runs

    @classmethod
    def from_edges(cls, edges: NDArray[np.int64]) -> PageRuns:
        """From strictly rising borders: start, end, start, end, …; trusted, as bitmaps make them."""
        array = edges.reshape(-1, 2).copy()
        array[:, 1] -= array[:, 0]
        return cls._trusted(array)

    @classmethod
    def from_pages(cls, pages: NDArray[np.int64]) -> PageRuns:
        """From page indices in strictly rising order. :raise MemoryFault: they are not."""
        return cls.merged(np.column_stack((pages, np.ones_like(pages))))

    @classmethod
    def merged(cls, pairs: ArrayLike) -> PageRuns:
        """From sorted, disjoint pairs that may touch each other or be empty. :raise MemoryFault: they are not."""
        array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        array = array[array[:, 1] != 0]
        if len(array) > 1:
            ends = array.sum(axis=1)
            apart = array[1:, 0] != ends[:-1]
            array = np.column_stack(
                (array[np.concatenate(([True], apart)), 0], ends[np.concatenate((apart, [True]))])
            )
            array[:, 1] -= array[:, 0]
        return cls(array)

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for first, count in self.array.tolist():
            yield int(first), int(count)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageRuns) and np.array_equal(self.array, other.array)

    __hash__ = None  # type: ignore[assignment]  # holds an array

    def __repr__(self) -> str:
        return f"PageRuns({len(self)} runs, {self.pages} pages)"

    def pages_array(self) -> NDArray[np.int64]:
        """Every page index, rising: eight bytes a page, so split() large sets first."""
        starts, counts = self.array[:, 0], self.array[:, 1]
        before = np.cumsum(counts) - counts
        return np.repeat(starts - before, counts) + np.arange(self.pages, dtype=np.int64)

    def within(self, first: int, count: int) -> PageRuns:
        """What lies in `count` pages from `first`, numbered from there."""
        starts = np.clip(self.array[:, 0] - first, 0, count)
        ends = np.clip(self.array.sum(axis=1) - first, 0, count)
        keep = ends > starts
        return PageRuns._trusted(np.column_stack((starts[keep], ends[keep] - starts[keep])))

    def shifted(self, by: int) -> PageRuns:
        """The same pages, numbered `by` higher. :raise MemoryFault: one would be below zero."""
        return PageRuns(self.array + np.array([by, 0]))

    def split(self, max_pages: int) -> Iterator[PageRuns]:
        """The same pages in order, in parts of `max_pages` pages altogether (the last may have fewer)."""
        ends = np.cumsum(self.array[:, 1])
        for low in range(0, self.pages, max_pages):
            high = min(low + max_pages, self.pages)
            begin = int(np.searchsorted(ends, low, side="right"))
            stop = int(np.searchsorted(ends, high, side="left")) + 1
            part = self.array[begin:stop].copy()
            part[-1, 1] -= ends[stop - 1] - high
            skip = low - (ends[begin] - self.array[begin, 1])
            part[0] += (skip, -skip)
            yield PageRuns._trusted(part)
