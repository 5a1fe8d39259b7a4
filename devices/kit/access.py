"""Guest memory as a device sees it: by guest physical address, within what it was given.

There are two givers. AttachMemory on the bus gives the machine's regions: pages are numbered over them, and writes to them
are tracked. A VMM's DMA_MAP gives windows, and says with them what the device may touch; a window onto an attached region
uses that region's mapping, because dirty tracking sees only what is written through the mapping it watches.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from migrate.errors import MemoryFault, Phase
from migrate.memory.addresses import GuestAddress, RegionOffset
from migrate.memory.region import GuestMemory, Region
from migrate.memory.tracker import Tracker


@dataclass(slots=True)
class Window:
    """What a VMM mapped: `size` bytes at guest physical `address` are those of `region` from `offset` on."""

    address: int
    size: int
    writable: bool
    region: Region
    offset: int
    #: The region was mapped for this window alone, and nobody tracks it.
    private: bool

    @property
    def view(self) -> memoryview:
        return self.region.view[self.offset : self.offset + self.size]

    def covers(self, gpa: int, length: int) -> bool:
        return self.address <= gpa and gpa + length <= self.address + self.size


class Remote(Protocol):
    """Memory that this process cannot map and asks its VMM for (devices.protocols.vfio_user.backend.RemoteMemory)."""

    def read(self, address: int, size: int) -> bytes: ...
    def write(self, address: int, data: bytes | bytearray | memoryview) -> None: ...


@dataclass(slots=True)
class RemoteWindow:
    """What a VMM gave without a descriptor."""

    address: int
    size: int
    writable: bool
    memory: Remote


class WriteLog(Protocol):
    """Where a VMM reads what was written, by the addresses it was written at (devices.protocols.vfio_user.dma_log)."""

    def mark(self, address: int, length: int) -> None: ...


class MemoryAccess:
    """All methods are called with the participant's lock held."""

    def __init__(self, *, writes: bool) -> None:
        self._writes = writes
        #: The machine's regions.
        self.attached = GuestMemory()
        #: What watches `attached`, while somebody wants to know.
        self.tracker: Tracker | None = None
        #: Set where a VMM decides what may be touched: then only its windows are open.
        self.by_windows = False
        #: A VMM's log of what is written to its windows, beside the tracker and whatever that does.
        self.log: WriteLog | None = None
        self._windows: list[Window] = []
        self._remote: list[RemoteWindow] = []

    # -- for devices ------------------------------------------------------------------------------------------------------

    def read(self, gpa: int, size: int) -> bytes:
        """:raise MemoryFault: not all of it is guest memory that this device may read."""
        if self._remote and (remote := self._remote_at(gpa, size, write=False)) is not None:
            return remote.memory.read(gpa, size)
        region, offset = self._locate(gpa, size, write=False)
        return bytes(region.view[offset : offset + size])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store, then mark it dirty; only then may the device show that it is done (an interrupt, a used ring).

        :raise MemoryFault: not all of it is guest memory that this device may write. Nothing was written, unless the
            memory is a VMM's own and the VMM failed underway.
        """
        self._require_writer()
        if self._remote and (remote := self._remote_at(gpa, len(data), write=True)) is not None:
            if self.log is not None:
                self.log.mark(gpa, len(data))
            remote.memory.write(gpa, data)
            return
        region, offset = self._locate(gpa, len(data), write=True)
        tracker = self.tracker
        if tracker is not None and tracker.needs_marks:
            with tracker.lock:
                region.view[offset : offset + len(data)] = data
                tracker.mark(GuestAddress(region.gpa + offset), len(data))
        else:
            region.view[offset : offset + len(data)] = data
        if self.log is not None:
            self.log.mark(gpa, len(data))

    def view(self, gpa: int, size: int, *, write: bool) -> memoryview:
        """The bytes themselves, for system calls that read or store them; a store needs `wrote` afterwards.

        It may outlast the lock, but not what `Device.before_unmap` waits for. Every store is followed by `wrote`, whatever
        tracks it.

        :raise MemoryFault: not all of it is guest memory that this device may read, or write; or it cannot be mapped here.
        """
        if write:
            self._require_writer()
        region, offset = self._locate(gpa, size, write=write)
        return region.view[offset : offset + size]

    def wrote(self, gpa: int, size: int) -> None:
        """Mark dirty what was stored through a view. Before the device shows that it is done.

        :raise MemoryFault: the VMM has taken that memory back meanwhile.
        """
        tracker = self.tracker
        if tracker is not None and tracker.needs_marks:
            region, offset = self._locate(gpa, size, write=True)
            tracker.mark(GuestAddress(region.gpa + offset), size)
        if self.log is not None:
            self.log.mark(gpa, size)

    def _require_writer(self) -> None:
        if not self._writes:
            raise MemoryFault(
                "this type of device said that it writes no guest memory, so its writes would be lost in a migration",
                remedy="set writes_memory = True in its class",
                phase=Phase.RUNNING,
            )

    def _remote_at(self, gpa: int, length: int, *, write: bool) -> RemoteWindow | None:
        for window in self._remote:
            inside = window.address <= gpa and gpa + length <= window.address + window.size
            if inside and (window.writable or not write):
                return window
        return None

    def _locate(self, gpa: int, length: int, *, write: bool) -> tuple[Region, int]:
        if not self.by_windows:
            region = self.attached.region_at(gpa, length)
            return region, gpa - region.gpa
        for window in self._windows:
            if window.covers(gpa, length) and (window.writable or not write):
                return window.region, window.offset + gpa - window.address
        raise MemoryFault(
            f"{length} bytes at guest address {gpa:#x} are not in a window that may be {'written' if write else 'read'}",
            remedy="the guest gave the device a wrong address, or the VMM has not mapped its memory",
            phase=Phase.RUNNING,
        )

    # -- for the kit ------------------------------------------------------------------------------------------------------

    def attach(self, gpa: int, size: int, fd: int, offset: int) -> Region:
        """Map one of the machine's regions; `fd` stays the caller's. :raise MemoryFault: see GuestMemory.attach."""
        region = self.attached.attach(GuestAddress(gpa), size, fd, RegionOffset(offset))
        for window in self._windows:
            # A VMM may have mapped the same memory earlier: from now on it is written where it is tracked.
            if (
                window.private
                and (inside := _inside(region, window.region.fd, window.region.offset, window.size))
                is not None
            ):
                window.region.close()
                window.region, window.offset, window.private = region, inside, False
        return region

    def map_window(self, address: int, size: int, fd: int, offset: int, *, writable: bool) -> None:
        """:raise MemoryFault: it is not a memfd sealed against shrinking, or too short."""
        for region in self.attached.regions:
            inside = _inside(region, fd, offset, size)
            if inside is not None:
                self._windows.append(Window(address, size, writable, region, inside, private=False))
                return
        region = Region(GuestAddress(address), size, fd, RegionOffset(offset))
        self._windows.append(Window(address, size, writable, region, 0, private=True))

    def map_remote(self, address: int, size: int, memory: Remote, *, writable: bool) -> None:
        """A window without memory of its own: it can be read and written, and no view of it can be had."""
        self._remote.append(RemoteWindow(address, size, writable, memory))

    def unmap_window(self, address: int, size: int) -> None:
        self._remote = [one for one in self._remote if (one.address, one.size) != (address, size)]
        for window in self._windows:
            if (window.address, window.size) == (address, size):
                self._windows.remove(window)
                if window.private:
                    window.region.close()
                return

    @property
    def windows(self) -> tuple[Window, ...]:
        """Those with a descriptor."""
        return tuple(self._windows)

    @property
    def has_private_windows(self) -> bool:
        """Memory may be written here that the machine's page numbers do not cover."""
        return any(window.private and window.writable for window in self._windows) or any(
            window.writable for window in self._remote
        )


def _inside(region: Region, fd: int, offset: int, size: int) -> int | None:
    """Where `size` bytes of `fd` from `offset` on lie in `region`, if they are the same memory."""
    ours, theirs = os.fstat(region.fd), os.fstat(fd)
    if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
        return None
    inside = offset - region.offset
    return inside if inside >= 0 and inside + size <= region.size else None
