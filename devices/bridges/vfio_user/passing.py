"""What the VMM asks of the bridge, asked of the server: registers by a call each, memory and interrupts by their descriptors.

The VMM is answered as a device of ours answers it: EBUSY where the machine stands still. It does not move the device, the bus
does: so of migration it may ask nothing, and DMA is logged for the bus alone.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from devices.bridges.vfio_user.upstream import Upstream
from devices.kit.device import RegionInfo
from devices.kit.vfio_user import map_window
from devices.protocols.vfio_user.backend import RemoteMemory
from devices.protocols.vfio_user.client import RequestRefused
from devices.protocols.vfio_user.dma_log import DmaLog
from devices.protocols.vfio_user.messages import (
    DeviceFlags,
    DmaFlags,
    DmaMap,
    IrqFlags,
    RegionFlags,
    refused,
)
from devices.protocols.vfio_user.region_messages import IoEventfd, RegionMemory
from migrate.errors import DeviceError
from migrate.state.lifecycle import RESPONDING

if TYPE_CHECKING:
    from devices.bridges.vfio_user.bridge import Bridge

log = logging.getLogger(__name__)


class Passing:
    """What devices.protocols.vfio_user.backend.Backend wants."""

    #: A VMM that asks is told that it cannot migrate this device.
    migration = None

    def __init__(self, bridge: Bridge, upstream: Upstream) -> None:
        """:raise DeviceError: the server does not say what it has."""
        self._bridge = bridge
        self._upstream = upstream
        self._client = client = upstream.client
        bridge.memory.by_windows = True
        client.shared.wrote = bridge.may_have_written
        self.pci = bool(upstream.info.flags & DeviceFlags.PCI)
        regions = [client.region_info(index) for index in range(upstream.info.regions)]
        self.regions = [
            RegionInfo(one.size, bool(one.flags & RegionFlags.READ), bool(one.flags & RegionFlags.WRITE))
            for one in regions
        ]
        irqs = [client.irq_info(index) for index in range(upstream.info.irqs)]
        self.irqs = [one.count for one in irqs]
        self.maskable = [one.index for one in irqs if one.flags & IrqFlags.MASKABLE]
        #: Descriptors of the server's, asked for once: a client that asks twice gets some of them once.
        self._memories: dict[int, RegionMemory | None] = {
            one.index: None for one in regions if not one.flags & RegionFlags.MMAP
        }
        self._io_fds: dict[int, list[IoEventfd]] = {}

    @property
    def lock(self) -> threading.RLock:
        return self._bridge.lock

    def _require_responding(self) -> None:
        if self._bridge.state not in RESPONDING:
            raise refused(errno.EBUSY, f"the device is in {self._bridge.state}")

    # -- registers ------------------------------------------------------------------------------------------------------------

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        self._require_responding()
        with _blame():
            return self._client.read_bytes(region, offset, count)

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        self._require_responding()
        with _blame():
            self._client.write_bytes(region, offset, data)

    def region_memory(self, region: int) -> RegionMemory | None:
        if region not in self._memories:
            with _blame():
                found = self._client.region_memory(region)
            self._memories[region] = None if found is None else RegionMemory(*found)
        return self._memories[region]

    def io_fds(self, region: int) -> Sequence[IoEventfd]:
        if region not in self._io_fds:
            try:
                self._io_fds[region] = self._client.io_fds(region)
            except RequestRefused:  # not every server knows the command
                self._io_fds[region] = []
        return self._io_fds[region]

    def close(self) -> None:
        """What the server has given; no VMM is served any more."""
        memories = [memory.fd for memory in self._memories.values() if memory is not None]
        for fd in {*memories, *(one.fd for found in self._io_fds.values() for one in found)}:
            os.close(fd)
        self._memories.clear()
        self._io_fds.clear()

    def reset(self) -> None:
        self._require_responding()
        with _blame():
            self._bridge.reset_by_vmm()

    # -- memory ---------------------------------------------------------------------------------------------------------------

    def dma_map(self, window: DmaMap, fd: int) -> None:
        memory = self._bridge.memory
        map_window(memory, window, fd)
        try:
            if memory.tracker is not None and memory.has_private_windows:
                raise refused(
                    errno.EBUSY,
                    "memory that is not the machine's cannot be mapped while writes are tracked",
                )
            # libvfio-user's servers may ask by messages for what they could map.
            with _blame():
                self._client.dma_map(
                    window.address,
                    window.size,
                    fd,
                    window.offset,
                    writable=bool(window.flags & DmaFlags.WRITE),
                    memory=memory.windows[-1].view,
                )
        except BaseException:
            self._client.shared.remove(window.address)
            memory.unmap_window(window.address, window.size)
            raise

    def dma_map_remote(self, window: DmaMap, memory: RemoteMemory) -> None:
        raise refused(errno.ENOTSUP, "a DMA window without a descriptor does not pass through a bridge")

    def dma_unmap(self, address: int, size: int) -> None:
        with self._as_it_can():
            self._client.dma_unmap(address, size)
        self._client.shared.remove(address)
        self._bridge.may_have_written(address, size)
        self._bridge.memory.unmap_window(address, size)

    def log_dma(self, log: DmaLog | None) -> None:
        if log is not None:
            raise refused(errno.ENOTSUP, "DMA is logged for the machine's supervisor, not for its VMM")

    # -- interrupts -------------------------------------------------------------------------------------------------------------

    def connect_irq(self, index: int, number: int, eventfd: int | None) -> None:
        if eventfd is None:
            with self._as_it_can():
                self._client.set_irq_eventfd(index, None, number)
            return
        try:
            with _blame():
                self._client.set_irq_eventfd(index, eventfd, number)
        finally:
            os.close(eventfd)

    def mask_irq(self, index: int, number: int, masked: bool) -> None:
        with self._as_it_can():
            self._client.mask_irq(index, number, masked=masked)

    def trigger_irq(self, index: int, number: int) -> None:
        self._require_responding()
        with _blame():
            self._client.trigger_irq(index, number)

    @contextmanager
    def _as_it_can(self) -> Iterator[None]:
        """What is taken away also when the VMM is gone: then nobody is there to be told that the server refused it."""
        try:
            yield
        except DeviceError as error:
            if isinstance(error, RequestRefused) and self._bridge.state in RESPONDING:
                raise refused(error.errno, error.reason) from error
            log.warning("event=not-taken-away reason=%r", error.reason)


@contextmanager
def _blame() -> Iterator[None]:
    """The server's errno goes on to the VMM; a server that is gone or hangs is EIO there, and its reason is in our log."""
    try:
        yield
    except RequestRefused as error:
        raise refused(error.errno, error.reason) from error
    except DeviceError as error:
        log.error("event=server-failed reason=%r", error.reason)
        raise refused(errno.EIO, error.reason) from error
