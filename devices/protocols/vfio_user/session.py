"""What a server answers to one client: from the first message to the end of the connection. No I/O.

A session owns what ends with its connection (the DMA windows, the client's eventfds); the device's state is the
Backend's, and outlives it. `SUPPORTED` is the one list of commands; all others are answered with ENOTSUP.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from devices.protocols.vfio_user.framing import Message, close_all
from devices.protocols.vfio_user.messages import (
    ACCESS,
    ERROR,
    HEADER,
    HEADER_SIZE,
    MAX_DMA_MAPS,
    NO_REPLY,
    REPLY,
    TYPE_MASK,
    UNMAP_ALL,
    Command,
    DeviceFlags,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IrqFlags,
    IrqInfo,
    IrqSet,
    RegionFlags,
    RegionInfo,
    RequestError,
    SetIrqs,
    decode_data,
    decode_read,
    invalid,
    refused,
)
from devices.protocols.vfio_user.version import MAJOR, MINOR, OURS, Capabilities, Version

log = logging.getLogger(__name__)


class Window(Protocol):
    """A region as the backend describes it."""

    @property
    def size(self) -> int: ...
    @property
    def read(self) -> bool: ...
    @property
    def write(self) -> bool: ...


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

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Within the region and not empty: the session has checked."""

    def region_write(self, region: int, offset: int, data: bytes) -> None: ...

    def dma_map(self, window: DmaMap, fd: int) -> None:
        """`fd` is closed after the call: what is to last must be mapped or duplicated. No overlap: checked."""

    def dma_unmap(self, address: int, size: int) -> None:
        """All references to the window are gone when this returns."""

    def connect_irq(self, index: int, number: int, eventfd: int | None) -> None:
        """Owns the eventfd from here on; None disconnects. `number` counts within the index."""

    def trigger_irq(self, index: int, number: int) -> None:
        """As if the device itself had raised it."""

    def reset(self) -> None: ...


