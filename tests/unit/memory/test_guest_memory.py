from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from two_regions import HIGH, LAYOUT, PAGES

from migrate.errors import MemoryFault
from migrate.memory import (
    PAGE_SIZE,
    PAGE_WORDS,
    DirtyBitmap,
    GuestAddress,
    GuestMemory,
    PageRuns,
    RegionOffset,
    RegionSpec,
    create_memfd,
    holes,
)

PAGE_SETS = st.sets(st.integers(0, PAGES - 1), min_size=1).map(
    lambda pages: PageRuns.from_pages(np.array(sorted(pages), dtype=np.int64))
)


def resident(memory: GuestMemory) -> int:
    """Bytes that the kernel has allocated."""
    return sum(os.fstat(region.fd).st_blocks * 512 for region in memory.regions)


def numbered(memory: GuestMemory) -> None:
    for region in memory.regions:
        region.pages[:] = np.arange(region.page_count, dtype=np.uint64)[:, None] + np.uint64(
            region.first_page + 1
        )


# -- regions and addresses


def test_pages_are_numbered_in_order_of_guest_address(memory: GuestMemory) -> None:
    assert [region.gpa for region in memory.regions] == [0, HIGH]
    assert [region.first_page for region in memory.regions] == [0, 21]
    assert memory.page_count == PAGES
    assert memory.locate(20) == (memory.regions[0], 20)
    assert memory.locate(21) == (memory.regions[1], 0)
    for page in (-1, PAGES):
        with pytest.raises(MemoryFault):
            memory.locate(page)


def test_a_view_is_within_one_region(memory: GuestMemory) -> None:
    memory.find(GuestAddress(HIGH + 5), 3)[:] = b"abc"
    assert bytes(memory.regions[1].view[5:8]) == b"abc"
    end = 21 * PAGE_SIZE
    assert len(memory.find(GuestAddress(end - 1), 1)) == 1
    assert len(memory.find(GuestAddress(0), 0)) == 0
    for gpa, length in (
        (end - 1, 2),
        (end, 0),
        (end, 1),
        (HIGH - 1, 2),
        (-1, 1),
        (0, -1),
        (1 << 64, 1),
        (0, HIGH + 1),
    ):
        with pytest.raises(MemoryFault, match="not inside one memory region"):
            memory.find(GuestAddress(gpa), length)


@pytest.mark.parametrize(
    ("gpa", "length", "span"),
    [
        (0, 1, (0, 1)),
        (0, PAGE_SIZE, (0, 1)),
        (4095, 2, (0, 2)),
        (4096, 4097, (1, 2)),
        (HIGH, 4096, (21, 1)),
        (HIGH + 42 * 4096 + 4095, 1, (63, 1)),
        (8, 0, (0, 1)),
    ],
)
def test_a_write_touches_every_page_it_has_a_byte_in(
    memory: GuestMemory, gpa: int, length: int, span: tuple[int, int]
) -> None:
    assert memory.page_span(GuestAddress(gpa), length) == span


def test_regions_may_not_overlap_and_must_be_whole_pages(no_leaks: None) -> None:
    memory = GuestMemory.create(LAYOUT)
    fd = create_memfd("more", 4 * PAGE_SIZE)
    try:
        for gpa, size, offset in (
            (20 * PAGE_SIZE, 2 * PAGE_SIZE, 0),
            (HIGH - PAGE_SIZE, 2 * PAGE_SIZE, 0),
            (HIGH, PAGE_SIZE, 0),
            (1 << 40, PAGE_SIZE + 1, 0),
            ((1 << 40) + 1, PAGE_SIZE, 0),
            (1 << 40, PAGE_SIZE, 512),
            (1 << 40, 0, 0),
            (1 << 40, PAGE_SIZE, 4 * PAGE_SIZE),
            (1 << 40, 5 * PAGE_SIZE, 0),
            (1 << 40, PAGE_SIZE, -PAGE_SIZE),
            (-PAGE_SIZE, PAGE_SIZE, 0),
            ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, 0),
        ):
            with pytest.raises(MemoryFault):
                memory.attach(GuestAddress(gpa), size, fd, RegionOffset(offset))
        assert memory.page_count == PAGES
        between = memory.attach(GuestAddress(21 * PAGE_SIZE), 2 * PAGE_SIZE, fd, RegionOffset(PAGE_SIZE))
        assert [region.first_page for region in memory.regions] == [0, 21, 23]
        between.pages[0] = 5
        assert os.pread(fd, 1, PAGE_SIZE) == b"\x05"
    finally:
        os.close(fd)
        memory.close()


