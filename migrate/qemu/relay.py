"""QEMU's own migration channel through ours: byte for byte, one thread a connection of QEMU's, on either side.

    QEMU ─unix─► RelayOut ═ RELAY frames on page channel n ═► RelayIn ─unix─► QEMU
    QEMU ◄─unix─ RelayOut ◄═ RELAY frames on the control channel ═ RelayIn ◄─unix─ QEMU      the return path, of connection 0

So QEMU's RAM travels under our TLS with no `tls-creds` of QEMU's. What passes after the guest was stopped is digested, on both
sides. Connections are accepted, and made, in the order in which QEMU makes them: the first is its main channel, and in 7.2
nothing but that order tells it from those of multifd.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from migrate.errors import ChannelClosed, DeviceGone, FerryError, Phase, RemoteProtocolError, TransportError
from migrate.protocol import frames
from migrate.protocol.frames import MAX_RELAY, RELAY_HEAD, Kind

log = logging.getLogger(__name__)

#: Seconds that QEMU may take to make its connections, and to take what we have for it.
CONNECT_SECONDS: Final = 15.0
STALL_SECONDS: Final = 30.0
#: A QEMU that closes its channel early is ending: what it says at its end is better than what we can say of it.
LAST_WORDS_SECONDS: Final = 1.5
#: The most that comes back at a time; QEMU's messages there have a few bytes.
BACK_BYTES: Final = 64 << 10
_HEAD: Final = frames.HEADER_SIZE + RELAY_HEAD.size


class Channel(Protocol):
    """What migrate.transport gives a thread."""

    peer: str

    def send(self, data: memoryview | bytes) -> None: ...
    def recv_into(self, view: memoryview) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


#: Told of what broke, once, from a thread.
OnFailure = Callable[[FerryError], None]


def _too_slow(what: str) -> DeviceGone:
    return DeviceGone(
        f"QEMU {what} within {CONNECT_SECONDS:g} s", phase=Phase.PRECOPY, remedy="see its log on that host"
    )


class RelayOut:
    """The source's half. `path` is where QEMU is told to migrate to."""

    def __init__(self, path: Path, channels: Sequence[Channel], on_failure: OnFailure) -> None:
        """:param channels: one for each connection that QEMU will make."""
        self.path = path
        self.sent_bytes = 0
        self.digests: list[bytes] = [b""] * len(channels)
        self.ended = threading.Event()  #: every connection has ended, and its end is sent
        self._channels = channels
        self._on_failure = on_failure
        self._stopped = False
        self._closing = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._open = len(channels)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(len(channels))
        self._listener.setblocking(False)
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._accept,), name="relay", daemon=True)
        ]

    def start(self) -> None:
        """QEMU is about to be told to connect."""
        self._threads[0].start()

    def guest_stopped(self) -> None:
        """What QEMU sends from now on is of a guest that stands still: it is digested."""
        self._stopped = True

    def take_back(self, stream: int, data: bytes) -> None:
        """Bytes of the return path, for QEMU. Blocks while QEMU takes nothing. :raise FerryError: there is no such connection."""
        with self._lock:
            if stream != 0 or not self._sockets:
                raise RemoteProtocolError(
                    f"something came back for QEMU's connection {stream}, which has no return path",
                    phase=Phase.PRECOPY,
                )
            connection = self._sockets[0]
        try:
            connection.sendall(data)
        except OSError as error:
            log.info("event=return-path-closed error=%r", str(error))  # QEMU has ended its migration

    def _accept(self) -> None:
        for number in range(len(self._channels)):
            ready, _, _ = select.select([self._listener.fileno(), self._wake], [], [], CONNECT_SECONDS)
            if self._wake in ready:
                return
            if not ready:
                raise _too_slow(f"made {number} of {len(self._channels)} connections")
            connection, _ = self._listener.accept()
            connection.settimeout(None)
            with self._lock:
                self._sockets.append(connection)
            thread = threading.Thread(
                target=self._guarded,
                args=(self._pump, number, connection),
                name=f"relay-{number}",
                daemon=True,
            )
            self._threads.append(thread)
            thread.start()

    def _pump(self, number: int, connection: socket.socket) -> None:
        channel, buffer = self._channels[number], memoryview(bytearray(_HEAD + MAX_RELAY))
        digest = hashlib.sha256()
        while True:
            try:
                size = connection.recv_into(buffer[_HEAD:])
            except OSError:
                size = 0  # QEMU has given up: what became of it is told by its monitor
            stopped = self._stopped
            if not size and not stopped:
                # What it was is told by its monitor or by its end; the destination is not to be told of it as the end of a stream.
                self._closing.wait(LAST_WORDS_SECONDS)
                raise DeviceGone("QEMU has closed its migration's channel early", phase=Phase.PRECOPY)
            buffer[:_HEAD] = frames.encode_relay(number, size, digested=stopped)
            if stopped:
                digest.update(buffer[_HEAD : _HEAD + size])
            channel.send(buffer[: _HEAD + size])
            with self._lock:
                self.sent_bytes += size
            if not size:
                break
        with self._lock:
            self.digests[number] = digest.digest()
            self._open -= 1
            if not self._open:
                self.ended.set()

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except FerryError as error:
            if not self._closing.is_set():
                self._on_failure(error)
        except OSError as error:
            if not self._closing.is_set():
                self._on_failure(TransportError(f"QEMU's channel broke: {error}", phase=Phase.PRECOPY))

    def close(self) -> None:
        """QEMU's connections end, and with them a migration of its that has not ended. Channels are aborted."""
        self._closing.set()
        os.eventfd_write(self._wake, 1)
        for channel in self._channels:
            channel.abort()
        if self._threads[0].ident is not None:
            self._threads[0].join(2.0)
        for connection in self._sockets:
            _shut(connection)
        for thread in self._threads[1:]:
            thread.join(2.0)
        for connection in [*self._sockets, self._listener]:
            connection.close()
        os.close(self._wake)
        for channel in self._channels:
            channel.close()
        self.path.unlink(missing_ok=True)


