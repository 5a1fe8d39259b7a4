"""Guest memory: all regions of a machine, mapped into this process, and the numbering of pages over them.

Nothing here tracks or sends anything; a write through these mappings is seen by a tracker of this process (tracker.py) only.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from errno import EINVAL

import numpy as np
from numpy.typing import NDArray

from migrate.errors import MemoryFault
from migrate.memory import content, holes, syscalls
from migrate.memory.addresses import PAGE_SHIFT, PAGE_SIZE, GuestAddress, RegionOffset
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.mapping import START, Pages, Region, RegionSpec
from migrate.memory.memfd import create_memfd
from migrate.memory.runs import PageRuns

__all__ = ["GuestMemory", "Pages", "Region", "RegionSpec"]

#: Pages populated by one call: long enough to be fast, short enough (some 30 ms) to stop soon.
_PREFAULT_PAGES = 2048


class GuestMemory:
    """The regions of a machine in order of guest address. Not locked: attach before threads use it."""

    def __init__(self) -> None:
        self.regions: Sequence[Region] = ()
        self.page_count = 0
        self._starts: list[int] = []
        self._first_pages: list[int] = []
        self._punched: list[Callable[[PageRuns], None]] = []

    @classmethod
    def create(cls, specs: Sequence[RegionSpec], name: str = "guest") -> GuestMemory:
        """Make new, empty, sealed memory. :raise MemoryFault: regions that overlap or are not whole pages."""
        memory = cls()
        try:
            for spec in specs:
                fd = create_memfd(name, spec.size)
                try:
                    memory.attach(spec.gpa, spec.size, fd)
                finally:
                    os.close(fd)
        except BaseException:
            memory.close()
            raise
        return memory

    @property
    def size(self) -> int:
        """Bytes in all regions."""
        return self.page_count << PAGE_SHIFT

    def attach(self, gpa: GuestAddress, size: int, fd: int, offset: RegionOffset = START) -> Region:
        """Map one more region; `fd` stays the caller's. Renumbers the pages of regions above it.

        :raise MemoryFault: see Region, or it overlaps a region that is there.
        """
        for other in self.regions:
            if gpa < other.gpa + other.size and other.gpa < gpa + size:
                raise MemoryFault(
                    f"a memory region at {gpa:#x} of {size} bytes overlaps that at {other.gpa:#x} of {other.size}",
                    remedy="give every [[memory]] region addresses of its own",
                )
        region = Region(gpa, size, fd, offset)
        regions = sorted((*self.regions, region), key=lambda item: item.gpa)
        first = 0
        for item in regions:
            item.first_page = first
            first += item.page_count
        self.regions, self.page_count = tuple(regions), first
        self._starts = [item.gpa for item in regions]
        self._first_pages = [item.first_page for item in regions]
        return region

    def specs(self) -> list[RegionSpec]:
        return [RegionSpec(region.gpa, region.size) for region in self.regions]

    # -- addresses -------------------------------------------------------------------------------------------------

    def region_at(self, gpa: int, length: int) -> Region:
        """The one region that holds all of it. :raise MemoryFault: none does."""
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0 and length >= 0:
            region = self.regions[index]
            if gpa + length <= region.gpa + region.size and gpa < region.gpa + region.size:
                return region
        raise MemoryFault(
            f"{length} bytes at guest address {gpa:#x} are not inside one memory region",
            remedy="the guest or a device used a wrong address; see the machine's [[memory]] regions",
        )

    def find(self, gpa: GuestAddress, length: int) -> memoryview:
        """A writable view of guest memory. :raise MemoryFault: not within one region."""
        region = self.region_at(gpa, length)
        return region.view[gpa - region.gpa : gpa - region.gpa + length]

    def page_span(self, gpa: GuestAddress, length: int) -> tuple[int, int]:
        """First page and number of pages that `length` bytes touch. :raise MemoryFault: not within one region."""
        region = self.region_at(gpa, length)
        low = (gpa - region.gpa) >> PAGE_SHIFT
        return region.first_page + low, ((gpa - region.gpa + length + PAGE_SIZE - 1) >> PAGE_SHIFT) - low

    def locate(self, page: int) -> tuple[Region, int]:
        """The region of a page and the page's number in it. :raise MemoryFault: there is no such page."""
        if not 0 <= page < self.page_count:
            raise self._no_page(page)
        region = self.regions[bisect_right(self._first_pages, page) - 1]
        return region, page - region.first_page

    def by_region(self, runs: PageRuns) -> Iterator[tuple[Region, PageRuns]]:
        """The runs of each region that has any, numbered from the region's start. :raise MemoryFault: past the end."""
        if len(runs) and int(runs.array[-1].sum()) > self.page_count:
            raise self._no_page(int(runs.array[-1].sum()) - 1)
        for region in self.regions:
            local = runs.within(region.first_page, region.page_count)
            if len(local):
                yield region, local

    def to_table(self, runs: PageRuns) -> NDArray[np.uint64]:
        """Runs as rows of (guest address, bytes), split where a region ends; shape (n, 2)."""
        rows = [
            (local.array.astype(np.uint64) << np.uint64(PAGE_SHIFT))
            + np.array([region.gpa, 0], dtype=np.uint64)
            for region, local in self.by_region(runs)
        ]
        return np.concatenate(rows) if rows else np.empty((0, 2), dtype=np.uint64)

    def from_table(self, table: NDArray[np.uint64]) -> PageRuns:
        """What to_table wrote. :raise MemoryFault: rows misaligned, unsorted, overlapping or outside every region."""
        rows = np.asarray(table, dtype=np.uint64).reshape(-1, 2)
        address, length = rows[:, 0], rows[:, 1]
        which = np.searchsorted(np.array(self._starts, dtype=np.uint64), address, side="right") - 1
        inside = np.zeros(len(rows), dtype=np.bool_)
        pairs = np.zeros((len(rows), 2), dtype=np.int64)
        for index, region in enumerate(self.regions):
            mine = which == index
            low = address[mine] - np.uint64(region.gpa)
            room = np.uint64(region.size)
            # In this order nothing can wrap: low < 2^64, and low <= room before room - low is taken.
            inside[mine] = (low < room) & (length[mine] <= room - np.minimum(low, room)) & (length[mine] > 0)
            pairs[mine, 0] = (low >> np.uint64(PAGE_SHIFT)).astype(np.int64) + region.first_page
            pairs[mine, 1] = (length[mine] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        if not inside.all() or np.any((address | length) & np.uint64(PAGE_SIZE - 1)):
            raise MemoryFault(
                "a table of page runs has rows that are not whole pages of one memory region",
                remedy="see that both sides have the same memory layout; look at the peer's log",
            )
        return PageRuns.merged(pairs)

    def _no_page(self, page: int) -> MemoryFault:
        return MemoryFault(
            f"page {page} is not among the {self.page_count} of this machine",
            remedy="see that both sides have the same memory layout; look at the peer's log",
        )

    # -- pages in and out ------------------------------------------------------------------------------------------

    def gather(self, runs: PageRuns, out: Pages) -> None:
        """Copy the pages of `runs`, in order, into `out` of shape (runs.pages, 512). For many small runs: see views()."""
        done = 0
        for region, local in self.by_region(runs):
            part = out[done : done + local.pages]
            if len(local) == 1:
                first = int(local.array[0, 0])
                np.copyto(part, region.pages[first : first + local.pages])
            else:
                # mode="clip" because the default makes NumPy copy twice; by_region has checked the bounds.
                np.take(region.pages, local.pages_array(), axis=0, out=part, mode="clip")
            done += local.pages

    def scatter(self, runs: PageRuns, data: Pages) -> None:
        """The reverse of gather: store the rows of `data` in the pages of `runs`."""
        if len(data) != runs.pages:
            raise MemoryFault(f"{len(data)} pages of data for {runs.pages} pages", remedy="report this")
        done = 0
        for region, local in self.by_region(runs):
            part = data[done : done + local.pages]
            if len(local) == 1:
                first = int(local.array[0, 0])
                np.copyto(region.pages[first : first + local.pages], part)
            else:
                region.pages[local.pages_array()] = part
            done += local.pages

    def views(self, runs: PageRuns) -> list[memoryview]:
        """A writable view a run (two where a run goes over a region's end), for sendmsg and recvmsg_into."""
        return [
            region.view[first << PAGE_SHIFT : (first + count) << PAGE_SHIFT]
            for region, local in self.by_region(runs)
            for first, count in local
        ]

    def places(self, runs: PageRuns) -> list[tuple[int, int]]:
        """The descriptor and the offset in it of each of views(runs), for sendfile."""
        return [
            (region.fd, region.offset + (first << PAGE_SHIFT))
            for region, local in self.by_region(runs)
            for first, _ in local
        ]

    # -- holes -----------------------------------------------------------------------------------------------------

    def data_extents(self) -> PageRuns:
        """Pages that are not holes. Allocates nothing; about 8 ms a GiB of data."""
        parts = [
            holes.extents(region.fd, region.offset, region.size) + np.array([region.first_page, 0])
            for region in self.regions
        ]
        return PageRuns.merged(np.concatenate(parts)) if parts else PageRuns()

    def on_punch(self, callback: Callable[[PageRuns], None]) -> Callable[[], None]:
        """Call back after every punch(): no write protection sees a hole being made. Returns the unsubscribe."""
        self._punched.append(callback)
        return lambda: self._punched.remove(callback) if callback in self._punched else None

    def punch(self, runs: PageRuns) -> None:
        """Make holes of these pages, then tell the trackers. :raise MemoryFault: the kernel refused."""
        for region, local in self.by_region(runs):
            for first, count in local:
                try:
                    syscalls.punch_hole(region.fd, region.offset + (first << PAGE_SHIFT), count << PAGE_SHIFT)
                except OSError as error:
                    raise MemoryFault(
                        f"cannot punch a hole into guest memory: {error}",
                        remedy="the kernel needs tmpfs with fallocate",
                    ) from error
        for callback in tuple(self._punched):
            callback(runs)

    def prefault(self, runs: PageRuns, stop: Callable[[], bool]) -> int:
        """Allocate and map pages ahead of their first write, in small steps until `stop()`; for a background thread.

        Keeps what pages hold. To a scan tracker it is a write, so prefault before one starts. Returns the pages done:
        none on a kernel without MADV_POPULATE_WRITE (before 5.14), where the first touch costs what it costs.

        :raise MemoryFault: the host has no memory for them.
        """
        done = 0
        for part in runs.split(_PREFAULT_PAGES):
            for region, local in self.by_region(part):
                for first, count in local:
                    if stop() or region.closed:
                        return done
                    try:
                        syscalls.madvise(
                            region.address + (first << PAGE_SHIFT),
                            count << PAGE_SHIFT,
                            syscalls.MADV_POPULATE_WRITE,
                        )
                    except OSError as error:
                        if error.errno == EINVAL:
                            return done
                        raise MemoryFault(
                            f"the host has no memory for the guest's pages: {error.strerror}",
                            remedy="free memory on this host or move the machine elsewhere",
                        ) from error
                    done += count
        return done

    # -- whole-memory passes ---------------------------------------------------------------------------------------

    def digest_blocks(self, block: int = 1 << 20) -> list[bytes]:
        """SHA-256 of every block of every region (a region's last may be shorter). A hole counts as zeros, unallocated."""
        return [
            digest
            for region in self.regions
            for digest in content.block_digests(region.fd, region.offset, region.size, block)
        ]

    def difference(self, other: GuestMemory) -> DirtyBitmap:
        """Pages whose bytes differ. :raise MemoryFault: another layout."""
        if self.specs() != other.specs():
            raise MemoryFault("two memories of different layouts cannot be compared", remedy="report this")
        differing = DirtyBitmap(self.page_count)
        for mine, theirs in zip(self.regions, other.regions, strict=True):
            pages = content.differing_pages(mine.fd, mine.offset, theirs.fd, theirs.offset, mine.size)
            differing.set_pages(pages + mine.first_page)
        return differing

    def equal_to(self, other: GuestMemory) -> bool:
        return not self.difference(other).any()

    def close(self) -> None:
        for region in self.regions:
            region.close()
        self.regions = ()
        self.page_count = 0
        self._starts, self._first_pages = [], []
        self._punched.clear()
