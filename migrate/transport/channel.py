"""Byte channels for worker threads: blocking, whole buffers in and out, no framing.

A channel is used by one thread at a time (OpenSSL's connections break when two threads are inside one); only `abort`
may be called from any thread. An asyncio view of the same classes is `control.ControlStream`.

Measured on Linux 6.18, loopback, 1 GiB of memfd into a prefaulted memfd, with both cores to itself: `sendfile` copies once where
`sendmsg` from the mapping copies twice, 11 GB/s against 6.5 over a Unix socket and 5.5 against 3.4 over TCP in pieces of 4 MiB, and
no more in pieces of 64 KiB; sockets with a timeout are as fast as blocking ones with SO_SNDTIMEO; TLS gains nothing from more
than 64 KiB a call.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from migrate.errors import ChannelClosed, TransportError
from migrate.transport import sockets
from migrate.transport.command import Command, enlarge_pipe

Buffer = bytes | bytearray | memoryview
#: A descriptor and an offset in it, bytes.
Place = tuple[int, int]

#: Seconds without a byte moved after which a channel gives up, unless told otherwise.
NO_PROGRESS_SECONDS = 30.0

#: Most buffers in one sendmsg or writev (limits.h).
IOV_MAX = 1024

#: Views shorter than this are joined before TLS sees them: SSLSocket has no sendmsg, and each call is at least a record.
_TLS_CHUNK = 256 << 10


class Channel(Protocol):
    """What carries pages."""

    #: The peer's certificate name, or "unix", or "exec".
    peer: str
    #: Whom error texts name.
    label: str

    def send(self, data: Buffer) -> None:
        """Send all of it.

        :raise ChannelClosed: the peer is gone, or `abort` was called.
        :raise TransportError: no byte moved for as long as `set_deadline` says.
        """

    def send_runs(self, views: Sequence[memoryview], places: Sequence[Place] = ()) -> None:
        """Send all bytes of all views (of bytes), in order. Raises as `send`.

        :param places: where the bytes of each view lie in a file, if they all do; a kind that gains by it sends them from
            there. They may then be read until the peer has them, so what changes meanwhile must be sent again.
        """

    def recv_into(self, view: memoryview) -> None:
        """Fill the view. Raises as `send`; `ChannelClosed` also where the peer closes before it is full."""

    def set_deadline(self, seconds: float) -> None:
        """From now on give up after this many seconds in which no byte moved. By the thread that uses the channel."""

    def close(self) -> None:
        """Free everything. Not while another thread is inside: `abort` first, then join it. Idempotent."""

    def abort(self) -> None:
        """Wake whoever is inside `send` or `recv_into`, with ChannelClosed; from any thread. `close` is still needed.

        A socket's peer learns it now, the peer of bare pipes at `close`.
        """


class ByteChannel(ABC):
    """What the three kinds share: the loops around one system call, and its errors in words."""

    def __init__(self, peer: str, label: str) -> None:
        self.peer = peer
        self.label = label
        self._lock = threading.Lock()  # between abort and close: a descriptor's number is reused at once
        self._aborted = False
        self._closed = False

    @property
    @abstractmethod
    def read_fd(self) -> int: ...

    @property
    @abstractmethod
    def write_fd(self) -> int: ...

    @abstractmethod
    def set_deadline(self, seconds: float) -> None:
        """0: never wait, raise BlockingIOError or ssl.SSLWant… instead (for asyncio)."""

    @abstractmethod
    def recv_some(self, view: memoryview) -> int:
        """One read, 0 at the end. Raises bare OSError: `explain` makes it fit to be seen."""

    @abstractmethod
    def send_some(self, views: Sequence[memoryview]) -> int:
        """One write of up to IOV_MAX views. Raises bare OSError."""

    @abstractmethod
    def _wake(self) -> None: ...

    @abstractmethod
    def _release(self) -> None: ...

    def send(self, data: Buffer) -> None:
        self.send_runs([memoryview(data).cast("B")])

    def send_runs(self, views: Sequence[memoryview], places: Sequence[Place] = ()) -> None:
        for start in range(0, len(views), IOV_MAX):
            batch = [view for view in views[start : start + IOV_MAX] if len(view)]
            while batch:
                try:
                    sent = self.send_some(batch)
                except OSError as error:
                    raise self.explain(error) from error
                whole = 0
                while whole < len(batch) and sent >= len(batch[whole]):
                    sent -= len(batch[whole])
                    whole += 1
                del batch[:whole]
                if sent:
                    batch[0] = batch[0][sent:]

    def recv_into(self, view: memoryview) -> None:
        got = 0
        while got < len(view):
            try:
                count = self.recv_some(view[got:])
            except OSError as error:
                raise self.explain(error) from error
            if not count:
                raise self.explain(None)
            got += count

    def explain(self, error: OSError | None) -> TransportError:
        """In words; None stands for the end of the stream. May take half a second (see `Command.complaint`)."""
        if self._aborted or self._closed:
            return sockets.given_up(self.label)
        if error is None or isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
            return sockets.closed(self.label)
        return sockets.broken(error, self.label)

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            if not self._closed:
                self._wake()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._release()


class SocketChannel(ByteChannel):
    """A connected stream socket in the clear."""

    def __init__(self, sock: socket.socket, peer: str, label: str) -> None:
        super().__init__(peer, label)
        self._sock = sock
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        sock.settimeout(NO_PROGRESS_SECONDS)

    @property
    def read_fd(self) -> int:
        return self._sock.fileno()

    @property
    def write_fd(self) -> int:
        return self._sock.fileno()

    def set_deadline(self, seconds: float) -> None:
        self._sock.settimeout(seconds)

    def recv_some(self, view: memoryview) -> int:
        return self._sock.recv_into(view)

    def send_some(self, views: Sequence[memoryview]) -> int:
        return self._sock.sendmsg(views)

    def send_runs(self, views: Sequence[memoryview], places: Sequence[Place] = ()) -> None:
        if not places:
            super().send_runs(views)
            return
        for view, (fd, offset) in zip(views, places, strict=True):
            end = offset + len(view)
            while offset < end:
                try:
                    offset += self._send_file(fd, offset, end - offset)
                except OSError as error:
                    raise self.explain(error) from error

    def _send_file(self, fd: int, offset: int, size: int) -> int:
        try:
            sent = os.sendfile(self._sock.fileno(), fd, offset, size)
        except BlockingIOError:
            if not self._writable.poll((self._sock.gettimeout() or 0) * 1000):
                raise TimeoutError from None
            return 0
        if not sent:
            raise OSError(errno.ENODATA, "the file that is sent ends too early")
        return sent

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            # Never SSLSocket.shutdown: it drops the TLS first, and a thread inside `send` would go on in the clear.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _release(self) -> None:
        self._sock.close()


class TlsChannel(SocketChannel):
    """A socket whose TLS handshake is done."""

    def __init__(self, sock: ssl.SSLSocket, peer: str, label: str) -> None:
        super().__init__(sock, peer, label)
        self._tls = sock
        self._staging: bytearray | None = None

    def send_some(self, views: Sequence[memoryview]) -> int:
        # All or nothing: after a Want… or a timeout OpenSSL insists on the same bytes again
        return self._tls.send(views[0][:_TLS_CHUNK])

    def send_runs(self, views: Sequence[memoryview], places: Sequence[Place] = ()) -> None:
        # Never from a file: sendfile on the socket would go out in the clear
        if self._staging is None:
            self._staging = bytearray(_TLS_CHUNK)
        staging, fill = memoryview(self._staging), 0
        for view in views:
            size = len(view)
            if fill and fill + size > _TLS_CHUNK:
                super().send_runs([staging[:fill]])
                fill = 0
            if size >= _TLS_CHUNK:
                super().send_runs([view])
            else:
                staging[fill : fill + size] = view
                fill += size
        if fill:
            super().send_runs([staging[:fill]])


class PipeChannel(ByteChannel):
    """Two descriptors, one a direction: those of a command that we run, or our own stdin and stdout when we are one.

    Takes the descriptors over and makes them non-blocking.
    """

    def __init__(
        self, read_fd: int, write_fd: int, process: Command | None = None, *, peer: str = "exec", label: str
    ) -> None:
        super().__init__(peer, label)
        self._read_fd, self._write_fd, self._process = read_fd, write_fd, process
        self._seconds = NO_PROGRESS_SECONDS
        self._woken = os.eventfd(0, os.EFD_CLOEXEC)
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
            enlarge_pipe(fd)
        self._readable = self._poller(read_fd, select.POLLIN)
        self._writable = self._poller(write_fd, select.POLLOUT)

    def _poller(self, fd: int, event: int) -> select.poll:
        poller = select.poll()
        poller.register(fd, event)
        poller.register(self._woken, select.POLLIN)
        return poller

    @property
    def read_fd(self) -> int:
        return self._read_fd

    @property
    def write_fd(self) -> int:
        return self._write_fd

    def set_deadline(self, seconds: float) -> None:
        self._seconds = seconds

    def recv_some(self, view: memoryview) -> int:
        while not self._aborted:
            try:
                return os.readv(self._read_fd, [view])
            except BlockingIOError:
                self._wait(self._readable)
        raise ConnectionAbortedError

    def send_some(self, views: Sequence[memoryview]) -> int:
        while not self._aborted:
            try:
                return os.writev(self._write_fd, views)
            except BlockingIOError:
                self._wait(self._writable)
        raise ConnectionAbortedError

    def _wait(self, poller: select.poll) -> None:
        if not self._seconds:
            raise BlockingIOError
        if not poller.poll(self._seconds * 1000):
            raise TimeoutError

    def explain(self, error: OSError | None) -> TransportError:
        found = super().explain(error)
        if self._process is None or self._aborted or self._closed or not isinstance(found, ChannelClosed):
            return found
        return ChannelClosed(
            self._process.complaint(), remedy="try the command by hand; it must run `ferry accept`"
        )

    def _wake(self) -> None:
        os.eventfd_write(self._woken, 1)
        if self._process is not None:
            self._process.kill()

    def _release(self) -> None:
        for fd in {self._read_fd, self._write_fd, self._woken}:
            os.close(fd)
        if self._process is not None:
            self._process.end()
