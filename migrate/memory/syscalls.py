"""The few system calls that Python has no function for (or holds the GIL in), and nothing else.

Each raises OSError as Python's own would; callers turn that into an error with a remedy. ctypes releases the GIL for the call.
"""

from __future__ import annotations

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long)
_libc.syscall.restype = ctypes.c_long

# include/uapi/linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
# include/uapi/asm-generic/mman-common.h; Linux 5.14
MADV_POPULATE_WRITE = 23
# include/uapi/asm-generic/unistd.h has 282; x86-64 and the others that we meet differ
_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_UFFD_USER_MODE_ONLY = 1


def _fail() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back `length` bytes of a memfd at `offset`; they read as zeros from now on."""
    while _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length):
        if ctypes.get_errno() != errno.EINTR:
            raise _fail()


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2) without the GIL (mmap.madvise keeps it, for as long as populating takes)."""
    while _libc.madvise(address, length, advice):
        if ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN):
            raise _fail()


def mincore(address: int, length: int, vector: int) -> None:
    """mincore(2): one byte a page at the address `vector`, bit 0 set when the page is in the page cache."""
    while _libc.mincore(address, length, vector):
        if ctypes.get_errno() != errno.EAGAIN:
            raise _fail()


def userfaultfd() -> int:
    """A userfaultfd of this process that any user may have: it does not trap faults taken inside the kernel.

    That is enough for asynchronous write protection, which the kernel resolves without asking anybody.
    """
    number = _NR_USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fd: int = _libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        raise _fail()
    return fd