def test_a_descriptor_that_cannot_be_written_is_a_fault() -> None:
    fd = create_memfd("guest", PAGE_SIZE)
    try:
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            with pytest.raises(MemoryFault, match="reading and writing"):
                GuestMemory().attach(GuestAddress(0), PAGE_SIZE, read_only)
        finally:
            os.close(read_only)
    finally:
        os.close(fd)


def test_memory_that_its_maker_could_still_shrink_is_not_mapped(no_leaks: None) -> None:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, PAGE_SIZE)
    try:
        with pytest.raises(MemoryFault, match="lacks the seals SHRINK, GROW"):
            GuestMemory().attach(GuestAddress(0), PAGE_SIZE, fd)
    finally:
        os.close(fd)


@given(PAGE_SETS)
def test_a_table_of_guest_addresses_says_the_same_as_the_runs(runs: PageRuns) -> None:
    memory = GuestMemory.create(LAYOUT)
    table = memory.to_table(runs)
    assert memory.from_table(table) == runs
    covered = {gpa + n for gpa, size in table.tolist() for n in range(0, size, PAGE_SIZE)}
    assert covered == {
        memory.locate(page)[0].gpa + memory.locate(page)[1] * PAGE_SIZE
        for page in runs.pages_array().tolist()
    }
    memory.close()


@pytest.mark.parametrize(
    "rows",
    [
        [(21 * PAGE_SIZE, PAGE_SIZE)],
        [(20 * PAGE_SIZE, 2 * PAGE_SIZE)],
        [(0, 0)],
        [(0, 1)],
        [(8, PAGE_SIZE)],
        [(PAGE_SIZE, (1 << 64) - PAGE_SIZE)],
        [(HIGH, 1 << 63)],
        [((1 << 64) - PAGE_SIZE, PAGE_SIZE)],
        [(HIGH, PAGE_SIZE), (0, PAGE_SIZE)],
        [(0, 2 * PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)],
    ],
)
def test_a_hostile_table_is_refused(memory: GuestMemory, rows: list[tuple[int, int]]) -> None:
    with pytest.raises(MemoryFault):
        memory.from_table(np.array(rows, dtype=np.uint64))


# -- pages in and out


@given(PAGE_SETS, PAGE_SETS)
def test_gathered_pages_scatter_to_where_they_were(runs: PageRuns, others: PageRuns) -> None:
    memory, copy = GuestMemory.create(LAYOUT), GuestMemory.create(LAYOUT)
    numbered(memory)
    out = np.empty((runs.pages, PAGE_WORDS), dtype=np.uint64)
    memory.gather(runs, out)
    assert (out == (runs.pages_array() + 1)[:, None].astype(np.uint64)).all()
    assert b"".join(memory.views(runs)) == out.tobytes()
    copy.scatter(others, np.full((others.pages, PAGE_WORDS), 9, dtype=np.uint64))
    copy.scatter(runs, out)
    expected = np.zeros(PAGES, dtype=np.uint64)
    expected[others.pages_array()] = 9
    expected[runs.pages_array()] = runs.pages_array() + 1
    found = np.concatenate([region.pages for region in copy.regions])
    assert (found == expected[:, None]).all()
    del found
    memory.close()
    copy.close()


