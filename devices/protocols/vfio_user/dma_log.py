"""Which pages a device has written, by the addresses that it writes them at: VFIO's DMA logging. Pure data, no I/O.

It knows guest addresses only, not the memory behind them: windows come and go, and several may show the same memory. It is kept
apart from the trackers behind D-Bus (migrate/memory), which number the pages of the machine's regions; both may be on at once.
Whoever uses it holds the device's lock. What is marked costs 4 KiB of bitmap for 32768 pages of which one was written, so that a
window of any size costs nothing until the device writes to it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from devices.protocols.vfio_user.feature_messages import LoggingReport
from devices.protocols.vfio_user.messages import PAGE_SIZE
from migrate.memory.bitmap import DirtyBitmap

#: Pages of one piece of the log, which begins at a multiple of them.
_PIECE_SHIFT = 15
_PIECE = 1 << _PIECE_SHIFT
#: The page sizes that a log can have. libvfio-user logs by what the client wishes, so a wish between them is granted.
MIN_PAGE, MAX_PAGE = PAGE_SIZE, 1 << 30


def choose_page_size(wished: int) -> int:
    """`wished` where it can be granted; else the finest, which loses nothing."""
    granted = MIN_PAGE <= wished <= MAX_PAGE and not wished & (wished - 1)
    return wished if granted else MIN_PAGE


class DmaLog:
    """Pages are counted from address 0, so a report over any range has one meaning."""

    def __init__(self, page_size: int) -> None:
        """:param page_size: as `choose_page_size` gives it."""
        self.page_size = page_size
        self._shift = page_size.bit_length() - 1
        self._pieces: dict[int, DirtyBitmap] = {}

    def mark(self, address: int, length: int) -> None:
        """`length` bytes from `address` on have just been written."""
        if length <= 0:
            return
        page, end = address >> self._shift, (address + length - 1 >> self._shift) + 1
        while page < end:
            number, first = page >> _PIECE_SHIFT, page & _PIECE - 1
            count = min(end - page, _PIECE - first)
            piece = self._pieces.get(number)
            if piece is None:
                piece = self._pieces[number] = DirtyBitmap(_PIECE)
            piece.set_range(first, count)
            page += count

    def report(self, wanted: LoggingReport) -> bytes:
        """The bitmap, and what it reports is forgotten: bit (address - iova) / page_size, least significant bit first.

        A page of the log that is larger than one of the report sets all the bits it covers; a smaller one sets the bit of the
        page that it lies in. One that lies in the range only in part is reported and kept: its other part was not asked for.
        """
        iova, length, page_size = wanted
        bits = -(-length // page_size)
        found = DirtyBitmap(bits)
        for number in self._pieces_between(iova, iova + length):
            piece = self._pieces[number]
            pages = self._within(piece, number, iova, iova + length)
            if pages.size:
                # Relative to iova, so that nothing comes near 2^63: a piece may begin before it, hence the clipping.
                low = pages * self.page_size + ((number << _PIECE_SHIFT + self._shift) - iova)
                first = np.maximum(low, 0) // page_size
                last = (np.minimum(low + self.page_size, length) - 1) // page_size
                # As many bits as the widest page covers, for all pages at once; together no more than the report has.
                every = first[:, None] + np.arange(int((last - first).max()) + 1)
                found.set_pages(np.minimum(every, last[:, None]).ravel())
            self._forget_within(number, iova, iova + length)
        return found.to_bytes().ljust(wanted.bitmap_size, b"\0")

    def forget(self, address: int, length: int) -> None:
        """That memory is gone; pages of the log that reach beyond it are kept."""
        for number in self._pieces_between(address, address + length):
            self._forget_within(number, address, address + length)

    def _pieces_between(self, low: int, high: int) -> list[int]:
        first, last = low >> self._shift + _PIECE_SHIFT, high - 1 >> self._shift + _PIECE_SHIFT
        if last - first < len(self._pieces):
            return [number for number in range(first, last + 1) if number in self._pieces]
        return sorted(number for number in self._pieces if first <= number <= last)

    def _within(self, piece: DirtyBitmap, number: int, low: int, high: int) -> NDArray[np.int64]:
        """Its dirty pages, counted from its beginning, that touch the range."""
        pages = piece.pages_array()
        base = number << _PIECE_SHIFT
        first, last = (low >> self._shift) - base, (high - 1 >> self._shift) - base
        return pages[(pages >= max(first, 0)) & (pages <= min(last, _PIECE - 1))]

    def _forget_within(self, number: int, low: int, high: int) -> None:
        """Clears its pages that lie in the range with all they have."""
        base = number << _PIECE_SHIFT
        first = max((low + self.page_size - 1 >> self._shift) - base, 0)
        last = min((high >> self._shift) - base, _PIECE)
        piece = self._pieces[number]
        pages = piece.pages_array()
        piece.clear_pages(pages[(pages >= first) & (pages < last)])
        if not piece.any():
            del self._pieces[number]
