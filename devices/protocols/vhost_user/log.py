"""The dirty log: one bit a page of 4 KiB from guest address 0 on, in memory that QEMU shares with *all* its back ends.

So a bit is set by an atomic OR: of two processes that did `log[i] |= bit`, one lost 473 of 614,400 bits when that was tried. Python
has none; libatomic's is called by ctypes. Where there is no libatomic a whole byte is stored: that marks eight pages where one was
written, and loses nothing, because every bit of the byte is set. Source: docs/interop/vhost-user.rst, "Migration".
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
from collections.abc import Callable
from typing import Final

from devices.protocols.vhost_user.messages import refused
from migrate.errors import MemoryFault
from migrate.memory.memfd import check_memfd

_PAGE_SHIFT: Final = 12
_SEQ_CST: Final = 5
#: A log of 16 GiB would be for 512 TiB of guest memory.
MAX_SIZE: Final = 1 << 30


def _atomic_or() -> Callable[[int, int, int], int] | None:
    name = ctypes.util.find_library("atomic") or "libatomic.so.1"
    try:
        function = ctypes.CDLL(name)["__atomic_fetch_or_1"]
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_ubyte, ctypes.c_int)
    function.restype = ctypes.c_ubyte
    return function


_OR: Final = _atomic_or()


class DirtyLog:
    """Mapped from construction to `close`. `mark` may be called from any thread."""

    def __init__(self, fd: int, size: int, offset: int, *, atomic: bool = True) -> None:
        """:param fd: stays the caller's. :raise BadRequest: it is no such memory."""
        if not 0 < size <= MAX_SIZE or offset % mmap.ALLOCATIONGRANULARITY or offset < 0:
            raise refused(f"a dirty log of {size} bytes at {offset}")
        try:
            check_memfd(fd, needed=offset + size)
        except MemoryFault as error:
            raise refused(f"the dirty log: {error.reason}") from error
        self.size = size
        self._map = mmap.mmap(fd, size, offset=offset)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._anchor)
        self._or = _OR if atomic else None

    def mark(self, gpa: int, length: int) -> None:
        """What was stored there is dirty; after the store, before the driver is told. Beyond the log's end: nothing."""
        if length <= 0:
            return
        first, last = gpa >> _PAGE_SHIFT, gpa + length - 1 >> _PAGE_SHIFT
        for at in range(first >> 3, min(last >> 3, self.size - 1) + 1):
            low = first & 7 if at == first >> 3 else 0
            high = last & 7 if at == last >> 3 else 7
            bits = (0xFF >> (7 - high)) & (0xFF << low) & 0xFF
            if self._or is not None:
                self._or(self._address + at, bits, _SEQ_CST)
            else:
                self._map[at] = 0xFF

    def close(self) -> None:
        del self._anchor
        self._map.close()


def is_exact() -> bool:
    """Whether bits are set one by one here."""
    return _OR is not None
