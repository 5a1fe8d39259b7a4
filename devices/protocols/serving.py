"""A socket and its thread that serve one client at a time: what servers have in common whose every message is a round trip.

A guest waits for the answer to a register access, so it is served by blocking calls and costs two system calls here. A second
client waits in the backlog until the first has gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading

from devices.protocols.channel import check_path, peer_uid
from devices.protocols.listening import listen

log = logging.getLogger(__name__)


class OneClientServer:
    """Serves one device on a Unix socket from `start` to `close`. A subclass has `_serve`."""

    def __init__(self, path: str, name: str) -> None:
        """:param name: its thread's. :raise UsageError: no socket can be made at `path`, or another process serves there."""
        self.path = check_path(path)
        self._listener = listen(path)
        self._inode = os.stat(path).st_ino
        self._connection: socket.socket | None = None
        self._closing = False
        #: Guards `_connection` and `_closing` against a close() that comes while a client is accepted.
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _serve(self, connection: socket.socket) -> None:
        """One client, of this user, from its first message to its end."""
        raise NotImplementedError

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
                    uid = peer_uid(connection)
                    if uid in (os.geteuid(), 0):
                        self._serve(connection)
                    else:
                        log.warning(
                            "event=client-refused uid=%d reason='only the user of this process may connect'",
                            uid,
                        )
                finally:
                    with self._guard:
                        connection.close()
                        self._connection = None
