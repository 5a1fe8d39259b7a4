"""Where a host's daemon is reached: binds addresses, reads the preamble of each connection, hands the socket on.

It does no TLS and knows no session: the callback decides by the preamble who gets the socket, and that process calls
`control.accept_control` or `accept_page`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import FerryError, RemoteProtocolError, UsageError
from migrate.transport import preamble, sockets
from migrate.transport.tls import Credentials
from migrate.transport.uri import ListenAddress, TlsDestination, UnixDestination

log = logging.getLogger(__name__)

#: Seconds for the 32 bytes of the preamble.
PREAMBLE_SECONDS = 5.0
#: Connections that may owe us their preamble at a time. More wait in the kernel's queue, in order, for at most 5 s each.
MAX_HALF_OPEN = 64
_BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Arrival:
    """A connection whose preamble is read. The socket is blocking, close-on-exec, and the callback's to close."""

    first: preamble.Preamble
    sock: socket.socket
    kind: str  #: "tls" or "unix": what it came in by
    remote: str  #: who it is, for logs


class Listener:
    """Use `listen`. Runs until `close`."""

    def __init__(
        self, bound: list[socket.socket], kind: str, callback: Callable[[Arrival], Awaitable[None]]
    ) -> None:
        self._bound = bound
        self._kind = kind
        self._callback = callback
        self._slots = asyncio.Semaphore(MAX_HALF_OPEN)
        self._served: set[asyncio.Task[None]] = set()
        self._path = bound[0].getsockname() if kind == "unix" else None
        self._inode = os.stat(self._path).st_ino if self._path else None
        self._accepting = [asyncio.create_task(self._accept(sock)) for sock in bound]

    @property
    def addresses(self) -> list[ListenAddress]:
        """What is bound, with the port that the kernel chose where 0 was asked for."""
        if self._path:
            return [UnixDestination(self._path)]
        return [TlsDestination(*sock.getsockname()[:2]) for sock in self._bound]

    async def close(self) -> None:
        """Stop listening and drop connections not yet handed on. A Unix socket's file goes, if it is still ours."""
        tasks = [*self._accepting, *self._served]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in self._bound:
            sock.close()
        if self._path:
            with contextlib.suppress(OSError):
                if os.stat(self._path).st_ino == self._inode:
                    os.unlink(self._path)

    async def _accept(self, bound: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._slots.acquire()
            try:
                sock, _ = await loop.sock_accept(bound)
            except OSError as error:
                self._slots.release()
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.error(
                        "cannot take a connection: %s; raise LimitNOFILE or find who leaks", error.strerror
                    )
                    await asyncio.sleep(1)  # it stays in the queue, and accept would fail again at once
                continue
            except BaseException:
                self._slots.release()
                raise
            task = asyncio.create_task(self._serve(sock))
            self._served.add(task)
            task.add_done_callback(self._served.discard)
            task.add_done_callback(lambda task, sock=sock: sock.close() if task.cancelled() else None)  # type: ignore[misc]

    async def _serve(self, sock: socket.socket) -> None:
        remote = sockets.describe_peer(sock)
        try:
            try:
                sockets.tune(sock)
                first = await _read_preamble(sock)
            finally:
                self._slots.release()
            sock.setblocking(True)
            await self._callback(Arrival(first, sock, self._kind, remote))
        except (FerryError, OSError) as error:
            log.warning("connection from %s dropped: %s", remote, error)
            sock.close()
        except Exception:
            log.exception("connection from %s dropped", remote)
            sock.close()


async def listen(
    address: ListenAddress,
    callback: Callable[[Arrival], Awaitable[None]],
    credentials: Credentials | None = None,
) -> Listener:
    """Bind an address and serve it.

    :param callback: takes each arrival over. If it raises, that is logged and the socket closed.
    :param credentials: needed for tls://, only to be checked: who takes a socket needs them to finish it.
    :raise UsageError: the address cannot be bound, or tls:// without good credentials and an allow-list; says what to do.
    """
    if isinstance(address, UnixDestination):
        return Listener([_bind_unix(address.path)], "unix", callback)
    if credentials is None:
        raise UsageError(
            f"listening on {address} needs certificates",
            remedy="make them with `ferry pki init` and `ferry pki issue`",
        )
    credentials.check(serving=True)
    return Listener(await _bind_tcp(address), "tls", callback)


async def _read_preamble(sock: socket.socket) -> preamble.Preamble:
    loop = asyncio.get_running_loop()
    data, got = memoryview(bytearray(preamble.SIZE)), 0
    try:
        async with asyncio.timeout(PREAMBLE_SECONDS):
            # not a byte more than the preamble: what follows is for who takes the socket
            while got < preamble.SIZE and (count := await loop.sock_recv_into(sock, data[got:])):
                got += count
    except TimeoutError as error:
        raise RemoteProtocolError(
            f"only {got} of the first {preamble.SIZE} bytes came within {PREAMBLE_SECONDS:g} s",
            remedy="if that was not a port scan, look at the log of the peer",
        ) from error
    return preamble.decode(data[:got].tobytes())


async def _bind_tcp(address: TlsDestination) -> list[socket.socket]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(
            f"{address}: the name {address.host} cannot be resolved",
            remedy="listen on an address of this host, or tls://0.0.0.0:PORT",
        ) from error
    bound: list[socket.socket] = []
    failure: OSError | None = None
    port = address.port
    for family, kind, protocol, _, where in dict.fromkeys(found):
        try:
            sock = _bind(family, kind, protocol, (where[0], port, *where[2:]))
        except OSError as error:
            failure = error
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                break  # only a missing IPv6 is a reason to be content with the other address
        else:
            bound.append(sock)
            port = sock.getsockname()[1]  # "localhost" with port 0: one port for all its addresses
    else:
        if bound:
            return bound
    for sock in bound:
        sock.close()
    raise _cannot_bind(address, failure or OSError(errno.EADDRNOTAVAIL, "no address")) from failure


def _bind(family: int, kind: int, protocol: int, where: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _cannot_bind(address: ListenAddress, error: OSError) -> UsageError:
    port = address.port if isinstance(address, TlsDestination) else 0  # no path is bound while in use
    what, remedy = {
        errno.EADDRINUSE: (
            f"port {port} is in use already",
            f"see who has it with `ss -ltnp 'sport = :{port}'`, or listen on another port",
        ),
        errno.EACCES: ("this user may not listen there", "use a port above 1023, or a directory of your own"),
        errno.EADDRNOTAVAIL: (
            "this host has no such address",
            "listen on tls://0.0.0.0:PORT, or on one that `ip address` shows",
        ),
        errno.ENOENT: ("there is no such directory", "create it, or use another path"),
    }.get(error.errno or 0, (error.strerror or str(error), "use another address"))
    return UsageError(f"cannot listen on {address}: {what}", remedy=remedy)


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _directory_locked(Path(path).parent):
            _clear_stale(path)
            # before bind: the file is born with this mode (unix_bind in the kernel)
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(path)
            # within the lock: a socket that does not listen yet looks stale to another starter
            sock.setblocking(False)
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise _cannot_bind(UnixDestination(path), error) from error
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _directory_locked(directory: Path) -> Iterator[None]:
    """Two daemons that start at once must not each take the other's new socket for a stale one."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UsageError(
            f"somebody else is about to listen in {directory}", remedy="try again in a second"
        ) from error
    finally:
        os.close(fd)


def _clear_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} is there and is no socket", remedy="remove it, or listen on another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # its owner died
            return
        except BlockingIOError:
            pass  # a full queue: somebody is there
    raise UsageError(
        f"another process listens on {path} already",
        remedy=f"see which with `ss -lxp src {path}`, or listen on another path",
    )
