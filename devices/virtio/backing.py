"""A raw image in a regular file, behind a block device: sectors in and out, and the lock that says whose it is.

Bytes go between the file and guest memory by preadv and pwritev on views of it, through the page cache: O_DIRECT would store
behind the dirty tracker `scan`. The lock is an open file description's (F_OFD_SETLK): it does not end when some other
descriptor of the file is closed, it is seen through NFS, and it collides with QEMU's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from devices.virtio.blk import SECTOR
from migrate.errors import DeviceRefused, Phase, UsageError

# include/uapi/linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
#: Written where the file system cannot zero by itself.
_ZEROES: Final = bytes(1 << 20)
#: struct flock: type, whence, start, length (0: to the end), pid (0, as OFD locks demand).
_FLOCK: Final = struct.Struct("hhqqi4x")
_IOV_MAX: Final = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Image:
    """An open image: a blk.Backing. Locked by `lock`, not by being opened."""

    def __init__(self, path: str, *, read_only: bool) -> None:
        """:raise UsageError: it is not there, is no raw image, or may not be written."""
        self.path = path
        self.read_only = read_only
        self._fd = _open(path, read_only=read_only)
        self.size = os.fstat(self._fd).st_size
        self.locked = False
        #: A flush failed: the kernel may have dropped what it could not write, and says so only once.
        self._lost: OSError | None = None

    # -- sectors: from several threads; all raise OSError ---------------------------------------------------------------------

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        left = _rest(buffers, 0)
        while left:
            done = os.preadv(self._fd, left[:_IOV_MAX], offset)
            if not done:
                raise OSError(errno.EIO, f"the image ends at {offset}: somebody made it shorter", self.path)
            offset += done
            left = _rest(left, done)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        left = _rest(buffers, 0)
        while left:
            done = os.pwritev(self._fd, left[:_IOV_MAX], offset)
            offset += done
            left = _rest(left, done)

    def zero(self, offset: int, length: int, *, punch: bool) -> None:
        modes = (_PUNCH_HOLE, _ZERO_RANGE) if punch else (_ZERO_RANGE,)
        if not any(_fallocate(self._fd, mode | _KEEP_SIZE, offset, length) for mode in modes):
            for at in range(offset, offset + length, len(_ZEROES)):
                self.write(at, [memoryview(_ZEROES)[: offset + length - at]])

    def flush(self) -> None:
        if self._lost is None:
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._lost = error
        if self._lost is not None:
            raise OSError(
                self._lost.errno, "an earlier flush failed, so nothing is certain any more", self.path
            )

    # -- whose it is ----------------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """For writing; a read-only one for reading. Does nothing where it is ours. :raise DeviceRefused: it is another's."""
        try:
            self._set_lock(fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                reason, remedy = (
                    f"the image {self.path} is locked by another process",
                    f"one machine at a time may have it: see `fuser -v {self.path}` on every host that mounts it",
                )
            else:
                reason, remedy = (
                    f"the image {self.path} cannot be locked: {error.strerror}",
                    "its file system must have locks (for NFS: lockd, or version 4)",
                )
            raise DeviceRefused(reason, remedy=remedy, phase=Phase.RESUME) from error
        self.locked = True

    def unlock(self) -> None:
        """Another host may have it now, and sees all that was written here. :raise DeviceRefused: that is not certain."""
        if not self.locked:
            return
        try:
            if not self.read_only:
                self.flush()
            self._set_lock(fcntl.F_UNLCK)
        except OSError as error:
            raise DeviceRefused(
                f"what was written to the image {self.path} cannot be brought to its storage: {error.strerror}",
                remedy="the machine stays where it is; see the kernel's log for its storage",
                phase=Phase.COMMIT,
            ) from error
        self.locked = False

    def _set_lock(self, kind: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))

    def close(self) -> None:
        """And with the descriptor goes the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self.locked = -1, False


def _open(path: str, *, read_only: bool) -> int:
    try:
        # O_NONBLOCK: a FIFO that was given by mistake may not keep us waiting for its writer.
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not read_only:
            raise _unfit(
                path, f"may not be written: {error.strerror}", "mend its mode, or give read_only=on"
            ) from None
        raise _unfit(
            path,
            f"cannot be opened: {error.strerror}",
            f"make one: truncate -s 1G {path}"
            if error.errno == errno.ENOENT
            else "give the path of a raw image",
        ) from None
    status = os.fstat(fd)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise _unfit(path, "is not a regular file", "give the path of a raw image")
        if not status.st_size or status.st_size % SECTOR:
            raise _unfit(
                path,
                f"has {status.st_size} bytes, which is not a whole number of sectors of {SECTOR}",
                "is it a raw image? `truncate -s` makes one of any size",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _unfit(path: str, what: str, remedy: str) -> UsageError:
    return UsageError(f"the image {Path(path)} {what}", remedy=remedy, phase=Phase.SETUP)


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of the buffers after so many bytes, none of them empty."""
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:])
        done = max(done - len(buffer), 0)
    return left


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """False where this file system has no such thing."""
    while _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
