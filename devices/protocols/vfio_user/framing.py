"""Bytes and descriptors in, whole messages out. No I/O; used by both sides, so that there is one place for limits.

A stream socket may join messages that were sent one by one, and split large ones. Descriptors come with the bytes they
were sent with, and the kernel ends a read right after such bytes: so the descriptors of one read belong to the message
that the read's last byte belongs to. Every descriptor is owned by exactly one of: the assembler, a Message, whoever took
it from the message.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from devices.protocols.vfio_user.messages import (
    HEADER,
    HEADER_SIZE,
    MAX_FDS,
    MAX_MESSAGE,
    Header,
    invalid,
)
from migrate.errors import Phase, RemoteProtocolError


@dataclass(slots=True)
class Message:
    """One whole message, and the owner of its descriptors until they are taken."""

    header: Header
    payload: memoryview
    fds: list[int]
    #: More descriptors came than are allowed; none are kept.
    too_many_fds: bool = False

    def take_fd(self) -> int:
        """The next descriptor, the caller's from here on.

        :raise RequestError: there is none.
        """
        if not self.fds:
            raise invalid("a descriptor is missing")
        return self.fds.pop(0)

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        close_all(self.fds)


class FramingError(RemoteProtocolError):
    """A header with an impossible size: where the next message begins is unknown, the connection cannot go on."""

    code = "VfioUserFraming"
    #: The header, and what a reply to it carries, if one is sent before the end.
    header = Header(0, 0, 0, 0, 0)
    errno = errno.EINVAL


def _impossible(header: Header) -> FramingError:
    error = FramingError(
        f"a message claims to be {header.size} bytes long; {HEADER_SIZE} to {MAX_MESSAGE} are possible",
        phase=Phase.RUNNING,
        remedy="look at the other side of this vfio-user socket",
    )
    error.header = header
    return error


def close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


class Assembler:
    """Collects what was read from one connection until it makes a message."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        #: Bytes of the stream that were handed out, and that were fed.
        self._taken = 0
        self._fed = 0
        #: Descriptors that wait, each with the position in the stream where its read ended.
        self._fds: list[tuple[int, int]] = []
        #: Where a read ended with which the kernel had to drop descriptors, or we had.
        self._dropped_at: int | None = None

    def feed(self, data: bytes, fds: list[int], truncated: bool = False) -> None:
        """What one read gave. Owns the descriptors from here on. `truncated`: the kernel dropped some of them."""
        self._buffer += data
        self._fed += len(data)
        if fds:
            self._fds += [(self._fed, fd) for fd in fds]
        if truncated or len(self._fds) > MAX_FDS:
            self._dropped_at = self._fed
            self.close()

    def next(self) -> Message | None:
        """The next whole message, or None: more must be read. To be called until it gives None after every feed.

        :raise FramingError: the header makes no sense.
        """
        if len(self._buffer) < HEADER_SIZE:
            return None
        header = Header._make(HEADER.unpack_from(self._buffer))
        if not HEADER_SIZE <= header.size <= MAX_MESSAGE:
            raise _impossible(header)
        if len(self._buffer) < header.size:
            return None
        # A copy of its own: the buffer could not shrink while somebody holds a view of it.
        payload = memoryview(bytes(self._buffer[HEADER_SIZE : header.size]))
        del self._buffer[: header.size]
        self._taken += header.size
        message = Message(header, payload, [])
        if self._fds:
            message.fds = [fd for end, fd in self._fds if end <= self._taken]
            self._fds = [(end, fd) for end, fd in self._fds if end > self._taken]
        if self._dropped_at is not None and self._dropped_at <= self._taken:
            self._dropped_at = None
            message.too_many_fds = True
        return message

    @property
    def pending(self) -> bool:
        """Whether bytes were read that no message has been made of."""
        return bool(self._buffer)

    @property
    def missing(self) -> int:
        """How many bytes the message that has begun still wants at least."""
        if len(self._buffer) < HEADER_SIZE:
            return HEADER_SIZE - len(self._buffer)
        size: int = HEADER.unpack_from(self._buffer)[2]
        return size - len(self._buffer)

    def close(self) -> None:
        """Closes the descriptors of messages that never became whole."""
        close_all([fd for _, fd in self._fds])
        self._fds = []