class Session:
    """One client's connection. `handle` every message, send what it returns, end when `over`; always `close`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._windows: dict[int, int] = {}
        self._handlers: dict[int, Callable[[Message], bytes]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._reset,
        }
        #: What the client said in VERSION; None before.
        self.client: Capabilities | None = None
        #: The connection is to be closed: negotiation failed.
        self.over = False

    def handle(self, message: Message) -> bytes | None:
        """The reply to a message, or None if it wanted none. Closes the descriptors that nobody took. Never raises."""
        message_id, command, _, flags, _ = message.header
        payload, number = b"", 0
        try:
            handler = self._handlers.get(command) if self.client is not None else self._version
            if handler is None:
                raise refused(errno.ENOTSUP, f"command {command} is not known here")
            if flags & TYPE_MASK or message.too_many_fds:
                raise invalid(
                    "a reply came where a command belongs" if flags & TYPE_MASK else "too many descriptors"
                )
            with self._backend.lock:
                payload = handler(message)
        except RequestError as error:
            number = error.errno
            log.info("event=refused command=%d errno=%d reason=%r", command, number, error.reason)
        except Exception:
            number = errno.EIO
            log.exception("event=failed command=%d", command)
        finally:
            if message.fds:
                message.close()
        if number and self.client is None:
            self.over = True
        if flags & NO_REPLY:
            return None
        if number:
            return HEADER.pack(message_id, command, HEADER_SIZE, REPLY | ERROR, number)
        return HEADER.pack(message_id, command, HEADER_SIZE + len(payload), REPLY, 0) + payload

    def close(self) -> None:
        """The client is gone: its windows and eventfds go with it, the device's state stays."""
        with self._backend.lock:
            self._unmap_all()
            for index in range(len(self._backend.irqs)):
                self._disconnect(index)

    # -- negotiation ----------------------------------------------------------------------------------------------------

    def _version(self, message: Message) -> bytes:
        if message.header.command != Command.VERSION:
            raise invalid(f"the first message is command {message.header.command}, not VERSION")
        version = Version.decode(message.payload)
        if version.major != MAJOR:
            raise invalid(
                f"the client speaks version {version.major}.{version.minor}, we speak {MAJOR}.{MINOR}"
            )
        self.client = version.capabilities
        return Version(MAJOR, min(version.minor, MINOR), OURS).encode()

    # -- DMA ------------------------------------------------------------------------------------------------------------

    def _dma_map(self, message: Message) -> bytes:
        window = DmaMap.decode(message.payload)
        end = window.address + window.size
        if any(address < end and window.address < address + size for address, size in self._windows.items()):
            raise refused(errno.EEXIST, f"the DMA window at {window.address:#x} overlaps one that is there")
        if len(self._windows) >= MAX_DMA_MAPS:
            raise refused(errno.ENOSPC, f"more than {MAX_DMA_MAPS} DMA windows")
        if not message.fds:
            raise refused(errno.ENOTSUP, "a DMA window without a descriptor")
        fd = message.take_fd()
        try:
            self._backend.dma_map(window, fd)
        finally:
            close_all([fd])
        self._windows[window.address] = window.size
        return b""

    def _dma_unmap(self, message: Message) -> bytes:
        window = DmaUnmap.decode(message.payload)
        if window.flags & UNMAP_ALL:
            self._unmap_all()
        elif self._windows.get(window.address) != window.size:
            raise refused(errno.ENOENT, f"no DMA window of {window.size} bytes at {window.address:#x}")
        else:
            self._backend.dma_unmap(window.address, window.size)
            del self._windows[window.address]
        return window.encode()

    def _unmap_all(self) -> None:
        while self._windows:
            self._backend.dma_unmap(*self._windows.popitem())

    # -- what the device has ----------------------------------------------------------------------------------------------

    def _device_info(self, message: Message) -> bytes:
        DeviceInfo.decode(message.payload)
        flags = DeviceFlags.RESET | (DeviceFlags.PCI if self._backend.pci else 0)
        return DeviceInfo(flags, len(self._backend.regions), len(self._backend.irqs)).encode()

    def _region_info(self, message: Message) -> bytes:
        index = RegionInfo.decode(message.payload).index
        region = self._region(index)
        flags = (RegionFlags.READ if region.read else 0) | (RegionFlags.WRITE if region.write else 0)
        return RegionInfo(index, flags, 0, region.size, 0).encode()

    def _irq_info(self, message: Message) -> bytes:
        index = IrqInfo.decode(message.payload).index
        self._check_irq(index, 0, 0)
        count = self._backend.irqs[index]
        return IrqInfo(index, IrqFlags.EVENTFD if count else 0, count).encode()

    def _region(self, index: int) -> Window:
        if index >= len(self._backend.regions):
            raise invalid(f"there is no region {index}")
        return self._backend.regions[index]

    # -- interrupts ---------------------------------------------------------------------------------------------------------

    def _check_irq(self, index: int, start: int, count: int) -> None:
        if index >= len(self._backend.irqs):
            raise invalid(f"there is no interrupt index {index}")
        if start + count > self._backend.irqs[index]:
            raise invalid(
                f"interrupt index {index} has {self._backend.irqs[index]}, and {count} from {start} on are named"
            )

    def _set_irqs(self, message: Message) -> bytes:
        """Data: none or a true byte raises the interrupt, an eventfd is what it is signalled by from now on."""
        irqs = IrqSet.decode(message.payload)
        self._check_irq(irqs.index, irqs.start, irqs.count)
        if not irqs.flags & SetIrqs.TRIGGER:
            raise invalid(f"interrupt {irqs.index} cannot be masked")
        if irqs.flags & SetIrqs.DATA_EVENTFD:
            # No descriptor with EVENTFD data takes the eventfds away, as in the kernel's -1.
            if len(message.fds) not in (0, irqs.count):
                raise invalid(f"{len(message.fds)} eventfds for {irqs.count} interrupts")
            for number in range(irqs.start, irqs.start + irqs.count):
                self._backend.connect_irq(irqs.index, number, message.take_fd() if message.fds else None)
        elif irqs.count == 0:
            self._disconnect(irqs.index)
        else:
            for at in range(irqs.count):
                if irqs.flags & SetIrqs.DATA_NONE or irqs.data[at]:
                    self._backend.trigger_irq(irqs.index, irqs.start + at)
        return b""

    def _disconnect(self, index: int) -> None:
        for number in range(self._backend.irqs[index]):
            self._backend.connect_irq(index, number, None)

    # -- access ---------------------------------------------------------------------------------------------------------------

    def _region_read(self, message: Message) -> bytes:
        offset, index, count = decode_read(message.payload)
        region = self._region(index)
        if offset + count > region.size or not region.read:
            raise invalid(f"region {index} ({region.size} bytes) cannot be read at {offset:#x}+{count}")
        data = self._backend.region_read(index, offset, count) if count else b""
        return ACCESS.pack(offset, index, count) + data

    def _region_write(self, message: Message) -> bytes:
        offset, index, data = decode_data(message.payload)
        region = self._region(index)
        if offset + len(data) > region.size or not region.write:
            raise invalid(
                f"region {index} ({region.size} bytes) cannot be written at {offset:#x}+{len(data)}"
            )
        if data:
            self._backend.region_write(index, offset, data)
        return ACCESS.pack(offset, index, len(data))

    def _reset(self, message: Message) -> bytes:
        if len(message.payload):
            raise invalid("a DEVICE_RESET with a payload")
        self._backend.reset()
        return b""
