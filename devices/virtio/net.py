"""The network core: frames from a virtqueue to a port, and from a port into a virtqueue. Virtio 1.2 §5.1.

Knows no transport. Frames go out as requests do (runner.py): taken, sent without the lock, given back. They come in the other way
round: a buffer is taken only once a frame is there, under the device's lock, so coming to rest waits for nobody and no frame is
taken from the port that cannot be delivered.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Final, Protocol

from devices.virtio.ring import Chain, DriverFault, Memory, SplitQueue
from migrate.errors import MemoryFault, Phase, UsageError

log = logging.getLogger(__name__)

#: §5.1.6.1: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset; with VERSION_1 num_buffers, too.
LEGACY_HEADER: Final = 10
HEADER: Final = 12
F_VERSION_1: Final = 1 << 32
#: The largest frame: no offload is offered, so it is an Ethernet frame of at most this many bytes, however large the MTU.
MAX_FRAME: Final = 65536
RX, TX = 0, 1
#: Of a reverse ARP request (RFC 903): to everybody; Ethernet and IPv4, addresses of 6 and 4 bytes, operation 3.
_BROADCAST: Final = b"\xff" * 6
_RARP: Final = bytes.fromhex("8035 0001 0800 06 04 0003")
_SHORTEST_FRAME: Final = 60
#: How long a port that has lost its other end waits before it looks again, s.
RETRY_SECONDS: Final = 0.5


class Port(Protocol):
    """Where frames come from and go to. `send` from several threads; never blocks for long."""

    def fileno(self) -> int:
        """-1 while nobody is at the other end."""

    def send(self, frame: bytes) -> None:
        """One whole frame; dropped where nobody takes it: a network promises nothing."""

    def receive(self) -> bytes | None:
        """The next frame, or None where there is none now."""

    def lost(self, why: str) -> None:
        """Nobody is at the other end any more."""

    def mend(self) -> None:
        """Look whether somebody is there again."""

    def close(self) -> None: ...


class PacketPort:
    """A SOCK_SEQPACKET Unix socket, a packet a frame, to whatever switches frames on this host."""

    def __init__(self, path: str) -> None:
        """:raise UsageError: nobody listens there."""
        self._path = path
        #: Nobody closes a descriptor that another thread is about to use.
        self._lock = threading.Lock()
        try:
            self._socket: socket.socket | None = self._connect()
        except OSError as error:
            raise UsageError(
                f"nobody takes frames at {path}: {error.strerror}",
                remedy="start what listens on that SOCK_SEQPACKET socket first",
                phase=Phase.SETUP,
            ) from None

    def _connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.setblocking(False)
        try:
            made.connect(self._path)
        except BaseException:
            made.close()
            raise
        return made

    def fileno(self) -> int:
        found = self._socket
        return found.fileno() if found is not None else -1

    def send(self, frame: bytes) -> None:
        with self._lock:
            try:
                if self._socket is not None:
                    self._socket.send(frame)
            except OSError as error:
                log.debug("event=frame-dropped error=%r", str(error))

    def receive(self) -> bytes | None:
        found = self._socket
        if found is None:
            return None
        try:
            frame = found.recv(MAX_FRAME)
        except BlockingIOError:
            return None
        except OSError as error:
            self.lost(str(error))
            return None
        if not frame:
            self.lost("its other end was closed")
        return frame or None

    def lost(self, why: str) -> None:
        with self._lock:
            if self._socket is not None:
                log.warning("event=port-lost path=%s reason=%r", self._path, why)
                self._socket.close()
            self._socket = None

    def mend(self) -> None:
        try:
            made = self._connect()
        except OSError:
            return
        with self._lock:
            self._socket = made
        log.info("event=port-back path=%s", self._path)

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None


class NetCore:
    """Both directions of one port. `header` is what negotiation made it."""

    def __init__(self, port: Port, memory: Memory) -> None:
        self.port = port
        self.memory = memory
        self.header = HEADER

    def negotiated(self, features: int) -> None:
        self.header = HEADER if features & F_VERSION_1 else LEGACY_HEADER

    def begin(self, chain: Chain) -> Sending:
        """A frame to be sent. :raise DriverFault: its buffers are not in memory, or it is no frame."""
        size = sum(segment.length for segment in chain.readable)
        if not self.header < size <= self.header + MAX_FRAME:
            raise DriverFault(f"a frame of {size} bytes with its header")
        try:
            data = b"".join(self.memory.read(*segment) for segment in chain.readable)
        except MemoryFault as error:
            raise DriverFault(error.reason) from error
        return Sending(self.port, data[self.header :])

    def announce(self, mac: bytes) -> None:
        """Tell the switches that the guest of this address is behind this port now: without it, what is sent to a guest that has
        moved goes where it was until it says something itself."""
        self.port.send((_BROADCAST + mac + _RARP + (mac + bytes(4)) * 2).ljust(_SHORTEST_FRAME, b"\0"))

    def deliver(self, queue: SplitQueue, chain: Chain, frame: bytes) -> None:
        """Put a frame into a buffer of the driver's, and give it back; one that does not fit is dropped.

        :raise DriverFault: the buffer is not in memory.
        """
        data = bytes(self.header - 2) + b"\1\0" if self.header == HEADER else bytes(self.header)
        left = memoryview(data + frame)
        if len(left) > sum(segment.length for segment in chain.writable):
            log.warning("event=frame-dropped size=%d reason='larger than the buffer'", len(frame))
            queue.give_back(chain.head, 0)
            return
        written = len(left)
        try:
            for address, length in chain.writable:
                if left:
                    self.memory.write(address, left[:length])
                    left = left[length:]
        except MemoryFault as error:
            raise DriverFault(error.reason) from error
        queue.give_back(chain.head, written)


class Sending:
    """One frame on its way out: a runner.Work."""

    def __init__(self, port: Port, frame: bytes) -> None:
        self._port, self._frame = port, frame

    def run(self) -> None:
        self._port.send(self._frame)

    def finish(self) -> int:
        return 0


class Receiver:
    """The thread of the receive queue. Its methods are called with the device's lock held."""

    def __init__(
        self,
        core: NetCore,
        queue: SplitQueue,
        lock: threading.RLock,
        name: str,
        *,
        interrupt: Callable[[], None],
        broken: Callable[[DriverFault], None],
    ) -> None:
        """:param interrupt, broken: as QueueRunner has them."""
        self.core, self.queue = core, queue
        self._lock, self._name = lock, name
        self._interrupt, self._broken = interrupt, broken
        self._allowed = False
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None

    def allow(self) -> None:
        self._allowed = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
        self._stir()

    def notify(self) -> None:
        """The driver has given buffers."""
        self._stir()

    def halt(self) -> None:
        """Take nothing more; nothing is in flight when this returns, for the lock is ours."""
        self._allowed = False

    def close(self) -> None:
        self._closing = True
        self._allowed = False
        self._stir()

    def _stir(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _loop(self) -> None:
        port, waits = self.core.port, select.poll()
        waits.register(self._wake, select.POLLIN)
        wants = False
        while not self._closing:
            fd = port.fileno()
            if fd >= 0:
                # Looked at only while there is a buffer for what may come: until then it keeps its frames. That it ends is told.
                waits.register(fd, select.POLLIN if wants else 0)
            ready = dict(waits.poll(None if fd >= 0 else RETRY_SECONDS * 1000))
            if fd >= 0:
                waits.unregister(fd)
            elif not self._closing:
                port.mend()
            if self._wake in ready:
                try:
                    os.eventfd_read(self._wake)
                except BlockingIOError:
                    pass  # somebody else's was enough
            with self._lock:
                wants = self._allowed and self.queue.enabled and self._pass()
            if not wants and ready.get(fd, 0) & (select.POLLHUP | select.POLLERR):
                port.lost("its other end was closed")
        os.close(self._wake)

    def _pass(self) -> bool:
        """Deliver what is there. Whether there is a buffer for more."""
        try:
            while True:
                chain = self.queue.take()
                if chain is None and (not self.queue.listen() or (chain := self.queue.take()) is None):
                    return False
                frame = self.core.port.receive()
                if frame is None:
                    self.queue.put_back(chain.head)
                    return True
                self.core.deliver(self.queue, chain, frame)
                if self.queue.wants_interrupt():
                    self._interrupt()
        except DriverFault as fault:
            self._allowed = False
            log.warning("event=driver-fault queue=%s reason=%r", self._name, fault.reason)
            self._broken(fault)
            return False
