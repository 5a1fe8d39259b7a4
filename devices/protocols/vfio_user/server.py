"""What comes in and goes out of the server's socket. What is answered is session.py's business."""

from __future__ import annotations

import contextlib
import logging
import socket

from devices.protocols.channel import READ_LARGE, READ_SIZE, receive
from devices.protocols.serving import OneClientServer
from devices.protocols.vfio_user.backend import Backend
from devices.protocols.vfio_user.client_link import ClientLink
from devices.protocols.vfio_user.framing import FramingError
from devices.protocols.vfio_user.messages import error_reply
from devices.protocols.vfio_user.session import Session

log = logging.getLogger(__name__)


class Server(OneClientServer):
    """Serves one device on a Unix socket from `start` to `close`."""

    def __init__(self, path: str, backend: Backend) -> None:
        """:raise UsageError: no socket can be made at `path`, or another process serves there."""
        super().__init__(path, "vfio-user")
        self._backend = backend

    def _serve(self, connection: socket.socket) -> None:
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
