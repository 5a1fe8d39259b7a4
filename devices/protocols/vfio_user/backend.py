"""What stands behind a server: the device, its state and its memory, as vfio-user asks for them. Interfaces only."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from devices.protocols.vfio_user.dma_log import DmaLog
from devices.protocols.vfio_user.feature_messages import Envelope, Remaining
from devices.protocols.vfio_user.messages import DmaMap
from devices.protocols.vfio_user.region_messages import IoEventfd, RegionMemory


class Window(Protocol):
    """A region as the backend describes it."""

    @property
    def size(self) -> int: ...
    @property
    def read(self) -> bool: ...
    @property
    def write(self) -> bool: ...


class RemoteMemory(Protocol):
    """Guest memory that only the client can reach. Within one window: checked by whoever has the windows."""

    def read(self, address: int, size: int) -> bytes:
        """:raise MemoryFault: the client refused, or is gone."""

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """:raise MemoryFault: as read; some of it may have been written."""


class Migration(Protocol):
    """The state of a device, for a VMM that migrates it. States are numbers of MigrationState."""

    @property
    def offered(self) -> bool:
        """Whether the VMM moves this device. If not, nothing here is called but `state` and `envelope`."""

    @property
    def flags(self) -> int:
        """MigrationFlags."""

    @property
    def state(self) -> int: ...

    def set_state(self, state: int) -> None:
        """Returns when the whole way is gone. :raise RequestError: there is no such way, or it ended underway."""

    def read(self, size: int) -> bytes:
        """As many bytes as there are, up to `size`. :raise RequestError: there are none in this state."""

    def write(self, data: memoryview) -> None:
        """:raise RequestError: not in this state, or it is not what a device like this one gave."""

    def remaining(self) -> Remaining:
        """:raise RequestError: nothing is being read in this state."""

    def envelope(self) -> Envelope: ...

    def choose_version(self, version: int) -> None:
        """:raise RequestError: in that schema version nothing is written here."""

    def client_gone(self) -> None:
        """Whoever comes next reads, or writes, from the beginning."""


class Backend(Protocol):
    """The device behind a server. Every method is called with `lock` held and may raise RequestError."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...
    @property
    def regions(self) -> Sequence[Window]: ...
    @property
    def pci(self) -> bool:
        """Whether regions and interrupt indexes are numbered as VFIO numbers those of a PCI function."""

    @property
    def irqs(self) -> Sequence[int]:
        """How many interrupts each index has."""

    @property
    def maskable(self) -> Container[int]:
        """The indexes whose interrupts a client may mask."""

    @property
    def migration(self) -> Migration | None: ...

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Within the region and not empty: the session has checked."""

    def region_write(self, region: int, offset: int, data: bytes) -> None: ...

    def region_memory(self, region: int) -> RegionMemory | None:
        """What of a region a client may map. Its descriptor stays the backend's."""

    def io_fds(self, region: int) -> Sequence[IoEventfd]:
        """By which descriptors writes to a region can be replaced. They stay the backend's."""

    def dma_map(self, window: DmaMap, fd: int) -> None:
        """`fd` is closed after the call: what is to last must be mapped or duplicated. No overlap: checked."""

    def dma_map_remote(self, window: DmaMap, memory: RemoteMemory) -> None:
        """The same for a window without a descriptor."""

    def dma_unmap(self, address: int, size: int) -> None:
        """All references to the window are gone when this returns."""

    def log_dma(self, log: DmaLog | None) -> None:
        """From now on mark there whatever is written to a window; None: no more."""

    def connect_irq(self, index: int, number: int, eventfd: int | None) -> None:
        """Owns the eventfd from here on; None disconnects. `number` counts within the index."""

    def mask_irq(self, index: int, number: int, masked: bool) -> None:
        """Of a maskable index: while it is masked an interrupt is kept."""

    def trigger_irq(self, index: int, number: int) -> None:
        """As if the device itself had raised it."""

    def reset(self) -> None: ...