class RelayIn:
    """The destination's half. Told of channels as they join, as PageReceiver is."""

    def __init__(self, on_failure: OnFailure, back: Callable[[bytes], None]) -> None:
        """:param back: takes a whole frame for the control channel; called from a thread, and blocks until it is written."""
        self._on_failure = on_failure
        self._back = back
        self._path, self._count = Path(), 0
        self._made: list[threading.Event] = []
        self._sockets: dict[int, socket.socket] = {}
        self._channels: list[Channel] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._ends: dict[int, bytes] = {}
        self._all_ended = threading.Event()
        self._closing = threading.Event()
        self._inline = hashlib.sha256()

    def listen(self, path: Path, count: int) -> None:
        """QEMU listens at `path`, for as many connections. None is made before its first bytes are here: QEMU reads the first of a
        connection in its main loop, and would answer nobody until they come."""
        self._path, self._count = path, count
        self._made = [threading.Event() for _ in range(count)]

    def _connect(self, index: int) -> socket.socket:
        """In order. :raise DeviceGone: QEMU does not listen, or an earlier connection never had a byte."""
        deadline = time.monotonic() + CONNECT_SECONDS
        if (index and not self._made[index - 1].wait(CONNECT_SECONDS)) or self._closing.is_set():
            raise _too_slow(f"made no use of its connection {index - 1}")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            try:
                connection.connect(str(self._path))
                break
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                if time.monotonic() > deadline or self._closing.is_set():
                    connection.close()
                    raise _too_slow("did not listen for its migration") from None
                time.sleep(0.005)
        connection.settimeout(STALL_SECONDS)
        with self._lock:
            self._sockets[index] = connection
        self._made[index].set()
        if not index:
            self._spawn("return-path", self._return_path)
        return connection

    def join(self, index: int, channel: Channel) -> None:
        """Serve one more channel."""
        self._channels.append(channel)
        self._spawn(f"relay-{index}", lambda: self._serve(index, channel))

    def take(self, header: frames.Header, body: bytes) -> None:
        """A frame that came in line, on the control channel. Blocks while QEMU takes nothing."""
        stream, size = frames.decode_relay(header, body[: RELAY_HEAD.size])
        self._require(stream, 0)
        if size:
            data = memoryview(body)[RELAY_HEAD.size :]
            if header.digested:
                self._inline.update(data)
            self._give(0, data)
        else:
            self._end(0, self._inline.digest())

    def _serve(self, index: int, channel: Channel) -> None:
        head, buffer = bytearray(_HEAD), memoryview(bytearray(MAX_RELAY))
        digest = hashlib.sha256()
        while True:
            channel.recv_into(memoryview(head))
            header = frames.decode_header(head[: frames.HEADER_SIZE])
            stream, size = frames.decode_relay(header, head[frames.HEADER_SIZE :])
            self._require(stream, index)
            if not size:
                break
            channel.recv_into(buffer[:size])
            if header.digested:
                digest.update(buffer[:size])
            self._give(index, buffer[:size])
        self._end(index, digest.digest())

    def _require(self, stream: int, index: int) -> None:
        if stream != index or index >= self._count or index in self._ends:
            raise RemoteProtocolError(
                f"bytes of QEMU's connection {stream} came on channel {index}, where they do not belong",
                phase=Phase.PRECOPY,
            )

    def _give(self, index: int, data: memoryview) -> None:
        connection = self._sockets.get(index) or self._connect(index)
        try:
            connection.sendall(data)
        except OSError as error:
            raise DeviceGone(
                f"QEMU takes nothing more of its migration: {error.strerror or error}",
                phase=Phase.LOAD,
                remedy="see its log on the destination",
            ) from None

    def _end(self, index: int, digest: bytes) -> None:
        with contextlib.suppress(OSError):
            self._sockets[index].shutdown(
                socket.SHUT_WR
            )  # a QEMU that still waits for more hears that there is none
        with self._lock:
            self._ends[index] = digest
            if len(self._ends) == self._count:
                self._all_ended.set()

    def digests(self, seconds: float) -> tuple[bytes, ...] | None:
        """By connection, once all have ended; None where that takes longer. Blocks."""
        if not self._all_ended.wait(seconds):
            return None
        return tuple(self._ends[index] for index in range(self._count))

    def _return_path(self) -> None:
        """What QEMU says back, until it closes its main channel."""
        connection = self._sockets[0]
        while True:
            try:
                data = connection.recv(BACK_BYTES)
            except TimeoutError:
                continue  # it has nothing to say; the timeout is another thread's, and may not be changed under it
            except OSError:
                return
            if not data:
                return
            self._back(frames.encode_relay(0, len(data)) + data)

    def _spawn(self, name: str, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except FerryError as error:
                if isinstance(error, DeviceGone):
                    self._closing.wait(LAST_WORDS_SECONDS)
                if not self._closing.is_set():
                    self._on_failure(error)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Nothing more is taken or given."""
        self._closing.set()
        for channel in self._channels:
            channel.abort()
        for made in self._made:
            made.set()  # whoever waits for an earlier connection
        with self._lock:
            connections = list(self._sockets.values())
        for connection in connections:
            _shut(connection)
        for thread in list(self._threads):
            thread.join(2.0)
        for connection in connections:
            connection.close()
        for channel in self._channels:
            channel.close()


def back_of(header: frames.Header, body: bytes) -> tuple[int, bytes]:
    """A frame of the return path, taken apart. :raise RemoteProtocolError: it is none, or has nothing in it."""
    stream, size = frames.decode_relay(header, body[: RELAY_HEAD.size])
    if header.kind is not Kind.RELAY or not 0 < size <= BACK_BYTES:
        raise RemoteProtocolError(f"{size} bytes came back from QEMU at once", phase=Phase.PRECOPY)
    return stream, body[RELAY_HEAD.size :]


def _shut(sock: socket.socket) -> None:
    """Wake whoever waits in it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was never connected, or is gone


__all__ = ["Channel", "ChannelClosed", "RelayIn", "RelayOut", "back_of"]
