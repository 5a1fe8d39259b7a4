"""Other ways to call than one by one: commands sent ahead of their replies, commands that want none, and what is asked in between.

vfio-user.rst, Command Concurrency: the server carries out commands in the order in which they are sent.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Sequence

from devices.protocols.vfio_user.connection import Connection, RequestRefused
from devices.protocols.vfio_user.messages import HEADER, HEADER_SIZE, NO_REPLY, TYPE_MASK, Buffer, Command
from migrate.errors import DeviceRefused, FerryError

#: Most bytes and commands that are sent ahead of their replies: both fit into the socket's buffers, so that neither side stands
#: in a send while the other does.
_AHEAD_BYTES, _AHEAD = 32 << 10, 64


class Pipelining(Connection):
    """What Client has beside calls."""

    def _post(self, command: Command, payload: Buffer) -> None:
        """Send and want no reply, not even an error: a later call that returns says that this one was carried out."""
        with self._lock:
            deadline = self._begin()
            self._id = (self._id + 1) & 0xFFFF
            header = HEADER.pack(self._id, command, HEADER_SIZE + len(payload), NO_REPLY, 0)
            try:
                self._send(header + payload, (), deadline)
            except (OSError, FerryError) as error:
                self._lost(command, error)

    def _calls(self, command: Command, payloads: Sequence[Buffer]) -> list[memoryview | RequestRefused]:
        """Many calls, sent ahead of their replies: the payload of each reply, or what it was refused with.

        :raise DeviceTimeout, DeviceGone, DeviceRefused: the connection is of no use any more.
        """
        replies: list[memoryview | RequestRefused] = []
        waiting: deque[tuple[int, int]] = deque()
        ahead = 0
        with self._lock:
            deadline = self._begin()
            try:
                for payload in payloads:
                    while waiting and (ahead + len(payload) > _AHEAD_BYTES or len(waiting) >= _AHEAD):
                        ahead -= self._take(replies, command, waiting, deadline)
                    self._id = number = (self._id + 1) & 0xFFFF
                    header = HEADER.pack(number, command, HEADER_SIZE + len(payload), 0, 0)
                    self._send(header + payload, (), deadline)
                    waiting.append((number, len(payload)))
                    ahead += len(payload)
                while waiting:
                    self._take(replies, command, waiting, deadline)
            except DeviceRefused:
                raise  # said by _checked, which has ended the connection
            except (OSError, FerryError) as error:
                self._lost(command, error)
        return replies

    def _take(
        self,
        replies: list[memoryview | RequestRefused],
        command: Command,
        waiting: deque[tuple[int, int]],
        deadline: float,
    ) -> int:
        """The oldest reply that is waited for; the bytes of its command."""
        number, size = waiting.popleft()
        reply = self._next(deadline)
        if self._late or not reply.header.flags & TYPE_MASK:
            reply = self._serve(reply, deadline)
        try:
            replies.append(self._checked(reply, command, number))
        except RequestRefused as refusal:
            replies.append(refusal)
        return size

    def serve(self, seconds: float = 0.0) -> int:
        """Answer what the device asks of us in line, while no call is made. How many it were.

        :raise DeviceGone, DeviceRefused: the connection is of no use any more.
        """
        done = 0
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        with self._lock:
            deadline = self._begin()
            while (asked := self._assembler.next()) is not None or poll.poll(
                max(until - time.monotonic(), 0) * 1000
            ):
                try:
                    if asked is None:
                        asked = self._receive(deadline)
                    if self._drop_late(asked):
                        continue
                    if asked.header.flags & TYPE_MASK:
                        asked.close()
                        self._fail(f"a reply that nobody waits for: {asked.header}")
                    self._answer(asked, deadline)
                except DeviceRefused:
                    raise
                except (OSError, FerryError) as error:
                    self._lost(Command.DMA_READ, error)
                done += 1
        return done
