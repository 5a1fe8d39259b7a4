"""The other end: a VMM's calls to a device in a process of its own, such as a QEMU of the machine type `x-remote`.

There is no heartbeat message in QEMU 7.2: every call has a deadline, and a device that misses it is gone.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Self

from devices.protocols.channel import check_path, receive
from devices.protocols.mpqemu import messages as m
from devices.protocols.mpqemu.messages import BarAccess, Command, ConfigAccess, Sysmem
from migrate.errors import DeviceGone, DeviceRefused, DeviceTimeout, Phase

#: Seconds for a call, from its first byte to its answer's last.
TIMEOUT: Final = 3.5


class Client:
    """Calls from any thread, one after the other. After DeviceTimeout it may be asked again; after DeviceGone it is of no use."""

    def __init__(self, connection: socket.socket, device: str = "", timeout: float = TIMEOUT) -> None:
        """:param connection: owned from here on. :param device: for errors."""
        self.device = device
        self._socket = connection
        self._timeout = timeout
        self._lock = threading.Lock()
        self._broken = self._half = False  #: no use any more; a message may have gone in part
        self._owed = 0  #: answers that are yet to come
        self._received = bytearray()

    @classmethod
    def connect(cls, path: str, device: str = "", timeout: float = TIMEOUT) -> Self:
        """:raise DeviceGone: nobody serves there."""
        check_path(path)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise DeviceGone(
                f"nobody serves at {path}: {error.strerror or error}",
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
        """All of guest memory, in place of what was said before; a descriptor a region, which stay the caller's. No answer.

        :raise BadMessage: more regions than a message has room for.
        """
        self._send(m.encode_sysmem(regions), fds)

    def connect_irq(self, interrupt: int, resample: int) -> None:
        """Eventfds for INTx, which stay the caller's. No answer."""
        self._send(m.encode(Command.SET_IRQFD), (interrupt, resample))

    # -- the wire -----------------------------------------------------------------------------------------------------------------

    def _value(self, message: bytes, size: int) -> int:
        answer = self._call(message)
        if answer is None:
            raise self._refused("an answer without a value")
        return answer & (1 << 8 * size) - 1

    def _send(self, message: bytes, fds: Sequence[int]) -> None:
        with self._lock, self._blame():
            self._transmit(message, fds, time.monotonic() + self._timeout)

    def _call(self, message: bytes) -> int | None:
        with self._lock, self._blame():
            deadline = time.monotonic() + self._timeout
            while self._owed:  # to calls whose deadline was missed
                self._answer(deadline)
            self._transmit(message, (), deadline)
            self._owed += 1
            return self._answer(deadline)

    def _transmit(self, message: bytes, fds: Sequence[int], deadline: float) -> None:
        self._wait_until(deadline)
        self._half = True
        sent = socket.send_fds(self._socket, [message], list(fds)) if fds else 0
        self._socket.sendall(message[sent:])
        self._half = False

    def _answer(self, deadline: float) -> int | None:
        """The next answer. What has come of it stays, where the rest does not come in time."""
        self._receive(m.HEADER.size, deadline)
        end = m.HEADER.size + m.ret_size(bytes(self._received[: m.HEADER.size]))
        self._receive(end, deadline)
        payload = bytes(self._received[m.HEADER.size : end])
        del self._received[:end]
        self._owed -= 1
        return m.decode_ret(payload)

    def _receive(self, size: int, deadline: float) -> None:
        while len(self._received) < size:
            self._wait_until(deadline)
            got, fds, _ = receive(self._socket, size - len(self._received))
            for fd in fds:  # nobody is to send any
                os.close(fd)
            if not got:
                raise ConnectionResetError("it has closed the connection")
            self._received += got

    def _wait_until(self, deadline: float) -> None:
        """One deadline for all of a call: a peer that answers byte by byte does not get one for each."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    @contextmanager
    def _blame(self) -> Iterator[None]:
        """A late answer is known for what it is: they come in order. A message that went in part leaves nothing to go on with."""
        if self._broken:
            raise self._gone("its connection is of no use since an earlier failure")
        try:
            yield
        except TimeoutError:
            self._broken = self._half
            raise DeviceTimeout(
                f"it has not answered for {self._timeout:g} s",
                device=self.device,
                phase=Phase.RUNNING,
                remedy="see its log",
            ) from None
        except OSError as error:
            self._broken = True
            raise self._gone(error.strerror or str(error)) from None
        except m.BadMessage as error:
            self._broken = True
            raise self._refused(error.reason) from None

    def _gone(self, reason: str) -> DeviceGone:
        return DeviceGone(reason, device=self.device, phase=Phase.RUNNING, remedy="see its log")

    def _refused(self, reason: str) -> DeviceRefused:
        return DeviceRefused(
            reason, device=self.device, phase=Phase.RUNNING, remedy="is it multi-process QEMU?"
        )
