"""The back end's socket and thread. What is answered is session.py's business.

One thread waits for the front end's messages and for kicks; a kick only wakes the ring's own thread. One front end at a time:
another waits in the backlog, and one that comes back finds the device as it was left, with its rings stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import selectors
import socket
import threading

from devices.protocols.channel import MAX_FDS, check_path, peer_uid, receive
from devices.protocols.listening import listen
from devices.protocols.vhost_user import messages as m
from devices.protocols.vhost_user.session import Backend, Session

log = logging.getLogger(__name__)


class Server:
    """Serves one device on a Unix socket from `start` to `close`. :ivar session: of the front end that is there now."""

    def __init__(self, path: str, backend: Backend) -> None:
        """:raise UsageError: no socket can be made at `path`, or another process serves there."""
        self.path = check_path(path)
        self.session: Session | None = None
        self._backend = backend
        self._listener = listen(path)
        self._inode = os.stat(path).st_ino
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._connection: socket.socket | None = None
        self._reader: _Reader | None = None
        self._thread = threading.Thread(target=self._run, name="vhost-user", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the connection and removes the socket. Its thread is not waited for: it needs the lock that the caller may have."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def ended(self, seconds: float) -> bool:
        """Wait for the thread. Not with the device's lock."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def drained(self) -> bool:
        """Whether all that the front end has sent by now was carried out. From any thread that has the device's lock: whoever
        carries a message out holds it, so there is none half-way."""
        connection, reader = self._connection, self._reader
        if connection is None or reader is None:
            return True
        return not reader.begun and not select.select([connection], [], [], 0)[0]

    def interrupt(self, ring: int) -> None:
        """The driver wants to know. From any thread."""
        session = self.session
        if session is not None:
            session.interrupt(ring)

    def broken(self, ring: int) -> None:
        session = self.session
        if session is not None:
            session.broken(ring)

    # -- the thread --------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as waits:
            waits.register(self._wake, selectors.EVENT_READ)
            waits.register(self._listener, selectors.EVENT_READ)
            while not self._closing:
                ready = waits.select()
                if self._closing or not any(key.fileobj is self._listener for key, _ in ready):
                    continue
                try:
                    connection, _ = self._listener.accept()
                except OSError as error:
                    log.error("event=accept-failed path=%s error=%r", self.path, str(error))
                    return
                with connection:
                    self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        uid = peer_uid(connection)
        if uid not in (os.geteuid(), 0):
            log.warning("event=client-refused uid=%d reason='only the user of this process may connect'", uid)
            return
        with selectors.DefaultSelector() as waits:
            kicks: dict[int, int] = {}

            def watch(ring: int, fd: int) -> None:
                if ring in kicks:
                    waits.unregister(kicks.pop(ring))
                if fd >= 0:
                    waits.register(fd, selectors.EVENT_READ, ring)
                    kicks[ring] = fd

            session = self.session = Session(self._backend, watch)
            waits.register(connection, selectors.EVENT_READ, -1)
            waits.register(self._wake, selectors.EVENT_READ, -2)
            reader = self._reader = _Reader(connection)
            self._connection = connection
            try:
                while not self._closing:
                    # Messages first: a loaded ring must not keep GET_VRING_BASE waiting.
                    for key, _ in sorted(waits.select(), key=lambda found: found[0].data):
                        if key.data == -1:
                            if not reader.handle(session):
                                return
                            break  # a message may have taken a kick away
                        if key.data >= 0:
                            self._kicked(key.data, key.fd)
            except m.BadRequest as error:
                log.warning("event=client-dropped reason=%r", error.reason)
            except OSError as error:
                log.info("event=client-lost error=%r", str(error))
            finally:
                self.session = self._connection = self._reader = None
                reader.close()
                session.close()

    def _kicked(self, ring: int, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        with self._backend.lock:
            self._backend.notified(ring)


class _Reader:
    """Whole messages from one connection: the header first, then what it says. Descriptors come with the header."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = b""
        self.begun = False  #: a message is here that was not carried out
        self._fds: list[int] = []

    def handle(self, session: Session) -> bool:
        """One read, and the message that it completes. False: the front end has gone. :raise BadRequest, OSError:"""
        self.begun = True
        wanted = m.HEADER_SIZE
        if len(self._data) >= m.HEADER_SIZE:
            wanted += m.header_of(self._data).size
        data, fds, truncated = receive(self._connection, wanted - len(self._data))
        self._fds += fds
        if truncated or len(self._fds) > MAX_FDS:
            raise m.refused("a message has too many descriptors")
        if not data:
            return False
        self._data += data
        if len(self._data) < m.HEADER_SIZE:
            return True
        header = m.header_of(self._data)
        if len(self._data) < m.HEADER_SIZE + header.size:
            return True
        try:
            answer = session.handle(header, memoryview(self._data)[m.HEADER_SIZE :], self._fds)
        finally:
            self._data = b""
            self.close()
            self.begun = False
        if answer is not None:
            try:
                sent = socket.send_fds(self._connection, [answer.data], answer.fds) if answer.fds else 0
            finally:
                for fd in answer.fds:
                    os.close(fd)
            self._connection.sendall(answer.data[sent:])
        return True

    def close(self) -> None:
        """Descriptors that nobody took."""
        while self._fds:
            os.close(self._fds.pop())