def test_runs_past_the_end_touch_nothing(memory: GuestMemory) -> None:
    runs, data = PageRuns([(62, 3)]), np.ones((3, PAGE_WORDS), dtype=np.uint64)
    for attempt in (memory.gather, memory.scatter):
        with pytest.raises(MemoryFault):
            attempt(runs, data)
    others: list[Callable[[PageRuns], object]] = [memory.punch, memory.to_table, memory.views]
    for other in others:
        with pytest.raises(MemoryFault):
            other(runs)
    assert resident(memory) == 0


# -- closing


def test_closing_gives_everything_back(no_leaks: None) -> None:
    memory = GuestMemory.create(LAYOUT)
    region = memory.regions[0]
    memory.close()
    memory.close()
    assert region.closed
    for name in ("view", "pages"):
        with pytest.raises(MemoryFault, match="is closed"):
            getattr(region, name)


def test_views_that_outlive_the_region_stay_readable_and_the_last_one_unmaps(no_leaks: None) -> None:
    memory = GuestMemory.create(LAYOUT)
    view, pages = memory.find(GuestAddress(0), 4), memory.regions[0].pages[1:3]
    view[:] = b"alive"[:4]
    pages[:] = 7
    memory.close()
    assert bytes(view) == b"aliv"
    assert pages.sum() == 7 * 2 * PAGE_WORDS


def test_a_layout_that_fails_half_way_leaves_nothing_behind(no_leaks: None) -> None:
    with pytest.raises(MemoryFault):
        GuestMemory.create([*LAYOUT, RegionSpec(GuestAddress(0), PAGE_SIZE)])


# -- holes


@given(PAGE_SETS, PAGE_SETS, PAGE_SETS)
def test_extents_are_the_pages_that_were_touched_and_looking_touches_none(
    written: PageRuns, punched: PageRuns, asked: PageRuns
) -> None:
    memory = GuestMemory.create(LAYOUT)
    memory.scatter(written, np.ones((written.pages, PAGE_WORDS), dtype=np.uint64))
    memory.punch(punched)
    data = set(written.pages_array().tolist()) - set(punched.pages_array().tolist())
    before = resident(memory)
    assert set(memory.data_extents().pages_array().tolist()) == data
    wanted = DirtyBitmap.from_runs(asked, PAGES)
    expected = data & set(asked.pages_array().tolist())
    # Both ways of asking: over the whole of memory, and for each page.
    assert set(holes.with_data(memory, wanted).pages_array().tolist()) == expected
    single = {
        int(page) + region.first_page
        for region, local in memory.by_region(asked)
        for page in holes._with_data(region, local)
    }
    assert single == expected
    memory.digest_blocks(3 * PAGE_SIZE)
    assert memory.equal_to(memory)
    assert resident(memory) == before == len(data) * PAGE_SIZE
    memory.close()


def test_two_regions_of_one_memfd_keep_to_their_own_part() -> None:
    fd = create_memfd("both", 48 * PAGE_SIZE)
    memory = GuestMemory()
    memory.attach(GuestAddress(0), 16 * PAGE_SIZE, fd, RegionOffset(32 * PAGE_SIZE))
    memory.attach(HIGH, 32 * PAGE_SIZE, fd)
    os.close(fd)
    runs = PageRuns([(1, 1), (14, 3), (40, 8)])
    memory.scatter(runs, np.ones((12, PAGE_WORDS), dtype=np.uint64))
    every = DirtyBitmap.full(48)
    assert memory.data_extents() == runs
    assert [
        (region.first_page, holes._with_data(region, PageRuns([(0, 16)])).tolist())
        for region in memory.regions
    ] == [(0, [1, 14, 15]), (16, [0])]
    assert holes.with_data(memory, every).runs() == runs
    other = GuestMemory.create(memory.specs())
    assert memory.difference(other).runs() == runs
    memory.punch(PageRuns([(14, 3)]))
    assert memory.data_extents() == PageRuns([(1, 1), (40, 8)])
    other.scatter(PageRuns([(1, 1), (40, 8)]), np.ones((9, PAGE_WORDS), dtype=np.uint64))
    assert memory.digest_blocks(PAGE_SIZE) == other.digest_blocks(PAGE_SIZE)
    memory.close()
    other.close()


