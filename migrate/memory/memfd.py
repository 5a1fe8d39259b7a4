"""memfds that cross a process border: guest memory, and blobs too large for a message.

Whoever makes one seals it before its descriptor leaves the process; whoever receives one checks the seals and the size before
mapping or reading it. Without that a peer could shrink it and kill the reader with SIGBUS, or change bytes between check and use.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from migrate.errors import MemoryFault
from migrate.memory.addresses import PAGE_SIZE

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MEMORY_SEALS = _SIZE_SEALS | fcntl.F_SEAL_SEAL
_BLOB_SEALS = _SIZE_SEALS | fcntl.F_SEAL_WRITE
#: F_SEAL_FUTURE_WRITE, Linux 5.1; Python has no name for it.
_FUTURE_WRITE = 0x10

_NAMES = {
    fcntl.F_SEAL_SEAL: "SEAL",
    fcntl.F_SEAL_SHRINK: "SHRINK",
    fcntl.F_SEAL_GROW: "GROW",
    fcntl.F_SEAL_WRITE: "WRITE",
}


def create_memfd(name: str, size: int) -> int:
    """Make guest memory: a memfd of `size` bytes, all holes, sealed SHRINK, GROW and SEAL, closed on exec.

    :raise MemoryFault: `size` is no positive multiple of the page, or the system gives no memfd.
    """
    if size <= 0 or size % PAGE_SIZE:
        raise MemoryFault(
            f"guest memory of {size} bytes is not a whole number of pages of {PAGE_SIZE} bytes",
            remedy="give a size like 256M",
        )
    fd = _make(name, size)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _MEMORY_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_memfd(fd: int, *, needed: int) -> None:
    """Refuse a descriptor that is not safe to map for writing over `needed` bytes. Does not close it.

    :raise MemoryFault: it is no memfd, could still be resized or re-sealed, may not be written, or is too small.
    """
    seals = _require_seals(fd, _MEMORY_SEALS)
    if seals & (fcntl.F_SEAL_WRITE | _FUTURE_WRITE):
        raise MemoryFault(
            f"guest memory (descriptor {fd}) is sealed against writing",
            remedy="whoever made it must seal it SHRINK, GROW and SEAL only",
        )
    size = os.fstat(fd).st_size
    if size < needed:
        raise MemoryFault(
            f"guest memory (descriptor {fd}) has {size} bytes where {needed} are needed",
            remedy="compare the region's size and offset with what its maker created",
        )


def sealed_bytes(data: Buffer, name: str = "vmferry") -> int:
    """A memfd that holds `data` and never changes again; for passing what is too large for a message.

    :raise MemoryFault: the system gives no memfd, or no memory for it.
    """
    view = memoryview(data).cast("B")
    fd = _make(name, view.nbytes)
    try:
        done = 0
        while done < view.nbytes:
            done += os.pwrite(fd, view[done:], done)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _BLOB_SEALS | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise MemoryFault(
            f"cannot fill a memfd of {view.nbytes} bytes: {error.strerror}", remedy="free memory on this host"
        ) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_sealed(fd: int, size: int, *, limit: int) -> bytes:
    """The content of a memfd that a peer filled with exactly `size` bytes. Does not close it, nor move its file offset.

    :raise MemoryFault: not sealed against writing and resizing, not `size` bytes long, or longer than `limit`.
    """
    if not 0 <= size <= limit:
        raise MemoryFault(
            f"a peer announced {size} bytes where at most {limit} are taken",
            remedy="see that both sides run versions of vmferry that fit together",
        )
    _require_seals(fd, _BLOB_SEALS)
    actual = os.fstat(fd).st_size
    if actual != size:
        raise MemoryFault(
            f"a peer announced {size} bytes and passed a memfd of {actual}", remedy="look at the peer's log"
        )
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        count = os.preadv(fd, [view[done:]], done)
        if count == 0:
            raise MemoryFault(f"a sealed memfd ended after {done} of {size} bytes", remedy="report this")
        done += count
    return bytes(data)


def _make(name: str, size: int) -> int:
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise MemoryFault(
            f"the system gives no memfd: {error.strerror}", remedy="raise the limit of open files (ulimit -n)"
        ) from error
    try:
        os.ftruncate(fd, size)
    except (OSError, OverflowError) as error:
        os.close(fd)
        raise MemoryFault(
            f"a memfd cannot have {size} bytes: {error}", remedy="ask for less memory"
        ) from error
    return fd


def _require_seals(fd: int, wanted: int) -> int:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except (OSError, ValueError, OverflowError) as error:
        # Only memfds (and files on tmpfs, which can never get these seals) have seals at all.
        raise MemoryFault(
            f"descriptor {fd} is not a memfd: {error}", remedy="pass guest memory and blobs as sealed memfds"
        ) from error
    missing = [name for bit, name in _NAMES.items() if wanted & bit and not seals & bit]
    if missing:
        raise MemoryFault(
            f"the memfd of descriptor {fd} lacks the seals {', '.join(missing)}",
            remedy="whoever makes a memfd must seal it before passing it on",
        )
    return seals
