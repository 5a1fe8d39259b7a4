"""The connections of the pre-copy bench: the same sockets for vmferry's channels and for the raw limit.

TCP in the clear is no transport of vmferry (memory does not cross a network unencrypted); it is here because it says what
TLS costs.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from migrate.transport import pki, sockets, tls
from migrate.transport.channel import ByteChannel, SocketChannel, TlsChannel
from migrate.transport.deadline import Deadline
from migrate.transport.preamble import SIZE, Kind, Preamble, decode, encode
from migrate.transport.uri import TlsDestination, UnixDestination

TRANSPORTS = ("unix", "tcp", "tls")
SECONDS = 20.0
NAME = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the receiver listens, and a directory with the certificates of both."""

    directory: Path
    port: int

    @property
    def path(self) -> str:
        return str(self.directory / "pages")

    def credentials(self) -> tls.Credentials:
        return tls.load(self.directory / "pki" / NAME, [NAME])


def certify(directory: Path) -> None:
    pki.init(directory / "pki")
    pki.issue(directory / "pki", NAME)


def listen(directory: Path) -> tuple[Place, dict[str, socket.socket]]:
    """Bound sockets by transport."""
    tcp = socket.create_server((NAME, 0))
    place = Place(directory, tcp.getsockname()[1])
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(place.path)
    unix.listen(16)
    return place, {"unix": unix, "tcp": tcp, "tls": tcp}


def connect(place: Place, transport: str, count: int) -> list[socket.socket]:
    return [_connect(place, transport, index) for index in range(count)]


def _connect(place: Place, transport: str, index: int) -> socket.socket:
    first = Preamble(Kind.PAGE, index, bytes(16))
    where = UnixDestination(place.path) if transport == "unix" else TlsDestination(NAME, place.port)
    sock = sockets.connect(where, Deadline(SECONDS))
    if transport != "unix":
        # Linux's default, wherever this runs: bbr paces by what it takes the path to carry, which on loopback is its own guess
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    sock.sendall(encode(first))
    if transport != "tls":
        return sock
    return tls.connect(sock, place.credentials(), NAME, first, Deadline(SECONDS), "the receiver")[0]


def accept(place: Place, transport: str, count: int, bound: socket.socket) -> list[socket.socket]:
    """In order of their index."""
    found: dict[int, socket.socket] = {}
    while len(found) < count:
        sock, _ = bound.accept()
        sockets.tune(sock)
        first = decode(sock.recv(SIZE, socket.MSG_WAITALL))
        if transport == "tls":
            sock = tls.accept(sock, place.credentials(), first, Deadline(SECONDS), "the sender")[0]
        found[first.index] = sock
    return [found[index] for index in sorted(found)]


def channel(sock: socket.socket) -> ByteChannel:
    """vmferry's own page channel over it."""
    kind = TlsChannel if isinstance(sock, ssl.SSLSocket) else SocketChannel
    return kind(sock, "bench", "the other side")  # type: ignore[arg-type]
