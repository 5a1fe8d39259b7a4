"""A device in memory for tests of the protocol: one region that keeps what is written; one interrupt, none, and three.

What most tests need not know it has: it can be told to have maskable interrupts, memory to map, descriptors, a migration.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from devices.protocols.vfio_user.backend import Migration, RemoteMemory
from devices.protocols.vfio_user.dma_log import DmaLog
from devices.protocols.vfio_user.framing import Message
from devices.protocols.vfio_user.messages import HEADER_SIZE, DmaMap, Header, refused
from devices.protocols.vfio_user.region_messages import IoEventfd, RegionMemory

#: Read it to have the device fail in its own way.
POISON = 0xF00


@dataclass(frozen=True)
class Area:
    size: int
    read: bool = True
    write: bool = True


class MemoryBackend:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.regions = (Area(4096), Area(16, write=False), Area(16, read=False))
        self.irqs = (1, 0, 3)
        self.pci = False
        self.bytes = [bytearray(area.size) for area in self.regions]
        self.windows: dict[int, int] = {}
        self.eventfds: dict[tuple[int, int], int] = {}
        self.triggered: list[tuple[int, int]] = []
        self.resets = 0
        self.refuse = 0
        self.maskable: frozenset[int] = frozenset()
        self.masked: set[tuple[int, int]] = set()
        self.mappable: dict[int, RegionMemory] = {}
        self.doorbells: dict[int, list[IoEventfd]] = {}
        self.remote: dict[int, RemoteMemory] = {}
        self.log: DmaLog | None = None
        self.migration: Migration | None = None

    def _check(self) -> None:
        if self.refuse:
            raise refused(self.refuse, "told to refuse")

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        self._check()
        if offset == POISON:
            raise ZeroDivisionError
        return bytes(self.bytes[region][offset : offset + count])

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        self._check()
        self.bytes[region][offset : offset + len(data)] = data

    def dma_map(self, window: DmaMap, fd: int) -> None:
        self._check()
        os.fstat(fd)  # it is open now, and no longer when this has returned
        self.windows[window.address] = window.size

    def dma_map_remote(self, window: DmaMap, memory: RemoteMemory) -> None:
        self._check()
        self.windows[window.address] = window.size
        self.remote[window.address] = memory

    def dma_unmap(self, address: int, size: int) -> None:
        assert self.windows.pop(address) == size
        self.remote.pop(address, None)

    def log_dma(self, log: DmaLog | None) -> None:
        self.log = log

    def region_memory(self, region: int) -> RegionMemory | None:
        return self.mappable.get(region)

    def io_fds(self, region: int) -> list[IoEventfd]:
        return self.doorbells.get(region, [])

    def mask_irq(self, index: int, number: int, masked: bool) -> None:
        (self.masked.add if masked else self.masked.discard)((index, number))

    def connect_irq(self, index: int, number: int, eventfd: int | None) -> None:
        if (index, number) in self.eventfds:
            os.close(self.eventfds.pop((index, number)))
        if eventfd is not None:
            self.eventfds[index, number] = eventfd

    def trigger_irq(self, index: int, number: int) -> None:
        self.triggered.append((index, number))

    def reset(self) -> None:
        self._check()
        self.resets += 1


def command(number: int, payload: bytes = b"", *, flags: int = 0, fds: list[int] | None = None) -> Message:
    header = Header(7, number, HEADER_SIZE + len(payload), flags, 0)
    return Message(header, memoryview(payload), fds or [])


def open_descriptors() -> set[tuple[str, str]]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:
            pass  # the listing's own
    return found
