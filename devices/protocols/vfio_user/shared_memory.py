"""A client's memory that a server cannot map, or does not: windows that it reads and writes by DMA_READ and DMA_WRITE, and who
answers those.

With a twin socket a thread of its own answers, at any time. In line they come in the midst of calls (connection.py), and between
calls nobody looks: a client whose device may ask at any time wants the twin socket, or calls `Client.serve`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Callable

from devices.protocols.channel import READ_LARGE, READ_SIZE, receive
from devices.protocols.vfio_user.framing import Assembler, Message
from devices.protocols.vfio_user.messages import (
    DMA,
    NO_REPLY,
    REPLY,
    TYPE_MASK,
    Command,
    RequestError,
    decode_dma,
    error_reply,
    invalid,
    message,
    refused,
)
from migrate.errors import FerryError

log = logging.getLogger(__name__)

#: What a server may ask of a client.
SERVED = (Command.DMA_READ, Command.DMA_WRITE)


class SharedByMessage:
    """Which bytes of this process a server may have. Every access is whole within one window, or is refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: dict[int, tuple[memoryview, bool]] = {}
        #: Told of what a server has written, address and bytes, before it is answered: whoever writes keeps the log.
        self.wrote: Callable[[int, int], None] | None = None
        self._silent = False

    def add(self, address: int, memory: memoryview, *, writable: bool) -> bool:
        """False: there is one at this address, which stays as it is."""
        with self._lock:
            fresh = address not in self._windows
            self._windows.setdefault(address, (memory, writable))
            return fresh

    def silence(self, silent: bool) -> None:
        """Whether nothing is to be written any more: when this returns, what was under way is there, and told."""
        with self._lock:
            self._silent = silent

    def remove(self, address: int) -> None:
        with self._lock:
            self._windows.pop(address, None)

    def clear(self) -> None:
        with self._lock:
            self._windows.clear()

    def answer(self, asked: Message) -> bytes | None:
        """The reply to a DMA_READ or DMA_WRITE; None if it wants none. Never raises: what is wrong is an errno."""
        header = asked.header
        asked.close()
        number, payload = 0, b""
        try:
            if header.flags & TYPE_MASK or header.command not in SERVED:
                raise refused(errno.ENOTSUP, f"command {header.command} is not for a client")
            payload = self._serve(header.command == Command.DMA_WRITE, asked.payload)
        except RequestError as error:
            number = error.errno
            log.warning("event=refused command=%d errno=%d reason=%r", header.command, number, error.reason)
        if header.flags & NO_REPLY:
            return None
        if number:
            return error_reply(header.id, header.command, number)
        return message(header.id, header.command, payload, REPLY)

    def _serve(self, write: bool, payload: memoryview) -> bytes:
        address, count, data = decode_dma(payload, data=write)
        with self._lock:
            for start, (memory, writable) in self._windows.items():
                if start <= address and address + count <= start + len(memory):
                    at = address - start
                    if not write:
                        return DMA.pack(address, count) + memory[at : at + count]
                    if self._silent:
                        raise refused(
                            errno.EBUSY, f"{count} bytes at {address:#x} while the device stands still"
                        )
                    if not writable:
                        raise refused(errno.EPERM, f"{count} bytes at {address:#x} may only be read")
                    memory[at : at + count] = data
                    if self.wrote is not None:
                        self.wrote(address, count)
                    return DMA.pack(address, count)
        raise invalid(f"{count} bytes at {address:#x} are in no window that is shared by messages")


class Twin:
    """The second socket: a thread that answers what the server asks, until either side closes."""

    def __init__(self, connection: socket.socket, memory: SharedByMessage) -> None:
        """Owns the socket."""
        self._socket = connection
        self._memory = memory
        self._thread = threading.Thread(target=self._run, name="vfio-user-twin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(1.0)
        self._socket.close()

    def _run(self) -> None:
        assembler = Assembler()
        try:
            while True:
                while (asked := assembler.next()) is None:
                    size = READ_SIZE if assembler.missing <= READ_SIZE else READ_LARGE
                    data, fds, truncated = receive(self._socket, size)
                    if not data:
                        return
                    assembler.feed(data, fds, truncated)
                reply = self._memory.answer(asked)
                if reply is not None:
                    self._socket.sendall(reply)
        except (OSError, FerryError) as error:
            log.info("event=twin-lost error=%r", str(error))
        finally:
            assembler.close()
            with contextlib.suppress(OSError):
                # The server must not wait for an answer that will never come.
                self._socket.shutdown(socket.SHUT_RDWR)
