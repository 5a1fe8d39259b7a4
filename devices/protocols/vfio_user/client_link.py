"""The way from a server to its client: DMA_READ and DMA_WRITE, for memory that came without a descriptor.

Over a twin socket where the client has agreed to one: then whoever asks waits for the answer, and the server's thread is not
concerned. Otherwise commands and replies share one socket, in both directions (vfio-user.rst, Socket). There *whoever waits
reads*: one thread at a time reads the socket and sorts what comes, the others wait for it; so a device that asks from a thread
of its own, with its lock held, gets its answer also while the server's thread waits for that lock with the next command in hand.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from devices.protocols.channel import READ_LARGE, READ_SIZE, receive
from devices.protocols.vfio_user.framing import Assembler, FramingError, Message
from devices.protocols.vfio_user.messages import (
    DMA,
    ERROR,
    HEADER,
    HEADER_SIZE,
    REPLY,
    TYPE_MASK,
    Buffer,
    Command,
    RequestError,
    decode_dma,
)
from migrate.errors import MemoryFault, Phase

#: Seconds that a device waits for memory, with its lock held. A client that takes longer is let go.
TIMEOUT = 5.0
#: Commands that a client may have sent ahead while it owes an answer: bytes of them, so that it cannot fill our memory.
MAX_AHEAD = 8 << 20
_TIMEVAL = struct.Struct("@ll")


class ClientLink:
    """One connection, seen from the server: its reader, and the asking side. `inline` is set by the server's thread only."""

    def __init__(self, connection: socket.socket, timeout: float = TIMEOUT) -> None:
        self.connection = connection
        self.assembler = Assembler()
        #: From the first window without a descriptor on, if there is no twin socket: `next_command` instead of plain reads.
        self.inline = False
        self._timeout = timeout
        self._twin: socket.socket | None = None
        self._twin_assembler = Assembler()
        #: One question at a time.
        self._asking = threading.Lock()
        #: Held for a whole message, so that two threads' do not mix.
        self.sending = threading.Lock()
        self._condition = threading.Condition()
        self._reading = False
        self._commands: deque[Message] = deque()
        self._replies: deque[Message] = deque()
        self._ahead = 0
        self._asked = False
        self._id = 0
        self._ended: FramingError | OSError | None = None

    # -- setting up -------------------------------------------------------------------------------------------------------

    def open_twin(self) -> int:
        """Make the second socket; the client's end, the caller's from here on."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.settimeout(self._timeout)
        self._twin = ours
        return theirs.detach()

    def prepare(self) -> None:
        """Memory without a descriptor is about to be used. Called by the server's thread, between two messages."""
        if self._twin is None and not self.inline:
            # A client that reads no replies must not keep a device that asks it for memory.
            value = _TIMEVAL.pack(int(self._timeout), int(self._timeout % 1 * 1e6))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
            self.inline = True

    def close(self) -> None:
        """Wakes whoever waits; nothing is asked any more. The connection stays the caller's."""
        self._end(ConnectionResetError(errno.ECONNRESET, "the client is gone"))
        with self._condition:
            # Whoever reads has been woken by the shutdown; the assembler is not touched under its hands.
            self._condition.wait_for(lambda: not self._reading, self._timeout)
        if self._twin is not None:
            with self._asking:
                self._twin.close()
                self._twin_assembler.close()
        self.assembler.close()
        for message in (*self._commands, *self._replies):
            message.close()
        self._commands.clear()
        self._replies.clear()

    def _end(self, why: FramingError | OSError) -> None:
        with self._condition:
            self._ended = self._ended or why
            self._condition.notify_all()
        for sock in (self.connection, self._twin):
            with contextlib.suppress(OSError):
                if sock is not None:
                    sock.shutdown(socket.SHUT_RDWR)

    # -- the server's thread ------------------------------------------------------------------------------------------------

    def next_command(self) -> Message:
        """In line: the next command, in the order they came. :raise OSError, FramingError: there are no more."""
        message = self._await(self._commands, None)
        with self._condition:
            self._ahead -= message.header.size
        return message

    def send(self, data: bytes) -> None:
        """In line: a whole message, not in the midst of another thread's."""
        with self.sending:
            self.connection.sendall(data)

    # -- asking -------------------------------------------------------------------------------------------------------------

    def ask(self, command: Command, payload: Buffer) -> memoryview:
        """The payload of the client's answer. :raise MemoryFault: it refused, broke the protocol, took too long or is gone."""
        with self._asking:
            self._id = (self._id + 1) & 0xFFFF
            data = HEADER.pack(self._id, command, HEADER_SIZE + len(payload), 0, 0) + payload
            try:
                reply = self._ask_twin(data) if self._twin is not None else self._ask_inline(data)
            except (OSError, FramingError) as error:
                # A late answer could be taken for the next one.
                self._end(error if isinstance(error, FramingError) else OSError(errno.ETIMEDOUT, str(error)))
                raise _fault(f"the client did not answer {command.name}: {error}") from error
            reply.close()
            header = reply.header
            if header.id != self._id or header.command != command or header.flags & TYPE_MASK != REPLY:
                self._end(ConnectionAbortedError(errno.EPROTO, "the client answered something else"))
                raise _fault(f"the client answered {command.name} with {header}")
            if header.flags & ERROR:
                raise _fault(f"the client refused {command.name} with errno {header.error}")
            return reply.payload

    def _ask_twin(self, data: bytes) -> Message:
        assert self._twin is not None
        self._twin.sendall(data)
        deadline = time.monotonic() + self._timeout
        while (message := self._twin_assembler.next()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {self._timeout:g} s")
            self._twin_assembler.feed(*_receive(self._twin, self._twin_assembler))
        return message

    def _ask_inline(self, data: bytes) -> Message:
        deadline = time.monotonic() + self._timeout
        with self._condition:
            self._asked = True
        try:
            self.send(data)
            return self._await(self._replies, deadline)
        finally:
            with self._condition:
                self._asked = False

    # -- whoever waits reads ------------------------------------------------------------------------------------------------

    def _await(self, queue: deque[Message], deadline: float | None) -> Message:
        while True:
            with self._condition:
                while not queue and self._reading and self._ended is None:
                    if not self._condition.wait(_rest(deadline)):
                        raise TimeoutError(f"no answer within {self._timeout:g} s")
                if queue:
                    return queue.popleft()
                if self._ended is not None:
                    raise self._ended
                self._reading = True
            try:
                self._read(deadline)
            except (OSError, FramingError) as error:
                self._end(error)
                raise
            finally:
                with self._condition:
                    self._reading = False
                    self._condition.notify_all()

    def _read(self, deadline: float | None) -> None:
        """One read, unless something whole is there from earlier ones."""
        if self._sort():
            return
        if deadline is not None:
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            if not poll.poll(max(_rest(deadline) or 0, 0) * 1000):
                raise TimeoutError(f"no answer within {self._timeout:g} s")
        self.assembler.feed(*_receive(self.connection, self.assembler))
        self._sort()

    def _sort(self) -> bool:
        found = False
        while (message := self.assembler.next()) is not None:
            found = True
            with self._condition:
                # An answer that nobody asked for is the session's to refuse.
                if message.header.flags & TYPE_MASK == REPLY and self._asked and not self._replies:
                    self._replies.append(message)
                else:
                    self._commands.append(message)
                    self._ahead += message.header.size
                    if self._ahead > MAX_AHEAD:
                        raise ConnectionAbortedError(errno.ENOBUFS, "too many commands are sent ahead")
        return found


class ClientMemory:
    """Memory behind a link (backend.RemoteMemory): in pieces that the client can take."""

    def __init__(self, link: ClientLink, most: int) -> None:
        """:param most: the client's max_data_xfer_size; not 0."""
        self._ask: Callable[[Command, Buffer], memoryview] = link.ask
        self._most = most

    def read(self, address: int, size: int) -> bytes:
        return b"".join(self._read(at, count) for at, count in self._pieces(address, size))

    def _read(self, address: int, count: int) -> memoryview:
        return self._checked(Command.DMA_READ, DMA.pack(address, count), address, count, data=True)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        for at, count in self._pieces(address, len(data)):
            piece = bytes(data[at - address : at - address + count])
            self._checked(Command.DMA_WRITE, DMA.pack(at, count) + piece, at, count, data=False)

    def _pieces(self, address: int, size: int) -> list[tuple[int, int]]:
        return [(address + done, min(self._most, size - done)) for done in range(0, size, self._most)]

    def _checked(
        self, command: Command, payload: bytes, address: int, count: int, *, data: bool
    ) -> memoryview:
        reply = self._ask(command, payload)
        if not data and len(reply) == 12:
            # The specification's table gives the count of this one reply 4 bytes, everyone sends 8.
            reply = memoryview(bytes(reply) + bytes(4))
        try:
            found = decode_dma(reply, data=data)
        except RequestError as error:
            raise _fault(f"the client answered {command.name} with {len(reply)} bytes") from error
        if found[:2] != (address, count):
            raise _fault(
                f"the client answered {command.name} of {count} bytes at {address:#x} with {found[:2]}"
            )
        return found[2]


def _receive(connection: socket.socket, assembler: Assembler) -> tuple[bytes, list[int], bool]:
    size = READ_SIZE if assembler.missing <= READ_SIZE else READ_LARGE
    found = receive(connection, size)
    if not found[0]:
        raise ConnectionResetError(errno.ECONNRESET, "the client closed the connection")
    return found


def _rest(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()


def _fault(reason: str) -> MemoryFault:
    return MemoryFault(reason, remedy="see the log of the VMM", phase=Phase.RUNNING)
