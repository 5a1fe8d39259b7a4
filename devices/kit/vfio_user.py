"""A Device behind a vfio-user server: its registers, interrupts and reset, and the windows into guest memory.

Answered in RUNNING, PRE_COPY and both P2P states. Elsewhere accesses are refused with EBUSY, because the state may be on
its way to another host; what a VMM sets up (DMA windows, eventfds) is taken in every state, so that a destination's VMM can
connect before its devices run.

Where the VMM moves the device (vfio_migration.py), a reset is taken in every state, and leads to RUNNING.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence

from devices.kit.access import MemoryAccess
from devices.kit.device import Device, RegionInfo
from devices.kit.irq import Irq
from devices.kit.runtime import Runtime
from devices.kit.vfio_migration import VfioMigration
from devices.protocols.vfio_user.backend import RemoteMemory
from devices.protocols.vfio_user.dma_log import DmaLog
from devices.protocols.vfio_user.messages import DmaFlags, DmaMap, refused
from devices.protocols.vfio_user.region_messages import IoEventfd, RegionMemory
from migrate.errors import MemoryFault
from migrate.state.lifecycle import RESPONDING


class VfioUserBackend:
    """What devices.protocols.vfio_user.backend.Backend wants."""

    def __init__(self, device: Device, runtime: Runtime) -> None:
        self._device = device
        self._runtime = runtime
        self.migration = VfioMigration(runtime)
        device.memory.by_windows = True

    @property
    def lock(self) -> threading.RLock:
        return self._device.lock

    @property
    def regions(self) -> Sequence[RegionInfo]:
        return self._device.regions

    @property
    def irqs(self) -> Sequence[int]:
        return self._device.irqs

    @property
    def pci(self) -> bool:
        return self._device.pci

    @property
    def maskable(self) -> Sequence[int]:
        """Those of a PCI function are masked in its MSI-X table."""
        return () if self._device.pci else range(len(self._device.irqs))

    def _require_responding(self) -> None:
        if self._device.state not in RESPONDING:
            raise refused(errno.EBUSY, f"the device is in {self._device.state}")

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        self._require_responding()
        if count in (1, 2, 4, 8) and offset % count == 0:
            return self._device.read(region, offset, count).to_bytes(count, "little")
        return b"".join(
            self._device.read(region, offset + at, size).to_bytes(size, "little")
            for at, size in aligned_pieces(offset, count)
        )

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        self._require_responding()
        for at, size in aligned_pieces(offset, len(data)):
            self._device.write(region, offset + at, size, int.from_bytes(data[at : at + size], "little"))

    def dma_map(self, window: DmaMap, fd: int) -> None:
        map_window(self._device.memory, window, fd)
        self._mapped(window)

    def dma_map_remote(self, window: DmaMap, memory: RemoteMemory) -> None:
        writable = bool(window.flags & DmaFlags.WRITE)
        self._device.memory.map_remote(window.address, window.size, memory, writable=writable)
        self._mapped(window)

    def _mapped(self, window: DmaMap) -> None:
        memory = self._device.memory
        if memory.tracker is not None and self._device.writes_memory and memory.has_private_windows:
            memory.unmap_window(window.address, window.size)
            raise refused(
                errno.EBUSY, "memory that is not the machine's cannot be mapped while writes are tracked"
            )
        self._device.windows_changed()

    def dma_unmap(self, address: int, size: int) -> None:
        self._device.before_unmap()
        self._device.memory.unmap_window(address, size)
        self._device.windows_changed()

    def log_dma(self, log: DmaLog | None) -> None:
        self._device.memory.log = log

    def region_memory(self, region: int) -> RegionMemory | None:
        return self._device.region_memory(region)

    def io_fds(self, region: int) -> Sequence[IoEventfd]:
        return self._device.io_fds(region)

    def connect_irq(self, index: int, number: int, eventfd: int | None) -> None:
        self._irq(index, number).connect(eventfd)

    def mask_irq(self, index: int, number: int, masked: bool) -> None:
        self._irq(index, number).mask(masked)

    def trigger_irq(self, index: int, number: int) -> None:
        self._require_responding()
        self._irq(index, number).raise_()

    def _irq(self, index: int, number: int) -> Irq:
        return self._device.irq(sum(self._device.irqs[:index]) + number)

    def reset(self) -> None:
        if self.migration.offered:
            self.migration.reset()
        elif not self._runtime.reset_by_vmm():
            self._require_responding()


def map_window(memory: MemoryAccess, window: DmaMap, fd: int) -> None:
    """What DMA_MAP gives, as a window of this process. :raise RequestError: EINVAL: it is not usable as guest memory."""
    writable = bool(window.flags & DmaFlags.WRITE)
    try:
        memory.map_window(window.address, window.size, fd, window.offset, writable=writable)
    except MemoryFault as error:
        raise refused(errno.EINVAL, error.reason) from error


def aligned_pieces(offset: int, count: int) -> list[tuple[int, int]]:
    """An access of any size as the naturally aligned accesses of 8, 4, 2 and 1 bytes that a device knows: (at, size)."""
    pieces, at = [], 0
    while at < count:
        size = 8
        while (offset + at) % size or at + size > count:
            size //= 2
        pieces.append((at, size))
        at += size
    return pieces
