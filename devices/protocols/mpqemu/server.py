"""The socket and its thread. What is answered is session.py's business.

QEMU does not connect by itself: who starts it connects to this socket, and has QEMU inherit the descriptor
(`-device x-pci-proxy-dev,fd=N`). One client at a time, as behind vfio-user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading

from devices.protocols.channel import check_path, peer_uid, receive
from devices.protocols.listening import listen
from devices.protocols.mpqemu import messages as m
from devices.protocols.mpqemu.session import Backend, Session

log = logging.getLogger(__name__)


class Server:
    """Serves one device on a Unix socket from `start` to `close`."""

    def __init__(self, path: str, backend: Backend) -> None:
        """:raise UsageError: no socket can be made at `path`, or another process serves there."""
        self.path = check_path(path)
        self._backend = backend
        self._listener = listen(path)
        self._inode = os.stat(path).st_ino
        self._connection: socket.socket | None = None
        self._closing = False
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="mpqemu", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the connection and removes the socket. A device's callback that hangs is left behind after a second."""
        with self._guard:
            self._closing = True
            for sock in (self._connection, self._listener):
                with contextlib.suppress(OSError):
                    if sock is not None:
                        sock.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join(1.0)
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closing:
                    log.error("event=accept-failed path=%s error=%r", self.path, str(error))
                return
            with connection:
                with self._guard:
                    if self._closing:
                        return
                    self._connection = connection
                try:
                    self._serve(connection)
                finally:
                    with self._guard:
                        self._connection = None

    def _serve(self, connection: socket.socket) -> None:
        uid = peer_uid(connection)
        if uid not in (os.geteuid(), 0):
            log.warning("event=client-refused uid=%d reason='only the user of this process may connect'", uid)
            return
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
