"""The server's socket and thread. What is answered is session.py's business.

One thread, one client at a time: a region access is a round trip that the guest waits for, so it is served by blocking
calls and costs two system calls here. A second client waits in the backlog until the first has gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading

from devices.protocols.channel import READ_LARGE, READ_SIZE, check_path, peer_uid, receive
from devices.protocols.listening import listen
from devices.protocols.vfio_user.backend import Backend
from devices.protocols.vfio_user.client_link import ClientLink
from devices.protocols.vfio_user.framing import FramingError
from devices.protocols.vfio_user.messages import error_reply
from devices.protocols.vfio_user.session import Session

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
        #: Guards `_connection` and `_closing` against a close() that comes while a client is accepted.
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="vfio-user", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the connection and removes the socket. A device's callback that hangs is left behind after a second."""
        with self._guard:
            self._closing = True
            for sock in (self._connection, self._listener):
                # shutdown and not close: it wakes the thread that is blocked in accept or recvmsg.
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
                        connection.close()
                        self._connection = None

    def _serve(self, connection: socket.socket) -> None:
        uid = peer_uid(connection)
        if uid not in (os.geteuid(), 0):
            log.warning("event=client-refused uid=%d reason='only the user of this process may connect'", uid)
            return
        link = ClientLink(connection)
        session, assembler = Session(self._backend, link), link.assembler
        try:
            while not session.over and not link.inline:
                while (message := assembler.next()) is None:
                    size = READ_SIZE if assembler.missing <= READ_SIZE else READ_LARGE
                    data, fds, truncated = receive(connection, size)
                    if not data:
                        return
                    assembler.feed(data, fds, truncated)
                reply = session.handle(message)
                if session.out_fds:
                    _send_with(connection, reply or b"", session)
                elif reply is not None:
                    connection.sendall(reply)
            while not session.over:
                # The client's memory is on the other side of this socket: commands and replies come mixed.
                reply = session.handle(link.next_command())
                if session.out_fds:
                    with link.sending:
                        _send_with(connection, reply or b"", session)
                elif reply is not None:
                    link.send(reply)
        except FramingError as error:
            log.warning("event=client-dropped reason=%r", error.reason)
            with contextlib.suppress(OSError):
                connection.sendall(error_reply(error.header.id, error.header.command, error.errno))
        except OSError as error:
            log.info("event=client-lost error=%r", str(error))
        finally:
            link.close()
            session.close()


def _send_with(connection: socket.socket, reply: bytes, session: Session) -> None:
    """A reply with descriptors: they go with its first byte."""
    try:
        sent = socket.send_fds(connection, [reply], session.out_fds)
    finally:
        session.sent()
    connection.sendall(memoryview(reply)[sent:])
