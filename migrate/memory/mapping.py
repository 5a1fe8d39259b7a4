"""One region of guest memory: a memfd mapped, shared and writable, into this process."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migrate.errors import MemoryFault
from migrate.memory.addresses import PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS, GuestAddress, RegionOffset
from migrate.memory.memfd import check_memfd

#: Whole pages as 64-bit words, shape (n, 512).
Pages = NDArray[np.uint64]

_ADDRESS_END = 1 << 64
START = RegionOffset(0)


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """Where a region lies for the guest, and its size in bytes; both multiples of the page."""

    gpa: GuestAddress
    size: int


class Region:
    """One shared, writable mapping of a memfd. Made by GuestMemory, which keeps `first_page` right.

    :ivar fd: our own duplicate, closed with the region.
    :ivar first_page: index of its first page in the machine's numbering.
    """

    def __init__(self, gpa: GuestAddress, size: int, fd: int, offset: RegionOffset = START) -> None:
        """Map `size` bytes at `offset` of `fd`, which stays the caller's.

        :raise MemoryFault: misaligned, past the end of the address space, or a memfd that check_memfd refuses.
        """
        if (
            size <= 0
            or gpa < 0
            or offset < 0
            or (gpa | size | offset) % PAGE_SIZE
            or gpa + size > _ADDRESS_END
        ):
            raise MemoryFault(
                f"a memory region of {size} bytes at {gpa:#x}, offset {offset}, is not made of whole pages",
                remedy=f"addresses, sizes and offsets must be multiples of {PAGE_SIZE}",
            )
        check_memfd(fd, needed=offset + size)
        self.gpa, self.size, self.offset = gpa, size, offset
        self.first_page = 0
        self.page_count = size >> PAGE_SHIFT
        try:
            self.fd = os.dup(fd)
            try:
                self._map = mmap.mmap(self.fd, size, offset=offset)
            except BaseException:
                os.close(self.fd)
                raise
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryFault(
                f"cannot map {size} bytes of guest memory: {error}",
                remedy="the descriptor must be open for reading and writing, and the address space large enough",
            ) from error
        # A core dump of a device is not the place for the guest's secrets.
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._view: memoryview | None = memoryview(self._map)
        self._pages: Pages | None = np.frombuffer(self._map, dtype=np.uint64).reshape(-1, PAGE_WORDS)
        #: Where it is mapped in this process.
        self.address: int = self._pages.ctypes.data

    @property
    def view(self) -> memoryview:
        """All bytes, writable, format 'B'."""
        if self._view is None:
            raise self._closed()
        return self._view

    @property
    def pages(self) -> Pages:
        """All pages, writable, shape (page_count, 512)."""
        if self._pages is None:
            raise self._closed()
        return self._pages

    @property
    def closed(self) -> bool:
        return self._view is None

    def close(self) -> None:
        """Give up the mapping and the descriptor. Whoever still holds a view keeps the bytes mapped until it lets go."""
        if self._view is None:
            return
        view, self._view, self._pages = self._view, None, None
        os.close(self.fd)
        try:
            view.release()
            self._map.close()
        except BufferError:
            # Views are out. Unmapping under them would be a SIGSEGV, so the last of them unmaps when it goes.
            del self._map

    def _closed(self) -> MemoryFault:
        return MemoryFault(f"the memory region at {self.gpa:#x} is closed", remedy="report this")

    def __repr__(self) -> str:
        return f"Region({self.gpa:#x}, {self.size >> 20} MiB{', closed' if self.closed else ''})"