def test_few_pages_far_apart_are_asked_for_one_by_one() -> None:
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), 20000 * PAGE_SIZE)])
    pages = memory.regions[0].pages
    for page in (0, 700, 701, 9000, 19999):
        pages[page] = 1
    asked = DirtyBitmap(20000)
    asked.set_pages(np.array([0, 1, 500, 700, 702, 9000, 9001, 15000, 19998, 19999]))
    assert asked.count() * holes._SPARSE < 20000
    assert holes.with_data(memory, asked).pages_array().tolist() == [0, 700, 9000, 19999]
    assert resident(memory) == 5 * PAGE_SIZE
    memory.close()


def test_a_punched_page_reads_as_zeros_and_those_who_asked_are_told_afterwards(memory: GuestMemory) -> None:
    numbered(memory)
    told = []
    unsubscribe = memory.on_punch(lambda runs: told.append((runs, memory.data_extents())))
    memory.punch(PageRuns([(20, 2)]))
    assert told == [(PageRuns([(20, 2)]), PageRuns([(0, 20), (22, 42)]))]
    assert not any(memory.find(HIGH, PAGE_SIZE))
    unsubscribe()
    memory.punch(PageRuns([(3, 1)]))
    assert len(told) == 1


def test_prefault_allocates_keeps_what_is_there_and_stops_when_told(memory: GuestMemory) -> None:
    memory.find(GuestAddress(4096), 3)[:] = b"abc"
    assert memory.prefault(PageRuns([(0, 30)]), lambda: True) == 0
    assert memory.prefault(PageRuns([(0, 30), (40, 1)]), lambda: False) == 31
    assert memory.data_extents() == PageRuns([(0, 30), (40, 1)])
    assert bytes(memory.find(GuestAddress(4096), 3)) == b"abc"
    big = GuestMemory.create([RegionSpec(GuestAddress(0), 64 << 20)])
    calls = iter([False, False, True])
    assert big.prefault(PageRuns([(0, 16384)]), lambda: next(calls)) == 4096
    big.close()


# -- digests and comparison


def test_digests_are_of_each_block_with_holes_as_zeros(memory: GuestMemory) -> None:
    block = 4 * PAGE_SIZE
    numbered(memory)
    memory.punch(PageRuns([(4, 4), (9, 1), (62, 2)]))
    expected = [
        hashlib.sha256(region.view[low : low + block]).digest()
        for region in memory.regions
        for low in range(0, region.size, block)
    ]
    numbered(memory)
    memory.punch(PageRuns([(4, 4), (9, 1), (62, 2)]))
    before = resident(memory)
    assert memory.digest_blocks(block) == expected
    assert len(expected) == 6 + 11
    assert resident(memory) == before


def test_one_different_byte_makes_memories_differ_in_that_page(memory: GuestMemory) -> None:
    other = GuestMemory.create(LAYOUT)
    numbered(memory)
    numbered(other)
    assert memory.equal_to(other)
    other.find(GuestAddress(HIGH + 42 * PAGE_SIZE + 4095), 1)[:] = b"\xff"
    assert not memory.equal_to(other)
    assert memory.difference(other).runs() == PageRuns([(63, 1)])
    other.close()
    with pytest.raises(MemoryFault, match="different layouts"):
        memory.difference(other)


def test_a_hole_equals_zeros(memory: GuestMemory) -> None:
    other = GuestMemory.create(LAYOUT)
    other.scatter(PageRuns([(0, 30)]), np.zeros((30, PAGE_WORDS), dtype=np.uint64))
    assert memory.equal_to(other)
    assert resident(memory) == 0
    other.close()
