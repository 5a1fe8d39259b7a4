"""The socket to a message bus: address, authentication, whole messages in and out with their descriptors.

It knows nothing about calls and replies; connection.py does. The library's own connection is not used, because of what it
does (dbus-next 0.2.3, dbus-fast 5.2.0; measured): it ends the connection as failed whenever the socket is full between two
messages (both); receives descriptors inheritable, so that a process started at that moment keeps them (both), and loses
those of an answer that comes after its deadline (both); spins for ever where the peer closes during authentication, leaks
its own socket, and costs most of the time of a small call (dbus-next).
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import unquote

from migrate.bus.messages import FIXED, MAX_MESSAGE, Message, close_all, decode, frame_length
from migrate.errors import BusError, FerryError, LocalProtocolError, UsageError

#: A Unix socket's path holds at most this many bytes (sun_path is 108 with its NUL).
MAX_SOCKET_PATH: Final = 107

_MAX_FDS: Final = 253  # SCM_MAX_FD: no single message of the kernel carries more
# What sendmsg says about descriptors rather than about the connection.
_BAD_FDS: Final = (errno.EBADF, errno.EINVAL, errno.ETOOMANYREFS)
_READ: Final = 64 << 10
_READ_LARGE: Final = 1 << 20
_MAX_QUEUED: Final = 2 * MAX_MESSAGE
_MAX_AUTH_LINE: Final = 4096

Buffer = bytes | bytearray | memoryview


class Link:
    """One authenticated connection. `on_message` gets every message, and with it its descriptors; `on_lost` is called once,
    with a sentence, when the connection ends in any other way than by close()."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._on_message: Callable[[Message], None] = Message.close_fds
        self._on_lost: Callable[[str], None] = lambda _why: None
        self._received = bytearray()
        self._wanted = FIXED  # bytes of the frame that is being received, as far as known
        self._fds: deque[int] = deque()  # received, not yet given to a message
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._queued = 0
        self._emptied = asyncio.Event()
        self.open = True

    @classmethod
    async def connect(cls, address: str, timeout: float) -> Link:
        """Connect and authenticate (EXTERNAL, with descriptors). `address` as in the D-Bus specification, unix: only.

        Raises BusError where nobody answers there within `timeout` seconds or the answer is no bus; UsageError for an
        address that cannot be one.
        """
        path = socket_path(address)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(sock, path)
                await _authenticate(sock)
        except BaseException as error:
            sock.close()
            if isinstance(error, TimeoutError):
                raise BusError(f"the bus at {address} did not answer within {timeout:g} s") from error
            if isinstance(error, OSError):
                raise BusError(
                    f"no bus at {address}: {error.strerror or error}",
                    remedy="is the machine's supervisor running?",
                ) from error
            raise
        return cls(sock)

    def start(self, on_message: Callable[[Message], None], on_lost: Callable[[str], None]) -> None:
        self._on_message, self._on_lost = on_message, on_lost
        self._loop.add_reader(self._sock, self._readable)

    def send(self, header: bytes, body: Buffer = b"", fds: Sequence[int] = ()) -> None:
        """Send a message, now where the socket takes it. `fds` stay the caller's and may be closed when this returns.

        Raises BusError where the connection has ended, LocalProtocolError for descriptors that cannot be passed.
        """
        if not self.open:
            raise BusError("the connection to the bus has ended")
        sent = 0
        if not self._queue:
            try:
                sent = self._write([header, body] if body else [header], fds)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno in _BAD_FDS:
                    raise LocalProtocolError(
                        f"descriptors {list(fds)} cannot be passed: {error.strerror}"
                    ) from error
                self._lose(f"writing to the bus failed: {error.strerror}")
                raise BusError("the connection to the bus has ended") from error
            if sent == len(header) + len(body):
                return
            self._loop.add_writer(self._sock, self._writable)
            self._emptied.clear()
        # The caller may close or reuse its descriptors: what waits keeps its own.
        kept = [os.dup(fd) for fd in fds] if not sent else []
        self._queue.append((memoryview(header + body)[sent:], kept))
        self._queued += len(header) + len(body) - sent
        if self._queued > _MAX_QUEUED:
            self._lose(f"the bus has not taken {self._queued} bytes that wait for it")

    def close(self) -> None:
        """End the connection; what waits to be sent is dropped. May be called twice."""
        if not self.open:
            return
        self.open = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        close_all(self._fds)
        self._fds.clear()
        for _data, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        self._emptied.set()

    async def drain(self) -> None:
        """Wait until all that was sent has left this process, or the connection ends."""
        if self.open and self._queue:
            await self._emptied.wait()

    def _lose(self, why: str) -> None:
        if self.open:
            self.close()
            self._on_lost(why)

    def _write(self, data: Sequence[Buffer], fds: Sequence[int]) -> int:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        return self._sock.sendmsg(data, control, socket.MSG_NOSIGNAL)

    def _writable(self) -> None:
        try:
            while self._queue:
                data, fds = self._queue[0]
                sent = self._write([data], fds)
                self._queued -= sent
                # Descriptors go with the first byte of their message.
                close_all(fds)
                if sent < len(data):
                    self._queue[0] = (data[sent:], [])
                else:
                    self._queue.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(f"writing to the bus failed: {error.strerror}")
            return
        self._loop.remove_writer(self._sock)
        self._emptied.set()

    def _readable(self) -> None:
        missing = self._wanted - len(self._received)
        try:
            data, control, _flags, _address = self._sock.recvmsg(
                _READ if missing <= _READ else min(missing, _READ_LARGE),
                socket.CMSG_SPACE(_MAX_FDS * 4),
                socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(f"reading from the bus failed: {error.strerror}")
            return
        for level, kind, numbers in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(numbers[: len(numbers) - len(numbers) % fds.itemsize])
                self._fds.extend(fds)
        if not data:
            self._lose("the bus closed the connection")
            return
        try:
            self._split(data)
        except FerryError as error:
            self._lose(error.reason)

    def _split(self, data: bytes) -> None:
        """Hand over every message that is complete with `data`. Frames of one read, the usual case, are not copied twice."""
        received = self._received
        if received:
            received += data
            if len(received) < self._wanted:
                return
            data = bytes(received)
            received.clear()
        at = 0
        while self.open:
            left = len(data) - at
            self._wanted = frame_length(data[at : at + FIXED]) if left >= FIXED else FIXED
            if left < self._wanted:
                break
            message = decode(data if not at and left == self._wanted else data[at : at + self._wanted])
            at += self._wanted
            if message.fields.unix_fds > len(self._fds):
                raise BusError("a message from the bus came without its descriptors")
            message.fds = [self._fds.popleft() for _ in range(message.fields.unix_fds)]
            self._on_message(message)
        if at < len(data):
            received += data[at:] if at else data


def socket_path(address: str) -> str:
    """The path, or NUL and the abstract name, in a D-Bus address. Raises UsageError where it has none or a too long one."""
    transport, _, options = address.partition(":")
    keys = dict(option.partition("=")[::2] for option in options.split(","))
    if transport == "unix" and "path" in keys:
        path = unquote(keys["path"])
    elif transport == "unix" and "abstract" in keys:
        path = "\0" + unquote(keys["abstract"])
    else:
        raise UsageError(
            f"{address!r} is not the address of a bus here", remedy="give one like unix:path=/run/vm/bus"
        )
    check_socket_path(path)
    return path


def check_socket_path(path: str) -> None:
    """Raises UsageError for a path that no Unix socket can have."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise UsageError(
            f"the socket path {path} has {length} bytes, a Unix socket's path holds {MAX_SOCKET_PATH}",
            remedy="use a directory with a shorter path, such as one under /run or /tmp",
        )


async def _authenticate(sock: socket.socket) -> None:
    """The client's side of the SASL exchange (D-Bus specification, "Authentication Protocol")."""
    loop = asyncio.get_running_loop()
    uid = str(os.getuid()).encode().hex()
    exchange = ((f"\0AUTH EXTERNAL {uid}\r\n", "OK"), ("NEGOTIATE_UNIX_FD\r\n", "AGREE_UNIX_FD"))
    for words, wanted in exchange:
        await loop.sock_sendall(sock, words.encode())
        line = b""
        while b"\n" not in line:
            got = await loop.sock_recv(sock, _MAX_AUTH_LINE)
            if not got:
                raise BusError("the bus closed the connection while we authenticated")
            line += got
            if len(line) > _MAX_AUTH_LINE:
                raise BusError("what answers as the bus does not speak D-Bus")
        # One line and nothing after it: the bus says no more until it is asked.
        if line.split(None, 1)[:1] != [wanted.encode()] or line.find(b"\n") != len(line) - 1:
            raise BusError(
                "the bus refused us"
                if line.startswith(b"REJECTED")
                else "what answers as the bus does not speak D-Bus",
                remedy="a machine's bus admits only the user that runs the machine",
            )
    await loop.sock_sendall(sock, b"BEGIN\r\n")
