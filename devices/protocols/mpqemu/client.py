"""The other end: a VMM's calls to a device in a process of its own, such as a QEMU of the machine type `x-remote`.

There is no heartbeat message in QEMU 7.2: every call has a deadline, and a device that misses it is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Final, Self

from devices.protocols.channel import check_path, receive
from devices.protocols.mpqemu import messages as m
from devices.protocols.mpqemu.messages import BarAccess, Command, ConfigAccess, Sysmem
from migrate.errors import DeviceError, DeviceGone, DeviceRefused, DeviceTimeout, Phase

#: Seconds for a call, from its first byte to its answer's last.
TIMEOUT: Final = 3.5
_RET: Final = struct.Struct("=Q")


class Client:
    """Calls from any thread, one after the other. After DeviceTimeout or DeviceGone the connection is of no use."""

    def __init__(self, connection: socket.socket, device: str = "", timeout: float = TIMEOUT) -> None:
        """:param connection: owned from here on. :param device: for errors."""
        self.device = device
        self._socket = connection
        self._socket.settimeout(timeout)
        self._lock = threading.Lock()
        self._broken = False

    @classmethod
    def connect(cls, path: str, device: str = "", timeout: float = TIMEOUT) -> Self:
        """:raise DeviceGone: nobody serves there."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(check_path(path))
        except OSError as error:
            connection.close()
            raise DeviceGone(
                f"nobody serves at {path}: {error.strerror}",
                device=device,
                phase=Phase.SETUP,
                remedy="is the device's process running?",
            ) from None
        return cls(connection, device, timeout)

    def close(self) -> None:
        self._socket.close()

    # -- calls --------------------------------------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """1, 2 or 4 bytes of configuration space. :raise DeviceGone, DeviceTimeout, DeviceRefused:"""
        return self._value(m.encode_config(Command.PCI_CFGREAD, ConfigAccess(offset, 0, size)), size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        self._value(m.encode_config(Command.PCI_CFGWRITE, ConfigAccess(offset, value, size)), 8)

    def bar_read(self, address: int, size: int, *, memory: bool = True) -> int:
        """`address` is the guest's, not counted from the BAR."""
        return self._value(m.encode_bar(Command.BAR_READ, BarAccess(address, 0, size, memory)), size)

    def bar_write(self, address: int, size: int, value: int, *, memory: bool = True) -> None:
        self._value(m.encode_bar(Command.BAR_WRITE, BarAccess(address, value, size, memory)), 8)

    def reset(self) -> None:
        self._call(m.encode(Command.DEVICE_RESET))

    def share_memory(self, regions: Sequence[Sysmem], fds: Sequence[int]) -> None:
        """All of guest memory, in place of what was said before; a descriptor a region, which stay the caller's. No answer."""
        self._send(m.encode_sysmem(list(regions)), fds)

    def connect_irq(self, interrupt: int, resample: int) -> None:
        """Eventfds for INTx, which stay the caller's. No answer."""
        self._send(m.encode(Command.SET_IRQFD), (interrupt, resample))

    # -- the wire -----------------------------------------------------------------------------------------------------------------

    def _value(self, message: bytes, size: int) -> int:
        answer = self._call(message)
        if answer is None:
            raise self._refused("an answer without a value")
        return answer & (1 << 8 * size) - 1

    def _send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        with self._lock:
            self._transmit(message, fds)

    def _call(self, message: bytes) -> int | None:
        with self._lock:
            self._transmit(message, ())
            head = self._read(m.HEADER.size)
            command, size = m.HEADER.unpack(head)
            if command != Command.RET or size not in (0, _RET.size):
                self._broken = True
                raise self._refused(f"an answer that is none: command {command} of {size} bytes")
            return int(_RET.unpack(self._read(size))[0]) if size else None

    def _transmit(self, message: bytes, fds: Sequence[int]) -> None:
        if self._broken:
            raise self._gone("its connection is of no use since an earlier failure")
        try:
            sent = socket.send_fds(self._socket, [message], list(fds)) if fds else 0
            self._socket.sendall(message[sent:])
        except OSError as error:
            raise self._lost(error) from None

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                got, fds, _ = receive(self._socket, size - len(data))
            except OSError as error:
                raise self._lost(error) from None
            for fd in fds:  # nobody is to send any
                with contextlib.suppress(OSError):
                    os.close(fd)
            if not got:
                raise self._lost(ConnectionResetError("it has closed the connection"))
            data += got
        return data

    def _lost(self, error: OSError) -> DeviceError:
        self._broken = True
        if isinstance(error, TimeoutError):
            return DeviceTimeout(
                f"it has not answered for {self._socket.gettimeout():g} s",
                device=self.device,
                phase=Phase.RUNNING,
                remedy="see its log",
            )
        return self._gone(error.strerror or str(error))

    def _gone(self, reason: str) -> DeviceGone:
        return DeviceGone(reason, device=self.device, phase=Phase.RUNNING, remedy="see its log")

    def _refused(self, reason: str) -> DeviceRefused:
        return DeviceRefused(
            reason, device=self.device, phase=Phase.RUNNING, remedy="is it multi-process QEMU?"
        )
