"""What a server answers to one client: from the first message to the end of the connection. No I/O.

A session owns what ends with its connection (the DMA windows, the client's eventfds and masks, the log of DMA); the device's
state is the Backend's, and outlives it. Each group of commands has a module: regions.py, interrupts.py, features.py; the windows
are here. `_handlers` is the one list of commands; all others are answered with ENOTSUP.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from devices.protocols.vfio_user.backend import Backend
from devices.protocols.vfio_user.client_link import ClientLink, ClientMemory
from devices.protocols.vfio_user.features import Features
from devices.protocols.vfio_user.framing import Message, close_all
from devices.protocols.vfio_user.interrupts import Interrupts
from devices.protocols.vfio_user.messages import (
    ERROR,
    HEADER,
    HEADER_SIZE,
    NO_REPLY,
    REPLY,
    TYPE_MASK,
    UNMAP_ALL,
    Command,
    DeviceFlags,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    RequestError,
    invalid,
    refused,
)
from devices.protocols.vfio_user.peer import Peer
from devices.protocols.vfio_user.regions import Regions
from devices.protocols.vfio_user.version import MAJOR, MINOR, Capabilities, Version, agree

log = logging.getLogger(__name__)


class Session:
    """One client's connection. `handle` every message, send what it returns, end when `over`; always `close`."""

    def __init__(self, backend: Backend, link: ClientLink | None = None) -> None:
        """:param link: the way to ask the client for memory; without one every window needs a descriptor."""
        self._backend = backend
        self._link = link
        self._peer = Peer()
        self._windows: dict[int, int] = {}
        self._interrupts = Interrupts(backend)
        self._features = Features(backend, self._peer, self._windows.items)
        self._handlers: dict[int, Callable[[Message], bytes]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_RESET: self._reset,
            **Regions(backend, self._peer).handlers,
            **self._interrupts.handlers,
            **self._features.handlers,
        }
        #: What the client can take, once it has said so; None before its VERSION.
        self.client: Capabilities | None = None
        #: Whether the connection ends after the reply.
        self.over = False
        #: Descriptors that go with the reply. Whoever sends it calls `sent`.
        self.out_fds = self._peer.out_fds

    def handle(self, message: Message) -> bytes | None:
        """The reply to a message, or None if it wants none."""
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
        if self.out_fds and (number or flags & NO_REPLY):
            self.sent()
        if flags & NO_REPLY:
            return None
        if number:
            return HEADER.pack(message_id, command, HEADER_SIZE, REPLY | ERROR, number)
        return HEADER.pack(message_id, command, HEADER_SIZE + len(payload), REPLY, 0) + payload

    def sent(self) -> None:
        """The reply is on its way, or never will be: its descriptors are not needed any more."""
        self._peer.forget_fds()

    def close(self) -> None:
        """The client is gone: its windows, its eventfds and its log go with it, the device's state stays."""
        self.sent()
        with self._backend.lock:
            self._features.release()
            self._unmap_all()
            self._interrupts.release()

    # -- negotiation ----------------------------------------------------------------------------------------------------

    def _version(self, message: Message) -> bytes:
        if message.header.command != Command.VERSION:
            raise invalid(f"the first message is command {message.header.command}, not VERSION")
        version = Version.decode(message.payload)
        if version.major != MAJOR:
            raise invalid(
                f"the client speaks version {version.major}.{version.minor}, we speak {MAJOR}.{MINOR}"
            )
        agreed = agree(version.capabilities)
        if version.capabilities.twin_socket and version.capabilities.max_msg_fds and self._link is not None:
            self.out_fds.append(self._link.open_twin())
            agreed = agreed._replace(twin_socket=True, twin_fd_index=0)
        self._peer.agreed, self._peer.client = agreed, version.capabilities
        self.client = version.capabilities
        return Version(MAJOR, min(version.minor, MINOR), agreed).encode()

    # -- DMA ------------------------------------------------------------------------------------------------------------

    def _dma_map(self, message: Message) -> bytes:
        window = DmaMap.decode(message.payload)
        end = window.address + window.size
        if any(address < end and window.address < address + size for address, size in self._windows.items()):
            raise refused(errno.EEXIST, f"the DMA window at {window.address:#x} overlaps one that is there")
        if len(self._windows) >= self._peer.agreed.max_dma_maps:
            raise refused(errno.ENOSPC, f"more than {self._peer.agreed.max_dma_maps} DMA windows")
        if message.fds:
            fd = message.take_fd()
            try:
                self._backend.dma_map(window, fd)
            finally:
                close_all([fd])
        else:
            self._map_remote(window)
        self._windows[window.address] = window.size
        return b""

    def _map_remote(self, window: DmaMap) -> None:
        if window.wants_descriptor:
            raise invalid("a DMA window that is reached by its descriptor, and has none")
        if self._link is None or not self._peer.most_data:
            raise refused(errno.ENOTSUP, "a DMA window without a descriptor")
        if window.offset:
            raise invalid(f"a DMA window at offset {window.offset:#x} of no file")
        self._backend.dma_map_remote(window, ClientMemory(self._link, self._peer.most_data))
        self._link.prepare()

    def _dma_unmap(self, message: Message) -> bytes:
        window = DmaUnmap.decode(message.payload)
        if window.flags & UNMAP_ALL:
            self._unmap_all()
        elif self._windows.get(window.address) != window.size:
            raise refused(errno.ENOENT, f"no DMA window of {window.size} bytes at {window.address:#x}")
        else:
            self._unmap(window.address, window.size)
        return window.encode()

    def _unmap(self, address: int, size: int) -> None:
        self._backend.dma_unmap(address, size)
        self._windows.pop(address, None)
        self._features.unmapped(address, size)

    def _unmap_all(self) -> None:
        while self._windows:
            self._unmap(*self._windows.popitem())

    # -- the device -------------------------------------------------------------------------------------------------------

    def _device_info(self, message: Message) -> bytes:
        DeviceInfo.decode(message.payload)
        flags = DeviceFlags.RESET | (DeviceFlags.PCI if self._backend.pci else 0)
        return DeviceInfo(flags, len(self._backend.regions), len(self._backend.irqs)).encode()

    def _reset(self, message: Message) -> bytes:
        if len(message.payload):
            raise invalid("a DEVICE_RESET with a payload")
        self._backend.reset()
        return b""
