"""JSON packets with descriptors over an AF_UNIX SOCK_SEQPACKET pair: how the daemon and a destination's coordinator talk.

The coordinator faces the network, so what comes from it is bounded and checked; what a packet *means* is incoming.py's.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final

from migrate.errors import LocalProtocolError, RemoteProtocolError, TransportError
from migrate.transport.descriptors import receive_fds

MAX_PACKET: Final = 128 << 10
MAX_FDS: Final = 8


class Packets:
    """One end of a pair; takes the socket over. One task reads."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()

    async def send(self, packet: Mapping[str, Any], fds: Sequence[int] = (), *, timeout: float) -> None:
        """Send one packet; `fds` stay the caller's.

        :raises TransportError: the other end is gone, or did not take it in time.
        """
        data = json.dumps(packet).encode()
        if len(data) > MAX_PACKET:
            raise LocalProtocolError(f"a packet of {len(data)} bytes, at most {MAX_PACKET}")
        try:
            async with asyncio.timeout(timeout), self._sending:
                while True:
                    try:
                        socket.send_fds(self._sock, [data], fds, socket.MSG_NOSIGNAL)
                        return
                    except BlockingIOError:
                        await self._ready(self._loop.add_writer, self._loop.remove_writer)
        except OSError as error:  # TimeoutError is one
            raise TransportError(
                f"the coordinator did not take a message: {error.strerror or 'no answer in time'}",
                remedy="its log says what it was doing",
            ) from error

    async def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next packet with its descriptors, which are the caller's (close-on-exec); None at the end.

        :raises RemoteProtocolError: what came is no packet.
        """
        while True:
            try:
                data, fds, flags = receive_fds(self._sock, MAX_PACKET, MAX_FDS)
                break
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
            except ConnectionResetError:
                return None
        if not data:
            return None
        try:
            packet = None if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) else json.loads(data)
        except (ValueError, RecursionError):
            packet = None
        if not isinstance(packet, dict):
            close_all(fds)
            raise RemoteProtocolError("the coordinator sent something that is not one JSON object")
        return packet, fds

    async def _ready(self, add: Any, remove: Any) -> None:
        ready = asyncio.Event()
        add(self._sock, ready.set)
        try:
            await ready.wait()
        finally:
            remove(self._sock)

    def close(self) -> None:
        self._sock.close()


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
