"""DIR/stdio.sock: where `ferry accept` hands over its stdin and stdout, so that a command such as ssh can carry a migration.

A client connects (SOCK_SEQPACKET) and sends one packet: the preamble that it read from its stdin, with two descriptors. It is
answered with one JSON object, empty or {"error": reason}, and the connection closes when the descriptors are not used any more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from migrate.errors import FerryError, RemoteProtocolError, UsageError
from migrate.host.packets import close_all
from migrate.transport import preamble
from migrate.transport.descriptors import receive_fds
from migrate.transport.sockets import describe_peer

log = logging.getLogger(__name__)

#: Seconds that a client may take for its one packet.
PACKET_SECONDS: Final = 5.0
_BACKLOG: Final = 64

#: Takes preamble, descriptors (not over), who it is, and the connection (over).
OnConnection = Callable[[preamble.Preamble, Sequence[int], str, socket.socket], Awaitable[None]]


class StdioDoor:
    def __init__(self, path: Path, on_connection: OnConnection) -> None:
        """Listen at `path`; whatever is there is a dead daemon's, for the directory is locked.

        :raises UsageError: if that cannot be.
        """
        self._path = path
        self._on_connection = on_connection
        self._tasks: set[asyncio.Task[None]] = set()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            path.unlink(missing_ok=True)
            self._sock.bind(str(path))
            path.chmod(0o600)
            self._sock.listen(_BACKLOG)
        except OSError as error:
            self._sock.close()
            raise UsageError(
                f"cannot listen on {path}: {error.strerror or error}", remedy="choose another --dir"
            ) from None
        self._sock.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._sock)
            except OSError as error:
                log.error("event=stdio-accept error=%s", error)
                await asyncio.sleep(1)  # out of descriptors: it would fail again at once
                continue
            task = loop.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            async with asyncio.timeout(PACKET_SECONDS):
                data, fds = await _receive(connection)
            try:
                if len(fds) != 2:
                    raise RemoteProtocolError("`ferry accept` passes two descriptors")
                who = describe_peer(connection)
                await self._on_connection(preamble.decode(data), fds, f"a command, {who}", connection)
            finally:
                close_all(fds)
            connection.send(b"{}")
        except FerryError as error:
            log.warning("event=stdio-refused error=%s", error)
            _answer(connection, {"error": error.as_reason().to_wire()})
            connection.close()
        except (OSError, asyncio.CancelledError) as error:
            log.info("event=stdio-lost error=%s", error)
            connection.close()

    async def close(self) -> None:
        tasks = [self._accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()
        self._path.unlink(missing_ok=True)


async def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
        data, fds, _ = receive_fds(connection, preamble.SIZE + 1, 4)
    finally:
        loop.remove_reader(connection)
    return data, fds


def _answer(connection: socket.socket, what: dict[str, Any]) -> None:
    try:
        connection.send(json.dumps(what).encode())
    except OSError:
        pass  # it has gone
