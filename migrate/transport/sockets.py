"""Plain sockets: connecting them, their options, and what their errors mean. No TLS, no framing."""

from __future__ import annotations

import contextlib
import errno
import socket

from migrate.errors import ChannelClosed, TransportError
from migrate.transport.deadline import Deadline
from migrate.transport.uri import TlsDestination, UnixDestination

#: A peer that vanished without a word (power, cable) is noticed after about this many seconds, idle or sending: 20.5 seen
#: with a link taken down. TCP_USER_TIMEOUT does not tell it from one that lives and reads nothing for as long (also 20.5 seen).
DEAD_PEER_SECONDS = 20
_PROBE_AFTER, _PROBE_EVERY, _PROBES = 5, 3, 5

#: Send buffer of a Unix socket in bytes: 2.5 GB/s against 1.9 with the default of 208 KiB. The kernel cuts it to
#: net.core.wmem_max. TCP's buffers are left alone: setting them turns off the kernel's own tuning and gains nothing.
_UNIX_BUFFER = 1 << 20


def tune(sock: socket.socket) -> None:
    """Options for a control or page channel: no delay, death noticed, a send buffer that pays."""
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)


def connect(destination: TlsDestination | UnixDestination, deadline: Deadline) -> socket.socket:
    """Connect, tuned and with no TLS yet. Every address of a name is tried.

    Looking a name up is the resolver's own wait and not bounded by `deadline`.

    :raise TransportError: saying which address and why.
    """
    if isinstance(destination, TlsDestination):
        return _connect_tcp(destination, deadline)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(deadline.left())
        sock.connect(destination.path)
        tune(sock)
    except OSError as error:
        sock.close()
        raise _unreachable(destination, error) from error
    return sock


def _connect_tcp(destination: TlsDestination, deadline: Deadline) -> socket.socket:
    try:
        found = socket.getaddrinfo(destination.host, destination.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise TransportError(
            f"{destination}: the name {destination.host} cannot be resolved ({getattr(error, 'strerror', error)})",
            remedy="correct the name, or give the address",
        ) from error
    failure: OSError = OSError(errno.EADDRNOTAVAIL, "no address")
    for family, kind, protocol, _, address in found:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # a kernel without IPv6
            failure = error
            continue
        try:
            sock.settimeout(deadline.left())
            sock.connect(address)
            tune(sock)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise _unreachable(destination, failure) from failure


_UNREACHABLE = {
    errno.ECONNREFUSED: ("nobody listens there", "start `ferry host` on that host, or correct the address"),
    errno.ENOENT: ("there is no such socket", "start `ferry host`, or correct the path"),
    errno.EACCES: ("this user may not connect to it", "run as the user that `ferry host` runs as"),
    errno.EHOSTUNREACH: ("there is no way to that host", "check the address, the network and the firewall"),
    errno.ENETUNREACH: ("there is no way to that network", "check the address, the network and the firewall"),
}


def _unreachable(destination: TlsDestination | UnixDestination, error: OSError) -> TransportError:
    if isinstance(error, TimeoutError):
        return TransportError(
            f"{destination}: no answer to the attempt to connect",
            remedy="check that the host is up and that no firewall drops it",
        )
    what, remedy = _UNREACHABLE.get(
        error.errno or 0,
        (f"connecting failed: {error.strerror or error}", "check the address, the network and the firewall"),
    )
    return TransportError(f"{destination}: {what}", remedy=remedy)


def describe_peer(sock: socket.socket) -> str:
    """Who is at the other end, for logs and error texts: an address and port, or a process."""
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_UNIX:
            # struct ucred: pid, uid, gid (unix(7))
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return f"process {int.from_bytes(credentials[:4], 'little')} on this host"
        host, port = sock.getpeername()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "a peer that has gone"


def broken(error: OSError, label: str) -> TransportError:
    """The error for a connection that was up: `ChannelClosed` where it is gone, `TransportError` where it only stalls."""
    if isinstance(error, TimeoutError) and error.errno != errno.ETIMEDOUT:
        return TransportError(
            f"{label} has moved no byte for too long", remedy="look at the load and the log of that host"
        )
    if error.errno == errno.ETIMEDOUT:
        return ChannelClosed(
            f"{label} has not been heard of, or has read nothing, for {DEAD_PEER_SECONDS} s",
            remedy="check that host and the network between",
        )
    if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ESHUTDOWN, errno.ENOTCONN):
        return closed(label)
    return ChannelClosed(
        f"the connection with {label} broke: {error.strerror or error}",
        remedy="check that host and the network between",
    )


def closed(label: str) -> ChannelClosed:
    return ChannelClosed(
        f"{label} closed the connection", remedy="look at its log: it, or its host, may have died"
    )


def given_up(label: str) -> ChannelClosed:
    return ChannelClosed(f"the connection with {label} was given up by this side")
