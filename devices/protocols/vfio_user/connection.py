"""One connection of a client: blocking calls, each with a deadline. What can be called is client.py's business.

A call is one message and one reply (pipelining.py has other ways). One whose deadline was missed leaves the connection as it is: a
reply that comes late is known by its number, and dropped. Where a message went in part, or the connection broke, it is of no use
any more.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import NoReturn, Self

from devices.protocols.channel import READ_LARGE, READ_SIZE, check_path, receive
from devices.protocols.vfio_user.framing import Assembler, Message, close_all
from devices.protocols.vfio_user.messages import (
    ERROR,
    HEADER,
    HEADER_SIZE,
    REPLY,
    TYPE_MASK,
    Buffer,
    Command,
)
from devices.protocols.vfio_user.shared_memory import SERVED, SharedByMessage, Twin
from devices.protocols.vfio_user.version import MAJOR, MINOR, OURS, Capabilities, Version
from migrate.errors import DeviceGone, DeviceRefused, DeviceTimeout, FerryError, Phase

#: Seconds for one call. A device answers in microseconds; while it is being saved, in milliseconds.
TIMEOUT = 5.0
_RETRY = 0.01
#: Replies that may be owed to calls whose deadlines were missed; a device that owes more is given up.
_MOST_LATE = 64
_TIMEVAL = struct.Struct("@ll")


class RequestRefused(DeviceRefused):
    """The device answered with an error; `errno` is its number (EBUSY: it is stopped)."""

    code = "VfioUserRefused"
    errno = 0


def _refusal(number: int, command: int, device: str) -> RequestRefused:
    error = RequestRefused(
        f"vfio-user {Command(command).name}: {os.strerror(number)} ({errno.errorcode.get(number, number)})",
        remedy="it is stopped: let it run first"
        if number == errno.EBUSY and command < Command.DEVICE_FEATURE
        else "see the log of the device's process",
        phase=Phase.RUNNING,
        device=device,
    )
    error.errno = number
    return error


class Connection:
    """One connection to one device. Calls may come from several threads; they take turns."""

    def __init__(self, connection: socket.socket, device: str, timeout: float) -> None:
        """Use `connect`."""
        self.device = device
        self.timeout = timeout
        self._socket = connection
        self._assembler = Assembler()
        self._lock = threading.Lock()
        self._id = 0
        self._dead: str | None = None
        self._shortened = False
        self._half_sent = False
        #: Numbers of calls whose deadline was missed: their replies are yet to come.
        self._late: set[int] = set()
        self._twin: Twin | None = None
        #: What the server can take.
        self.server = Capabilities()
        #: What of our memory it may have by messages.
        self.shared = SharedByMessage()
        self._set_timeout(timeout)

    @classmethod
    def connect(cls, path: str, *, device: str = "", timeout: float = TIMEOUT, twin: bool = False) -> Self:
        """Connect to the device's socket and negotiate. Waits for the socket to appear, `timeout` seconds at most.

        :param device: the Id that errors name; by default the path.
        :param timeout: also the deadline of every call that follows.
        :param twin: propose a second socket for what the device asks of us (shared_memory.py).
        :raise DeviceGone: nobody serves there; DeviceTimeout: nobody answers (another client may be connected);
            DeviceRefused: the device speaks another version.
        """
        device = device or path
        deadline = time.monotonic() + timeout
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            while True:
                try:
                    connection.connect(check_path(path))
                    break
                except OSError as error:
                    if time.monotonic() >= deadline:
                        raise DeviceGone(
                            f"nobody serves vfio-user at {path}: {error.strerror}",
                            remedy="is the device's process running?",
                            phase=Phase.SETUP,
                            device=device,
                        ) from error
                time.sleep(_RETRY)
            client = cls(connection, device, timeout)
            client._negotiate(twin)
        except BaseException:
            connection.close()
            raise
        return client

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._dead = self._dead or "this side has closed the connection"
        self._assembler.close()
        with contextlib.suppress(OSError):
            # Wakes a call that another thread is waiting in.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._twin is not None:
            self._twin.close()
        self.shared.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one call ---------------------------------------------------------------------------------------------------------

    def _negotiate(self, twin: bool) -> None:
        fds: list[int] = []
        try:
            ours = OURS._replace(twin_socket=twin)
            payload = self._call(Command.VERSION, Version(MAJOR, MINOR, ours).encode(), keep=fds)
            reply = Version.decode(payload)
            if reply.major != MAJOR or reply.minor > MINOR:
                self._fail(f"the device answered version {reply.major}.{reply.minor} to our {MAJOR}.{MINOR}")
            self.server = reply.capabilities
            if self.server.twin_socket:
                # vfio-user.rst, VFIO_USER_VERSION: what does not fit together here ends the connection.
                index = self.server.twin_fd_index
                if not twin or not 0 <= index < len(fds):
                    self._fail(f"a twin socket is descriptor {index} of {len(fds)}, and was wanted: {twin}")
                try:
                    second = socket.socket(fileno=fds.pop(index))
                except OSError as error:
                    self._fail(f"the twin socket is none: {error.strerror}")
                self._twin = Twin(second, self.shared)
        finally:
            close_all(fds)

    def _call(
        self,
        command: Command,
        payload: Buffer = b"",
        fds: Sequence[int] = (),
        keep: list[int] | None = None,
    ) -> memoryview:
        """The payload of the reply.

        :param keep: takes the descriptors that come with the reply, the caller's from there on; else they are closed.
        :raise RequestRefused: the device said no. DeviceTimeout: it may yet do what it was told. DeviceGone, DeviceRefused (it
            broke the protocol): the connection is of no use any more.
        """
        with self._lock:
            deadline = self._begin()
            self._id = number = (self._id + 1) & 0xFFFF
            try:
                self._send(
                    HEADER.pack(number, command, HEADER_SIZE + len(payload), 0, 0) + payload, fds, deadline
                )
                # What the device asks may have come together with the last reply, and it waits for the answer.
                reply = self._next(deadline) if self._assembler.pending else self._receive(deadline)
                if self._late or not reply.header.flags & TYPE_MASK:
                    reply = self._serve(reply, deadline)
            except (OSError, FerryError) as error:
                self._lost(command, error, number)
            if keep is not None:
                keep += reply.fds
                reply.fds = []
            return self._checked(reply, command, number)

    def _begin(self) -> float:
        """A call begins, with the lock held: its deadline. :raise DeviceGone: the connection is of no use any more."""
        if self._dead is not None:
            raise self._gone(self._dead)
        if self._shortened:
            self._set_timeout(self.timeout)
            self._shortened = False
        return time.monotonic() + self.timeout

    def _checked(self, reply: Message, command: Command, number: int) -> memoryview:
        reply.close()
        header = reply.header
        if header.id != number or header.command != command or header.flags & TYPE_MASK != REPLY:
            self._fail(f"the answer to {command.name} (message {number}) is something else: {header}")
        if header.flags & ERROR:
            raise _refusal(header.error, command, self.device)
        return reply.payload

    def _serve(self, asked: Message, deadline: float) -> Message:
        """Answer what the device asks in line, and drop what comes too late, until the reply comes."""
        while self._drop_late(asked) or (
            not asked.header.flags & TYPE_MASK and asked.header.command in SERVED
        ):
            if not asked.header.flags & TYPE_MASK:
                self._answer(asked, deadline)
            if time.monotonic() > deadline:
                raise BlockingIOError
            asked = self._next(deadline)
        return asked

    def _drop_late(self, message: Message) -> bool:
        """Whether it is the reply to a call that nobody waits for any more."""
        if not message.header.flags & TYPE_MASK or message.header.id not in self._late:
            return False
        self._late.discard(message.header.id)
        message.close()
        return True

    def _answer(self, asked: Message, deadline: float) -> None:
        answer = self.shared.answer(asked)
        if answer is not None:
            self._send(answer, (), deadline)

    def _next(self, deadline: float) -> Message:
        """A message that has been read already, or the next one."""
        message = self._assembler.next()
        return self._receive(deadline) if message is None else message

    def _lost(self, command: Command, error: OSError | FerryError, number: int | None = None) -> NoReturn:
        """:param number: of the one call that was sent, and was waited for."""
        if isinstance(error, BlockingIOError):
            if number is None or self._half_sent or len(self._late) >= _MOST_LATE:
                self._end("a deadline was missed")
            else:
                self._late.add(number)
            raise DeviceTimeout(
                f"no answer to vfio-user {command.name} within {self.timeout:g} s",
                remedy="the device hangs, or another client is connected to it",
                phase=Phase.RUNNING,
                device=self.device,
            ) from None
        if isinstance(error, OSError):
            self._end(f"the connection broke: {error.strerror}")
            raise self._gone(self._dead) from error
        self._fail(error.reason)

    def _send(self, data: bytes, fds: Sequence[int], deadline: float) -> None:
        self._half_sent = True
        if fds:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            sent = self._socket.sendmsg((data,), (rights,))
        else:
            sent = self._socket.send(data)
        while sent < len(data):
            self._shorten(deadline)
            sent += self._socket.send(memoryview(data)[sent:])
        self._half_sent = False

    def _receive(self, deadline: float) -> Message:
        data, fds, truncated = receive(self._socket)
        while True:
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the device closed the connection")
            self._assembler.feed(data, fds, truncated)
            message = self._assembler.next()
            if message is not None:
                return message
            self._shorten(deadline)
            size = READ_SIZE if self._assembler.missing <= READ_SIZE else READ_LARGE
            data, fds, truncated = receive(self._socket, size)

    def _set_timeout(self, seconds: float) -> None:
        # The kernel's own timeouts: Python's settimeout() would add a poll() to every call. A timeout of 0 would be none.
        value = _TIMEVAL.pack(int(seconds), max(int(seconds % 1 * 1e6), 1))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)

    def _shorten(self, deadline: float) -> None:
        """For a message in pieces only the rest of the call's time is left."""
        rest = deadline - time.monotonic()
        if rest <= 0:
            raise BlockingIOError
        self._set_timeout(rest)
        self._shortened = True

    def _end(self, why: str) -> None:
        self._dead = why
        self._assembler.close()
        # Who watches it by another descriptor sees the end, and so does the device.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _fail(self, why: str) -> NoReturn:
        """The device broke the protocol."""
        self._end(f"the device broke the protocol: {why}")
        raise DeviceRefused(
            why,
            remedy="the device's process has a fault: see its log",
            device=self.device,
            phase=Phase.RUNNING,
        )

    def _gone(self, why: str | None) -> DeviceGone:
        return DeviceGone(
            f"vfio-user: {why}",
            remedy="is the device's process running?",
            device=self.device,
            phase=Phase.RUNNING,
        )
