"""Page runs and dirty bitmaps against plain Python sets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import MemoryFault
from migrate.memory import DirtyBitmap, PageRuns

SIZES = st.integers(1, 700)


@st.composite
def page_sets(draw: st.DrawFn) -> tuple[int, set[int]]:
    """A number of pages and some of them, in clumps: long runs, edges of bytes and words, single pages."""
    size = draw(SIZES)
    pages: set[int] = set()
    for first, count in draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, 150)), max_size=60)):
        pages |= set(range(first, min(first + count, size)))
    return size, pages


def bitmap_of(size: int, pages: set[int]) -> DirtyBitmap:
    bitmap = DirtyBitmap(size)
    bitmap.set_pages(np.array(sorted(pages), dtype=np.int64))
    return bitmap


def pages_of(bitmap: DirtyBitmap) -> set[int]:
    return set(bitmap.pages_array().tolist())


@given(page_sets())
def test_a_bitmap_tells_the_pages_that_were_put_in(case: tuple[int, set[int]]) -> None:
    size, pages = case
    bitmap = bitmap_of(size, pages)
    assert pages_of(bitmap) == pages
    assert bitmap.count() == len(pages)
    assert bitmap.any() == bool(pages)
    assert {page for page in range(size) if bitmap.contains(page)} == pages
    assert bitmap.contains_pages(np.arange(size)).tolist() == [page in pages for page in range(size)]


@given(page_sets())
def test_the_layout_is_that_of_vhost(case: tuple[int, set[int]]) -> None:
    size, pages = case
    data = bitmap_of(size, pages).to_bytes()
    assert len(data) == (size + 7) // 8
    assert {i * 8 + bit for i, byte in enumerate(data) for bit in range(8) if byte >> bit & 1} == pages
    assert pages_of(DirtyBitmap.from_bytes(data, size)) == pages


@given(page_sets())
def test_runs_are_the_same_pages_sorted_and_apart(case: tuple[int, set[int]]) -> None:
    size, pages = case
    runs = bitmap_of(size, pages).runs()
    assert runs.pages == len(pages)
    assert runs.pages_array().tolist() == sorted(pages)
    listed = list(runs)
    assert all(a + n < b for (a, n), (b, _) in pairwise(listed))
    assert PageRuns(runs.array) == runs == PageRuns.from_pages(np.array(sorted(pages), dtype=np.int64))
    assert DirtyBitmap.from_runs(runs, size) == bitmap_of(size, pages)


@given(page_sets(), st.data())
def test_bitmaps_join_meet_and_subtract_as_sets_do(case: tuple[int, set[int]], data: st.DataObject) -> None:
    size, left = case
    right = data.draw(st.sets(st.integers(0, size - 1)))
    joined, met, less, taken, cleared = (bitmap_of(size, left) for _ in range(5))
    other = bitmap_of(size, right)
    joined |= other
    met &= other
    less -= other
    cleared.clear_runs(other.runs())
    bits = bitmap_of(size, left)
    bits.clear_pages(np.array(sorted(right), dtype=np.int64))
    moved = taken.take()
    assert pages_of(joined) == left | right
    assert pages_of(met) == left & right
    assert pages_of(less) == pages_of(cleared) == pages_of(bits) == left - right
    assert pages_of(moved) == left
    assert not taken.any()
    assert pages_of(other) == right


@given(SIZES, st.data())
def test_setting_a_range_sets_just_that(size: int, data: st.DataObject) -> None:
    bitmap, pages = DirtyBitmap(size), set()
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.integers(0, size))
        count = data.draw(st.integers(0, size - first))
        bitmap.set_range(first, count)
        pages |= set(range(first, first + count))
    assert pages_of(bitmap) == pages


@given(page_sets(), st.integers(1, 200))
def test_parts_of_a_split_have_the_same_pages_in_order(case: tuple[int, set[int]], most: int) -> None:
    runs = bitmap_of(*case).runs()
    parts = list(runs.split(most))
    assert [page for part in parts for page in part.pages_array().tolist()] == sorted(case[1])
    assert all(part.pages == most for part in parts[:-1])
    assert all(0 < part.pages <= most for part in parts)


@given(page_sets(), st.integers(0, 700), st.integers(0, 700))
def test_within_is_a_window_with_its_own_numbers(case: tuple[int, set[int]], first: int, count: int) -> None:
    local = bitmap_of(*case).runs().within(first, count)
    assert local.pages_array().tolist() == sorted(p - first for p in case[1] if first <= p < first + count)
    assert set(local.shifted(first).pages_array().tolist()) <= case[1]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_merged_joins_runs_that_touch(gaps: list[tuple[int, int]]) -> None:
    pairs: list[tuple[int, int]] = []
    pages: list[int] = []
    at = 0
    for gap, count in gaps:
        at += gap
        pairs.append((at, count))
        pages += range(at, at + count)
        at += count
    assert PageRuns.merged(pairs).pages_array().tolist() == pages


@pytest.mark.parametrize(
    "pairs",
    [
        [(3, 0)],
        [(-1, 2)],
        [(3, -1)],
        [(5, 1), (3, 1)],
        [(3, 3), (4, 1)],
        [(3, 2), (5, 1)],
        [((1 << 63) - 1, 5)],
        [((1 << 63) - 2, 1), (0, 1)],
    ],
    ids=["empty", "negative", "negative-count", "unsorted", "overlap", "touching", "wraps", "unsorted-high"],
)
def test_runs_that_are_not_runs_are_refused(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(MemoryFault, match="sorted, disjoint and apart"):
        PageRuns(pairs)


def test_overlapping_pairs_cannot_be_merged() -> None:
    with pytest.raises(MemoryFault):
        PageRuns.merged([(0, 5), (3, 1), (9, 1)])


def test_another_processs_bitmap_must_have_the_right_length_and_no_pages_past_the_end() -> None:
    bitmap = DirtyBitmap(11)
    with pytest.raises(MemoryFault, match="3 bytes where 11 pages need 2"):
        bitmap.or_bytes(bytes(3))
    with pytest.raises(MemoryFault, match="past the last of 11"):
        bitmap.or_bytes(b"\x00\x08")
    bitmap.or_bytes(b"\x00\x04")
    assert pages_of(bitmap) == {10}


def test_pages_that_the_machine_has_not_are_refused() -> None:
    bitmap = DirtyBitmap(64)
    for attempt in (
        lambda: bitmap.set_range(60, 5),
        lambda: bitmap.set_range(-1, 1),
        lambda: bitmap.set_pages(np.array([64])),
        lambda: bitmap.clear_pages(np.array([-1])),
        lambda: bitmap.set_runs(PageRuns([(63, 2)])),
        lambda: bitmap.set_runs(PageRuns([(2 * n, 1) for n in range(40)])),
        lambda: bitmap.contains(64),
        lambda: bitmap.contains_pages(np.array([-1])),
        lambda: bitmap.__ior__(DirtyBitmap(65)),
    ):
        with pytest.raises(MemoryFault):
            attempt()
    assert not bitmap.any()
