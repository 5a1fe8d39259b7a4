"""The raw limit of a page channel: the least that Python can do to move the same bytes over the same kind of connection.

Plain sockets: sendfile from the memfd, recv_into the mapping. TLS: SSLSocket.send of 1 MiB of the mapping, recv_into. No frames, no
plan, no bitmaps, no checks; as many threads as connections, each with its own stretch of memory. The sockets have a timeout, as
vmferry's do: over TCP on loopback that is twice as fast as without (a receiver that polls leaves the socket's lock to the sender).
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Sequence

from migrate.memory import GuestMemory
from tests.bench import wires
from tests.bench.figures import MIB


def send(memory: GuestMemory, sockets: Sequence[socket.socket]) -> None:
    region = memory.regions[0]

    def one(sock: socket.socket, low: int, high: int) -> None:
        if isinstance(sock, ssl.SSLSocket):
            while low < high:
                low += sock.send(region.view[low : min(low + MIB, high)])
        else:
            while low < high:
                try:
                    low += os.sendfile(sock.fileno(), region.fd, low, high - low)
                except BlockingIOError:
                    select.select([], [sock], [])

    _each(one, memory.size, sockets)


def receive(memory: GuestMemory, sockets: Sequence[socket.socket]) -> None:
    view = memory.regions[0].view

    def one(sock: socket.socket, low: int, high: int) -> None:
        while low < high:
            count = sock.recv_into(view[low:high])
            if not count:
                raise ConnectionError("the sender of the raw limit closed early")
            low += count

    _each(one, memory.size, sockets)


def _each(
    work: Callable[[socket.socket, int, int], None], size: int, sockets: Sequence[socket.socket]
) -> None:
    share = size // len(sockets)
    threads = []
    for index, sock in enumerate(sockets):
        sock.settimeout(wires.SECONDS)
        threads.append(threading.Thread(target=work, args=(sock, index * share, (index + 1) * share)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
