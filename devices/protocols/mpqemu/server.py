"""What comes in and goes out of the server's socket. What is answered is session.py's business.

QEMU does not connect by itself: who starts it connects to this socket, and has QEMU inherit the descriptor
(`-device x-pci-proxy-dev,fd=N`).
"""

from __future__ import annotations

import logging
import os
import socket

from devices.protocols.channel import receive
from devices.protocols.mpqemu import messages as m
from devices.protocols.mpqemu.session import Backend, Session
from devices.protocols.serving import OneClientServer

log = logging.getLogger(__name__)


class Server(OneClientServer):
    """Serves one device on a Unix socket from `start` to `close`."""

    def __init__(self, path: str, backend: Backend) -> None:
        """:raise UsageError: no socket can be made at `path`, or another process serves there."""
        super().__init__(path, "mpqemu")
        self._backend = backend

    def _serve(self, connection: socket.socket) -> None:
        session = Session(self._backend)
        fds: list[int] = []
        try:
            while True:
                head = _read(connection, m.HEADER.size, fds)
                if not head:
                    return
                command, size = m.header_of(head)
                payload = memoryview(_read(connection, size, fds))
                answer = session.handle(command, payload, fds)
                _close(fds)
                if answer is not None:
                    connection.sendall(answer)
        except m.BadMessage as error:
            log.warning("event=client-dropped reason=%r", error.reason)
        except OSError as error:
            log.info("event=client-lost error=%r", str(error))
        finally:
            _close(fds)
            session.close()


def _read(connection: socket.socket, size: int, fds: list[int]) -> bytes:
    """Exactly so many bytes, or none where the client ends between two messages; descriptors are added to `fds`.

    :raise BadMessage: an end within a message, or more descriptors than any message has.
    """
    data = b""
    while len(data) < size:
        got, more, truncated = receive(connection, size - len(data))
        fds += more
        if truncated or len(fds) > m.MAX_REGIONS:
            raise m.bad("a message has too many descriptors")
        if not got:
            if data or size != m.HEADER.size:
                raise m.bad("the connection ended within a message")
            return b""
        data += got
    return data


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
