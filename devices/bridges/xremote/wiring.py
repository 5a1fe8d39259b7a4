"""Guest memory as the VMM has given it, and the interrupt, told to whichever QEMU there is.

SYNC_SYSMEM is all of memory at once: at most 7 regions (QEMU 7.2 refuses the message of 8, and one of none), which it maps for
reading and writing. QEMU answers neither of the two messages, so whoever tells asks something after them.
"""

from __future__ import annotations

import os
from typing import Final

from devices.bridges.xremote.function import MEMORY_SPACE, WIDE_SPACE
from devices.bridges.xremote.interrupt import Interrupt
from devices.protocols.mpqemu.client import Client
from devices.protocols.mpqemu.messages import Sysmem
from migrate.errors import MemoryFault, Phase
from migrate.memory.addresses import PAGE_SIZE
from migrate.memory.memfd import create_memfd

MOST: Final = 7
#: Where a page lies that QEMU is given where there is no guest memory: no address that a VMM can give us.
_NOWHERE: Final = WIDE_SPACE.stop


class Wiring:
    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        self._windows: dict[tuple[int, int], tuple[int, int]] = {}  # (address, size) → (descriptor, offset)
        self._nothing = create_memfd("nothing", PAGE_SIZE)

    def tell(self, client: Client) -> None:
        """All of it, to a QEMU that is new."""
        self._tell_memory(client)
        client.connect_irq(self._interrupt.raised, self._interrupt.resample)
        client.config_read(0, 2)

    def add(self, client: Client, address: int, size: int, fd: int, offset: int) -> None:
        """`fd` stays the caller's. :raise MemoryFault: it cannot be told to QEMU."""
        if len(self._windows) == MOST:
            raise MemoryFault(
                f"multi-process QEMU takes {MOST} regions of memory, and this is one more",
                remedy="give the machine fewer regions",
                phase=Phase.SETUP,
            )
        for space in (MEMORY_SPACE, WIDE_SPACE):
            if address < space.stop and space.start < address + size:
                raise MemoryFault(
                    f"memory at {address:#x} is where the bridge has the function's BARs ({space.start:#x})",
                    remedy="give guest memory another address",
                    phase=Phase.SETUP,
                )
        self._windows[address, size] = (os.dup(fd), offset)
        self._tell_memory(client)

    def remove(self, client: Client, address: int, size: int) -> None:
        fd, _ = self._windows.pop((address, size), (None, 0))
        if fd is not None:
            try:
                self._tell_memory(client)
            finally:
                os.close(fd)

    def _tell_memory(self, client: Client) -> None:
        regions = [Sysmem(address, size, offset) for (address, size), (_, offset) in self._windows.items()]
        fds = [fd for fd, _ in self._windows.values()]
        client.share_memory(
            regions or [Sysmem(_NOWHERE, PAGE_SIZE, 0)],
            fds or [self._nothing],
        )
        client.config_read(0, 2)

    def close(self) -> None:
        for fd, _ in self._windows.values():
            os.close(fd)
        self._windows.clear()
        os.close(self._nothing)
