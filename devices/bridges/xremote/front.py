"""What the VMM asks of the bridge, over vfio-user: the regions of a PCI function, memory by descriptor, one interrupt.

The VMM is answered as a device of ours answers it: EBUSY where the machine stands still. It does not move the device, the bus does.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from devices.bridges.xremote.function import BARS, CONFIG_SIZE
from devices.kit.device import RegionInfo
from devices.kit.vfio_user import aligned_pieces, map_window
from devices.protocols.vfio_user.backend import RemoteMemory
from devices.protocols.vfio_user.dma_log import DmaLog
from devices.protocols.vfio_user.messages import DmaFlags, DmaMap, refused
from devices.protocols.vfio_user.region_messages import IoEventfd, RegionMemory
from migrate.errors import DeviceError, MemoryFault
from migrate.state.lifecycle import RESPONDING

if TYPE_CHECKING:
    from devices.bridges.xremote.bridge import Bridge

log = logging.getLogger(__name__)

#: VFIO's number of a PCI function's configuration space, and how many regions such a function has (linux/vfio.h).
_CONFIG, _REGIONS = 7, 9


class Front:
    """What devices.protocols.vfio_user.backend.Backend wants."""

    migration = None
    pci = True
    #: INTx, MSI, MSI-X, errors, requests: multi-process QEMU has the first alone.
    irqs: Final = (1, 0, 0, 0, 0)
    maskable: Final = (0,)

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        bridge.memory.by_windows = True
        sizes = [bar.size for bar in bridge.function.bars] + [0] * (_REGIONS - BARS)
        sizes[_CONFIG] = CONFIG_SIZE
        self.regions = [RegionInfo(size, size > 0, size > 0) for size in sizes]

    @property
    def lock(self) -> threading.RLock:
        return self._bridge.lock

    def _require_responding(self) -> None:
        if self._bridge.state not in RESPONDING:
            raise refused(errno.EBUSY, f"the device is in {self._bridge.state}")

    # -- registers ------------------------------------------------------------------------------------------------------------

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        self._require_responding()
        function, data = self._bridge.function, b""
        with _blame():
            for at, size in self._pieces(region, offset, count):
                config = region == _CONFIG
                value = (
                    function.config_read(offset + at, size)
                    if config
                    else function.read(region, offset + at, size)
                )
                data += value.to_bytes(size, "little")
        return data

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        self._require_responding()
        function = self._bridge.function
        with _blame():
            for at, size in self._pieces(region, offset, len(data)):
                value = int.from_bytes(data[at : at + size], "little")
                if region == _CONFIG:
                    function.config_write(offset + at, size, value)
                else:
                    function.write(region, offset + at, size, value)

    def _pieces(self, region: int, offset: int, count: int) -> Iterator[tuple[int, int]]:
        """Aligned, of 8 bytes at most; of 4 where the space knows no more."""
        most = 4 if region == _CONFIG or self._bridge.function.bars[region].ports else 8
        for at, size in aligned_pieces(offset, count):
            for more in range(0, size, min(size, most)):
                yield at + more, min(size, most)

    def region_memory(self, region: int) -> RegionMemory | None:
        return None

    def io_fds(self, region: int) -> Sequence[IoEventfd]:
        return ()

    def reset(self) -> None:
        self._require_responding()
        with _blame():
            self._bridge.reset_by_vmm()

    # -- memory ---------------------------------------------------------------------------------------------------------------

    def dma_map(self, window: DmaMap, fd: int) -> None:
        if not window.flags & DmaFlags.WRITE:
            raise refused(
                errno.ENOTSUP, "multi-process QEMU maps memory for reading and writing, or not at all"
            )
        bridge, memory = self._bridge, self._bridge.memory
        map_window(memory, window, fd)
        try:
            with _blame():
                bridge.wiring.add(bridge.remote.client, window.address, window.size, fd, window.offset)
        except MemoryFault as error:
            memory.unmap_window(window.address, window.size)
            raise refused(errno.EINVAL, error.reason) from error
        except BaseException:
            memory.unmap_window(window.address, window.size)
            raise

    def dma_map_remote(self, window: DmaMap, memory: RemoteMemory) -> None:
        raise refused(errno.ENOTSUP, "a DMA window without a descriptor does not pass through a bridge")

    def dma_unmap(self, address: int, size: int) -> None:
        with _as_it_can():
            self._bridge.wiring.remove(self._bridge.remote.client, address, size)
        self._bridge.memory.unmap_window(address, size)

    def log_dma(self, log: DmaLog | None) -> None:
        if log is not None:
            raise refused(errno.ENOTSUP, "multi-process QEMU has no log of what it writes")

    # -- the interrupt --------------------------------------------------------------------------------------------------------

    def connect_irq(self, index: int, number: int, eventfd: int | None) -> None:
        with _as_it_can():
            self._bridge.interrupt.connect(eventfd)

    def mask_irq(self, index: int, number: int, masked: bool) -> None:
        with _as_it_can():
            self._bridge.interrupt.mask(masked)

    def trigger_irq(self, index: int, number: int) -> None:
        self._require_responding()
        self._bridge.interrupt.signal()


@contextmanager
def _blame() -> Iterator[None]:
    """What QEMU does not do is EIO for the VMM, and its reason is in our log."""
    try:
        yield
    except DeviceError as error:
        if isinstance(error, MemoryFault):
            raise
        log.error("event=qemu-failed reason=%r", error.reason)
        raise refused(errno.EIO, error.reason) from error


@contextmanager
def _as_it_can() -> Iterator[None]:
    """What is taken away is gone here, also where QEMU does not hear of it."""
    try:
        yield
    except DeviceError as error:
        log.warning("event=not-taken-away reason=%r", error.reason)
