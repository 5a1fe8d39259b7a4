"""The tracker `scan`: the kernel write-protects our mapping and remembers which pages were written (Linux 6.7 and later).

userfaultfd in asynchronous write-protect mode, read and re-armed in one step by the ioctl PAGEMAP_SCAN. It sees stores and
what system calls copy in through this mapping; it does not see another mapping, another process, pwrite(2), O_DIRECT or a
punched hole (reference/device-protocols.md §7). Those must be marked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from threading import Lock, RLock
from typing import ClassVar

import numpy as np

from migrate.errors import TrackerError
from migrate.memory import syscalls
from migrate.memory.addresses import PAGE_SHIFT, GuestAddress
from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.log import LogTracker
from migrate.memory.mapping import Region
from migrate.memory.region import GuestMemory
from migrate.memory.runs import PageRuns
from migrate.memory.tracker import Attachment

# include/uapi/linux/userfaultfd.h
_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F  # _IOWR(0xAA, 0x3F, 24): api, features, ioctls
_UFFDIO_REGISTER = 0xC020AA00  # _IOWR(0xAA, 0x00, 32): start, len, mode, ioctls
_UFFDIO_UNREGISTER = 0x8010AA01  # _IOR(0xAA, 0x01, 16): start, len
_REGISTER_MODE_WP = 2
_FEATURES = (
    1 << 12  # WP_HUGETLBFS_SHMEM: memfds at all
    | 1 << 13  # WP_UNPOPULATED: pages that were never touched
    | 1 << 15  # WP_ASYNC: the kernel resolves the fault itself
)
# include/uapi/linux/fs.h
_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, 96)
_SCAN_ARGUMENT = struct.Struct("=12Q")
_WP_MATCHING = 1
_CHECK_WPASYNC = 2
_PAGE_IS_WRITTEN = 2
_WALK_END = 4  # index in the argument
#: Ranges returned by one call.
_RANGES = 4096


class ScanTracker:
    """Tracks the mappings of a GuestMemory in the process that made both."""

    name: ClassVar[str] = "scan"
    needs_marks: ClassVar[bool] = False

    def __init__(self) -> None:
        self._attachment = Attachment(self.name)
        # For what write protection does not see.
        self._marks = LogTracker()
        self._collecting = Lock()
        self._uffd = -1
        self._pagemap = -1
        self._ranges = np.empty((_RANGES, 3), dtype=np.uint64)

    @property
    def lock(self) -> RLock:
        return self._marks.lock

    def attach(self, memory: GuestMemory) -> None:
        self._attachment.attach(memory)
        self._marks.attach(memory)

    def start(self) -> None:
        if self._attachment.started:
            return
        with self._collecting:
            regions = self._attachment.begin()
            try:
                self._arm(regions)
                self._marks.start()
            except BaseException:
                self._disarm()
                raise

    def collect(self, into: DirtyBitmap) -> None:
        with self._collecting:
            regions = self._attachment.check(into)
            self._marks.collect(into)
            for region in regions:
                self._scan(region, into)

    def mark(self, gpa: GuestAddress, length: int) -> None:
        self._marks.mark(gpa, length)

    def mark_runs(self, runs: PageRuns) -> None:
        self._marks.mark_runs(runs)

    def stop(self) -> None:
        with self._collecting:
            self._disarm()

    def close(self) -> None:
        self.stop()
        self._marks.close()
        self._attachment.detach()

    def _arm(self, regions: Sequence[Region]) -> None:
        try:
            self._uffd = syscalls.userfaultfd()
            fcntl.ioctl(self._uffd, _UFFDIO_API, bytearray(struct.pack("=3Q", _UFFD_API, _FEATURES, 0)))
        except OSError as error:
            raise self._unavailable(error) from error
        try:
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TrackerError(
                f"tracker scan cannot open /proc/self/pagemap: {error.strerror}",
                remedy="mount /proc and leave the process dumpable, or use the tracker log",
            ) from error
        everything = DirtyBitmap(self._attachment.memory.page_count)
        for region in regions:
            argument = bytearray(struct.pack("=4Q", region.address, region.size, _REGISTER_MODE_WP, 0))
            try:
                fcntl.ioctl(self._uffd, _UFFDIO_REGISTER, argument)
            except OSError as error:
                raise TrackerError(
                    f"tracker scan cannot write-protect {region}: {error.strerror}",
                    remedy="no two trackers can have one mapping; else use the tracker log",
                ) from error
            # A range that was never armed reports every page as written: the first scan arms it, its answer means nothing.
            self._scan(region, everything)

    def _disarm(self) -> None:
        for region in self._attachment.end():
            if self._uffd >= 0 and not region.closed:
                try:
                    # Closing the descriptor does the same, unless a forked child still has it.
                    fcntl.ioctl(
                        self._uffd, _UFFDIO_UNREGISTER, struct.pack("=2Q", region.address, region.size)
                    )
                except OSError:
                    pass  # start() failed before it was registered
        self._marks.stop()
        for fd in (self._uffd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1

    def _scan(self, region: Region, into: DirtyBitmap) -> None:
        """Get and clear. The one pair of flags and masks that is right on all kernels (§7)."""
        position, end = region.address, region.address + region.size
        while position < end:
            argument = bytearray(
                _SCAN_ARGUMENT.pack(
                    _SCAN_ARGUMENT.size,
                    _WP_MATCHING | _CHECK_WPASYNC,
                    position,
                    end,
                    0,  # walk_end, written by the kernel: where to go on
                    self._ranges.ctypes.data,
                    _RANGES,
                    0,  # max_pages: no limit
                    0,  # category_inverted
                    _PAGE_IS_WRITTEN,  # category_mask
                    0,  # category_anyof_mask
                    _PAGE_IS_WRITTEN,  # return_mask
                )
            )
            try:
                count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, argument)
            except OSError as error:
                raise self._scan_failed(region, error) from error
            if count:
                found = self._ranges[:count, :2].astype(np.int64)
                found[:, 1] -= found[:, 0]
                found[:, 0] -= region.address
                found >>= PAGE_SHIFT
                found[:, 0] += region.first_page
                into.set_runs(PageRuns.merged(found))
            position = _SCAN_ARGUMENT.unpack(argument)[_WALK_END]

    def _unavailable(self, error: OSError) -> TrackerError:
        if error.errno == errno.EPERM:
            why = "this process may not use userfaultfd (seccomp, or a container's profile)"
        elif error.errno in (errno.EINVAL, errno.ENOSYS):
            why = "this kernel has no asynchronous write protection (Linux 6.7 has)"
        else:
            why = f"userfaultfd fails: {error.strerror}"
        return TrackerError(f"tracker scan does not work: {why}", remedy="use the tracker log")

    def _scan_failed(self, region: Region, error: OSError) -> TrackerError:
        if error.errno == errno.EPERM:
            return TrackerError(
                f"part of {region} is mapped and not write-protected, so writes to it are not seen",
                remedy="something in this process remapped guest memory; use the tracker log",
            )
        why = "needs Linux 6.7" if error.errno == errno.ENOTTY else str(error.strerror)
        return TrackerError(
            f"tracker scan cannot read {region}: PAGEMAP_SCAN {why}", remedy="use the tracker log"
        )
