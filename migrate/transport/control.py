"""Opening and accepting control streams and page channels: preamble, TLS, and who is told what went wrong.

Both kinds are set up by the same blocking code, the control stream's in a thread: one TLS handshake, one table of
errors, and alerts that reach the peer (asyncio's own server drops the alert of a handshake that fails).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import socket
import stat
import threading
from collections.abc import Callable

from migrate.errors import TransportError, UsageError
from migrate.transport import sockets, tls
from migrate.transport.channel import ByteChannel, Channel, PipeChannel, SocketChannel, TlsChannel
from migrate.transport.command import Command
from migrate.transport.deadline import Deadline
from migrate.transport.preamble import Kind, Preamble, encode
from migrate.transport.stream import ControlStream
from migrate.transport.uri import (
    Destination,
    ExecDestination,
    LocalDestination,
    TlsDestination,
    UnixDestination,
)

__all__ = ["ControlStream", "Endpoint", "accept_control", "accept_page", "dial_control", "dial_page"]

#: A connected socket, or the descriptors (read, write) of a pair of pipes.
Endpoint = socket.socket | tuple[int, int]

#: Seconds beyond its own deadline that a set-up thread gets to say what went wrong.
_GRACE = 0.5


def dial_page(
    destination: Destination,
    credentials: tls.Credentials | None,
    session: bytes,
    index: int,
    *,
    timeout: float,
) -> Channel:
    """Open a page channel. Blocks for up to `timeout` seconds (and the resolver's own, for a name).

    :raise TransportError: the destination cannot be reached, or one side refuses the other.
    :raise UsageError: a destination that needs credentials and has none, or `local:`.
    """
    return _dial(destination, credentials, Preamble(Kind.PAGE, index, session), timeout)


async def dial_control(
    destination: Destination, credentials: tls.Credentials | None, session: bytes, *, timeout: float
) -> ControlStream:
    """Open a control stream. Raises as `dial_page`."""
    first = Preamble(Kind.CONTROL, 0, session)
    return ControlStream(
        await _in_thread(lambda: _dial(destination, credentials, first, timeout), timeout, str(destination))
    )


def accept_page(
    endpoint: Endpoint, first: Preamble, credentials: tls.Credentials | None, *, timeout: float
) -> Channel:
    """Finish a channel whose preamble `first` was read already. Takes the endpoint over, closes it on failure.

    TCP is always TLS; a Unix socket or pipes never are.

    :raise TransportError, RemoteProtocolError: the peer is not let in.
    :raise UsageError: TCP without credentials, credentials without an allow-list, or descriptors that are no pipes.
    """
    return _accept(endpoint, first, credentials, timeout)


async def accept_control(
    endpoint: Endpoint, first: Preamble, credentials: tls.Credentials | None, *, timeout: float
) -> ControlStream:
    """Finish a control stream whose preamble was read already. As `accept_page`."""
    return ControlStream(
        await _in_thread(lambda: _accept(endpoint, first, credentials, timeout), timeout, "the peer")
    )


def _dial(
    destination: Destination, credentials: tls.Credentials | None, first: Preamble, timeout: float
) -> ByteChannel:
    deadline, label = Deadline(timeout), str(destination)
    channel: ByteChannel
    if isinstance(destination, LocalDestination):
        raise UsageError("local: cannot be used yet", remedy="use unix:/PATH for a host on the same machine")
    if isinstance(destination, ExecDestination):
        command = Command(destination.command)
        channel = PipeChannel(
            command.read_fd, command.write_fd, command, label=f"the command '{destination.command}'"
        )
    elif isinstance(destination, UnixDestination):
        channel = SocketChannel(sockets.connect(destination, deadline), "unix", label)
    else:
        if credentials is None:
            raise UsageError(
                f"{label} needs certificates",
                remedy="make them with `ferry pki init` and `ferry pki issue`, and name their directory",
            )
        return _dial_tls(destination, credentials, first, deadline)
    try:
        channel.send(encode(first))
    except BaseException:
        channel.close()
        raise
    return channel


def _dial_tls(
    destination: TlsDestination, credentials: tls.Credentials, first: Preamble, deadline: Deadline
) -> TlsChannel:
    credentials.check(serving=False)  # our own mistakes before anything is sent
    label = str(destination)
    sock = sockets.connect(destination, deadline)
    try:
        sock.sendall(encode(first))
    except OSError as error:
        sock.close()
        raise sockets.broken(error, label) from error
    secured, peer = tls.connect(sock, credentials, destination.certificate_name, first, deadline, label)
    return TlsChannel(secured, peer, label)


def _accept(
    endpoint: Endpoint, first: Preamble, credentials: tls.Credentials | None, timeout: float
) -> ByteChannel:
    if not isinstance(endpoint, socket.socket):
        read_fd, write_fd = endpoint
        for fd in endpoint:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                os.close(read_fd)
                os.close(write_fd)
                raise UsageError(
                    "stdin and stdout are not pipes",
                    remedy="this is run by a destination exec:…, not by hand",
                )
        return PipeChannel(read_fd, write_fd, label="the command's caller")
    label = sockets.describe_peer(endpoint)
    if endpoint.family == socket.AF_UNIX:
        sockets.tune(endpoint)
        return SocketChannel(endpoint, "unix", label)
    if credentials is None:
        endpoint.close()
        raise UsageError(
            "memory does not cross a network in the clear",
            remedy="give this host certificates: `ferry pki issue`",
        )
    try:
        sockets.tune(endpoint)
    except OSError as error:
        endpoint.close()
        raise sockets.broken(error, label) from error
    secured, peer = tls.accept(endpoint, credentials, first, Deadline(timeout), label)
    return TlsChannel(secured, peer, f"{peer} ({label})")


async def _in_thread(work: Callable[[], ByteChannel], timeout: float, label: str) -> ByteChannel:
    """Run a blocking set-up beside the loop. A channel that comes when nobody waits any more is closed.

    A thread of its own, not the loop's pool: a resolver that hangs must not hold up others, nor our exit.
    """
    result: concurrent.futures.Future[ByteChannel] = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="channel-setup", daemon=True).start()
    try:
        async with asyncio.timeout(timeout + _GRACE):
            return await asyncio.shield(asyncio.wrap_future(result))
    except (TimeoutError, asyncio.CancelledError) as error:
        result.add_done_callback(_close_late)
        if isinstance(error, TimeoutError):
            raise TransportError(
                f"{label}: not connected within {timeout:g} s",
                remedy="check the name service and that the host is up",
            ) from error
        raise


def _close_late(result: concurrent.futures.Future[ByteChannel]) -> None:
    if result.exception() is None:
        channel = result.result()
        channel.abort()
        threading.Thread(target=channel.close, name="channel-setup", daemon=True).start()
