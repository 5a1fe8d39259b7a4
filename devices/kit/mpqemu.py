"""A Device behind QEMU's `x-pci-proxy-dev` (devices.protocols.mpqemu): a PCI function, whatever it is behind vfio-user."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Final

from devices.kit import pci_function
from devices.kit.device import Device
from devices.kit.runtime import Runtime
from devices.kit.vfio_user import aligned_pieces
from devices.protocols.mpqemu.messages import Sysmem, bad
from migrate.errors import MemoryFault, Phase, UsageError
from migrate.state.lifecycle import RESPONDING

log = logging.getLogger(__name__)

_CONFIG_REGION: Final = 7
#: A window: where and how large, and of which file from where on.
_Key = tuple[int, int, int, int, int]


class MpqemuBackend:
    """What devices.protocols.mpqemu.session.Backend wants. Of interrupts it has INTx: a device's first, and none of MSI-X."""

    def __init__(self, device: Device, runtime: Runtime) -> None:
        """:raise UsageError: the device is no PCI function, and says not how it would be one."""
        if not device.pci and device.identity is None:
            raise UsageError(
                f"a {device.type} cannot be behind x-pci-proxy-dev: it is no PCI function",
                remedy="set `identity = PciIdentity(…)` in its class, or use --protocol vfio-user",
                phase=Phase.SETUP,
            )
        self._device = device
        self._runtime = runtime
        self._windows: dict[_Key, tuple[int, int]] = {}
        self._plain = (
            None
            if device.pci or device.identity is None
            else pci_function.PlainFunction(device.identity, device.regions, interrupts=any(device.irqs))
        )
        device.memory.by_windows = True
        device.unmovable = "it is behind QEMU's x-pci-proxy-dev, with which QEMU does not migrate"

    @property
    def lock(self) -> threading.RLock:
        return self._device.lock

    # -- accesses: the device may be asked for naturally aligned ones only ---------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        if self._plain is not None:
            return self._plain.read(offset, size)
        return self._read(_CONFIG_REGION, offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        if self._plain is not None:
            self._plain.write(offset, size, value)
        else:
            self._write(_CONFIG_REGION, offset, size, value)

    def bar_read(self, address: int, size: int, *, memory: bool) -> int | None:
        found = self._find(address, size, memory=memory)
        return None if found is None else self._read(*found, size)

    def bar_write(self, address: int, size: int, value: int, *, memory: bool) -> bool:
        found = self._find(address, size, memory=memory)
        if found is not None:
            self._write(*found, size, value)
        return found is not None

    def _find(self, address: int, size: int, *, memory: bool) -> tuple[int, int] | None:
        if self._device.state not in RESPONDING:
            return None
        return pci_function.find(self.config_read, self._device.regions, address, size, memory=memory)

    def _read(self, region: int, offset: int, count: int) -> int:
        value = 0
        for at, size in aligned_pieces(offset, count):
            value |= self._device.read(region, offset + at, size) << 8 * at
        return value

    def _write(self, region: int, offset: int, count: int, value: int) -> None:
        for at, size in aligned_pieces(offset, count):
            self._device.write(region, offset + at, size, value >> 8 * at & (1 << 8 * size) - 1)

    # -- memory, interrupts, reset -----------------------------------------------------------------------------------------------

    def share_memory(self, regions: Sequence[Sysmem], fds: Sequence[int]) -> None:
        """QEMU says all of it anew whenever anything changes: what is as it was stays mapped."""
        wanted = {_key(region, fd): (region, fd) for region, fd in zip(regions, fds, strict=True)}
        gone = [key for key in self._windows if key not in wanted]
        if gone:
            self._device.before_unmap()
        for key in gone:
            self._device.memory.unmap_window(*self._windows.pop(key))
        try:
            for key, (region, fd) in wanted.items():
                if key not in self._windows:
                    self._device.memory.map_window(region.gpa, region.size, fd, region.offset, writable=True)
                    self._windows[key] = (region.gpa, region.size)
        except MemoryFault as error:
            raise bad(f"guest memory at {region.gpa:#x} cannot be shared: {error.reason}") from error
        finally:
            self._device.windows_changed()

    def connect_irq(self, eventfd: int | None) -> None:
        if self._plain is not None and any(self._device.irqs):
            self._device.irq().connect(eventfd)
        elif eventfd is not None:
            os.close(eventfd)  # its interrupts are messages, which this protocol has not

    def reset(self) -> None:
        if not self._runtime.reset_by_vmm():
            log.info("event=reset-ignored state=%s", self._device.state)
            return
        if self._plain is not None:
            self._plain.reset()


def _key(region: Sysmem, fd: int) -> _Key:
    found = os.fstat(fd)
    return region.gpa, region.size, found.st_dev, found.st_ino, region.offset
