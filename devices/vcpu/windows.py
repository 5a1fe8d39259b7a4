"""The devices as the guest sees them: each one's window of registers becomes vfio-user calls to its process.

Every call has a deadline (vfio_user.client.TIMEOUT). A device that is gone, hangs or refuses raises its error out of the
guest's access, with its name in the text: on the bus the vCPU speaks for itself only, and `device` is who was called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from devices.protocols.vfio_user.client import Client
from devices.protocols.vfio_user.messages import DeviceFlags
from devices.vcpu.engine import Engine
from devices.vcpu.platform_file import CONFIG_OFFSET, WINDOW_SIZE, DeviceEntry
from devices.vcpu.platform_page import PlatformPage
from migrate.errors import DeviceError, DeviceRefused, Phase
from migrate.memory.addresses import PAGE_SIZE
from migrate.memory.mapping import Region

#: Of a device's regions the guest sees this one, which is BAR 0 of a PCI function, and of such a one also its configuration.
_REGION, _CONFIG = 0, 7
#: Where interrupts are: index 0, which of a PCI function is INTx; of one that has MSI-X, there. VFIO's numbers.
_IRQ, _MSIX = 0, 2


class Window:
    """What the guest sees of one device."""

    def __init__(self, client: Client) -> None:
        """Use `open`."""
        self._client = client

    @classmethod
    def open(cls, entry: DeviceEntry, engine: Engine, page: PlatformPage) -> Self:
        """Connect, have its interrupts raise its lines of the platform page, and show its registers to the guest.

        :raise DeviceGone, DeviceTimeout, DeviceRefused: it is not there, does not answer, or is not usable here.
        """
        with _named(entry.id):
            client = Client.connect(entry.socket, device=entry.id)
            window = cls(client)
            try:
                window._show(entry, engine, page)
            except BaseException:
                client.close()
                raise
            return window

    def _show(self, entry: DeviceEntry, engine: Engine, page: PlatformPage) -> None:
        info = self._client.info()
        pci = bool(info.flags & DeviceFlags.PCI)
        regions = {_REGION: (entry.gpa, CONFIG_OFFSET if pci else WINDOW_SIZE)}
        if pci:
            regions[_CONFIG] = (entry.gpa + CONFIG_OFFSET, PAGE_SIZE)
        for region, (gpa, room) in regions.items():
            size = self._client.region_info(region).size if region < info.regions else 0
            if not 0 < size <= room:
                raise DeviceRefused(
                    f"its region {region} has {size} bytes; the guest can see 1 to {room}",
                    remedy="this device does not fit into the embedded machine",
                    phase=Phase.SETUP,
                    device=entry.id,
                )
            registers = _Registers(self._client, region, size)
            engine.map_window(gpa, -(-size // PAGE_SIZE) * PAGE_SIZE, registers.read, registers.write)
        counts = [self._client.irq_info(index).count for index in range(min(info.irqs, _MSIX + 1))]
        index = _MSIX if pci and len(counts) > _MSIX and counts[_MSIX] else _IRQ
        count = counts[index] if counts else 0
        # A function may have more vectors than the machine gives it lines: its driver is told how many it may use.
        for number, line in enumerate(entry.lines[:count]):
            self._client.set_irq_eventfd(index, page.line(line), number)

    def map_memory(self, region: Region) -> None:
        """Let the device reach a region of guest memory."""
        with _named(self._client.device):
            self._client.dma_map(region.gpa, region.size, region.fd, region.offset)

    def close(self) -> None:
        self._client.close()


class _Registers:
    """One region, as the guest's accesses reach it."""

    def __init__(self, client: Client, region: int, size: int) -> None:
        self._client = client
        self._region = region
        self._size = size

    def read(self, offset: int, size: int) -> int:
        # Between the region's end and the page's there is nothing, as on a bus where nobody answers.
        if offset + size > self._size:
            return 0
        with _named(self._client.device):
            return self._client.region_read(self._region, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset + size <= self._size:
            with _named(self._client.device):
                self._client.region_write(self._region, offset, size, value)


@contextmanager
def _named(device: str) -> Iterator[None]:
    try:
        yield
    except DeviceError as error:
        error.reason = f"its device {device}: {error.reason}"
        error.device = None
        raise
