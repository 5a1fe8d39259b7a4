"""The devices as the guest sees them: each one's window of registers becomes vfio-user calls to its process.

Every call has a deadline (vfio_user.client.TIMEOUT). A device that is gone, hangs or refuses raises its error out of the
guest's access, with its name in the text: on the bus the vCPU speaks for itself only, and `device` is who was called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from devices.protocols.vfio_user.client import Client
from devices.vcpu.engine import Engine
from devices.vcpu.platform_file import WINDOW_SIZE, DeviceEntry
from devices.vcpu.platform_page import PlatformPage
from migrate.errors import DeviceError, DeviceRefused, Phase
from migrate.memory.addresses import PAGE_SIZE
from migrate.memory.mapping import Region

#: Of a device's regions the guest sees this one.
_REGION = 0


class Window:
    """Region 0 of one device."""

    def __init__(self, client: Client, size: int) -> None:
        """Use `open`."""
        self._client = client
        self._size = size

    @classmethod
    def open(cls, entry: DeviceEntry, engine: Engine, page: PlatformPage) -> Self:
        """Connect, have its interrupt raise its line of the platform page, and show its registers to the guest.

        :raise DeviceGone, DeviceTimeout, DeviceRefused: it is not there, does not answer, or is not usable here.
        """
        with _named(entry.id):
            return cls._open(entry, engine, page)

    @classmethod
    def _open(cls, entry: DeviceEntry, engine: Engine, page: PlatformPage) -> Self:
        client = Client.connect(entry.socket, device=entry.id)
        try:
            info = client.info()
            size = client.region_info(_REGION).size if info.regions else 0
            if not 0 < size <= WINDOW_SIZE:
                raise DeviceRefused(
                    f"its region 0 has {size} bytes; the guest can see 1 to {WINDOW_SIZE}",
                    remedy="this device does not fit into the embedded machine",
                    phase=Phase.SETUP,
                    device=entry.id,
                )
            if info.irqs:
                client.set_irq_eventfd(0, page.line(entry.irq))
            window = cls(client, size)
            engine.map_window(entry.gpa, -(-size // PAGE_SIZE) * PAGE_SIZE, window.read, window.write)
        except BaseException:
            client.close()
            raise
        return window

    def map_memory(self, region: Region) -> None:
        """Let the device reach a region of guest memory."""
        with _named(self._client.device):
            self._client.dma_map(region.gpa, region.size, region.fd, region.offset)

    def read(self, offset: int, size: int) -> int:
        # Between the region's end and the page's there is nothing, as on a bus where nobody answers.
        if offset + size > self._size:
            return 0
        with _named(self._client.device):
            return self._client.region_read(_REGION, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset + size <= self._size:
            with _named(self._client.device):
                self._client.region_write(_REGION, offset, size, value)

    def close(self) -> None:
        self._client.close()


@contextmanager
def _named(device: str) -> Iterator[None]:
    try:
        yield
    except DeviceError as error:
        error.reason = f"its device {device}: {error.reason}"
        error.device = None
        raise
