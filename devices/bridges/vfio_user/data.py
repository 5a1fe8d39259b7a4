"""A server's MIG_DATA as streamed state: whatever its size, byte for byte, while the machine runs where the server can.

Nothing here knows what the bytes mean. A session is the server's own (PRE_COPY and STOP_COPY, or STOP_COPY alone); it has come to
its end when the server, stopped, answers a read with nothing. Chunks are migrate.state.chunks'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from devices.bridges.vfio_user.upstream import Upstream
from devices.protocols.vfio_user.client import RequestRefused
from migrate.errors import DeviceRefused, Phase
from migrate.state import chunks
from migrate.state.lifecycle import DeviceState

_S = DeviceState
#: Most bytes of data in a chunk: some calls of a MiB, so that reading or writing one keeps every deadline.
_MOST: Final = 4 << 20


class MigData:
    """What devices.kit.stream.Streamed wants."""

    def __init__(self, upstream: Upstream, stands_still: Callable[[], bool]) -> None:
        """:param stands_still: whether the device does by the bus's word."""
        self._upstream = upstream
        self._stands_still = stands_still
        #: Whether data is being read, and whether the device is stopped, so that it comes to an end.
        self._open = self._stopped = False
        self._number = 0
        #: Whether the end was read, or written.
        self.ended = False
        self._digest = hashlib.sha256()

    @property
    def begun(self) -> bool:
        """Whether data was read, or written."""
        return self._number > 0

    def _anew(self) -> None:
        self._number, self.ended, self._digest = 0, False, hashlib.sha256()

    # -- out ------------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A session begins, of a device that runs or stands still; others give their data once they stand."""
        self._anew()
        self._stopped = self._stands_still() or self._upstream.state() in (_S.STOP, _S.STOP_COPY)
        if self._stopped:
            self._upstream.go(_S.STOP_COPY, Phase.SAVE)
        elif self._upstream.copies_ahead:
            self._upstream.go(_S.PRE_COPY, Phase.PRECOPY)
        self._open = True

    def stop(self) -> None:
        """The device stops within the session."""
        self._upstream.go(_S.STOP_COPY, Phase.STOP)
        self._stopped = True

    def end(self) -> None:
        """The session is over: the device runs on, or stands still, as it did within it."""
        self._upstream.go(_S.STOP if self._stopped else _S.RUNNING, Phase.SAVE)
        self._open = False

    def read_chunk(self, max_bytes: int) -> tuple[bytes, int]:
        """Some of the data (empty: none now), and an estimate of what is left: never 0 before the end of a stopped device."""
        if not self._open or max_bytes <= chunks.OVERHEAD:
            raise self._refused("no data can be read now", Phase.SAVE)
        if self.ended or not (self._stopped or self._upstream.copies_ahead):
            return b"", 0
        data = bytearray()
        most = min(max_bytes - chunks.OVERHEAD, _MOST)
        dry = False
        while len(data) < most and not dry:
            try:
                piece = self._upstream.migration.read(most - len(data))
            except RequestRefused as error:
                raise self._refused(f"it did not give its state: {error.reason}", Phase.SAVE) from error
            data += piece
            # A short read need not be the end: other servers give what they have at hand.
            dry = not piece
        self.ended = dry and self._stopped
        if not data and not self.ended:
            return b"", 0
        self._digest.update(data)
        chunk = chunks.pack(self._number, data, last=self.ended)
        self._number += 1
        return chunk, 0 if dry else self._left()

    def _left(self) -> int:
        left = self._upstream.remaining
        return 1 if left is None else max(1, left.stop_copy if self._stopped else left.initial + left.dirty)

    def left(self) -> tuple[int, int]:
        left = self._upstream.remaining
        return (0, 0) if left is None else (left.initial, left.dirty)

    # -- in -------------------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """The server waits for data from the beginning."""
        self._anew()
        self._open = False
        self._upstream.go(_S.RESUMING, Phase.LOAD)

    def write_chunk(self, chunk: bytes) -> None:
        """:raise DeviceRefused: it is no such chunk, one before it is missing, or the server does not take it."""
        found = chunks.unpack(chunk)
        if found is None or found.number not in (0, self._number):
            raise self._refused(
                f"{len(chunk)} bytes, where number {self._number} is next, are no chunk of its data",
                Phase.LOAD,
            )
        if found.number == 0 and self._number:
            # The device was reset on its way out: what came of it before means nothing.
            self._upstream.power_on()
            self.clear()
        elif self.ended:
            raise self._refused("data came after its end", Phase.LOAD)
        try:
            self._upstream.migration.write(found.data)
        except RequestRefused as error:
            raise self._refused(f"it does not take the state sent: {error.reason}", Phase.LOAD) from error
        self._digest.update(found.data)
        self._number, self.ended = found.number + 1, found.last

    def digests(self) -> bytes:
        """SHA-256 of all that was read, or written: the same bytes went in that came out. What the server made of them, nobody
        can tell who does not know them."""
        return self._digest.digest()

    def _refused(self, reason: str, phase: Phase) -> DeviceRefused:
        return self._upstream.refused(f"its vfio-user server: {reason}", "see the server's log", phase)
