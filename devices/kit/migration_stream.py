"""A device's whole state as one stream of bytes, as vfio-user's MIG_DATA_READ and MIG_DATA_WRITE carry it.

The stream is a row of records, each with a head that says what it is and how long, so that a reader can size and parse it without
the device. All integers are little-endian (docs/vfio-user.md, The data):

| offset | bytes | what                                                                                           |
|--------|-------|------------------------------------------------------------------------------------------------|
| 0      | 4     | magic: "VMFR"                                                                                  |
| 4      | 4     | kind: 1 state, 2 chunk, 3 end                                                                  |
| 8      | 8     | N, bytes of content                                                                            |
| 16     | N     | state: a blob (migrate/state/blob.py); chunk: of streamed state (stream.py); end: see `_END`   |

A state comes first, so that a destination refuses what it cannot load before it has the rest. If the device ran then, what it
says is of that moment, and the state that counts comes again, last, once it is stopped. Chunks are only of devices that stream.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from devices.kit.runtime import Runtime
from devices.kit.stream import MAX_CHUNK, Streamed
from migrate.errors import BlobError, DeviceRefused, Phase
from migrate.state.blob import MAX_BLOB

_MAGIC: Final = b"VMFR"
HEAD: Final = struct.Struct("<4sIQ")
STATE, CHUNK, END = 1, 2, 3
#: Number of records before this one, and the CRC-32 (zlib) of all their bytes.
_END: Final = struct.Struct("<QI4x")
#: The most that a record of each kind can hold; checked before anything is kept.
LIMITS: Final = {STATE: MAX_BLOB, CHUNK: MAX_CHUNK, END: _END.size}
#: What one turn takes off the streamed state: small, so that a read of some hundred KiB does not gather far more.
_PIECE: Final = 1 << 20


class SavingStream:
    """State out, while the device is in PRE_COPY and then STOP_COPY. Every call is made with the participant's lock held."""

    def __init__(self, runtime: Runtime, *, stopped: bool) -> None:
        """:param stopped: whether the session begins with the device stopped, in STOP_COPY."""
        self._runtime = runtime
        self._streamed: Streamed | None = runtime.participant.streamed
        self._buffer = bytearray()
        self._records = 0
        self._checksum = 0
        self._state_size = 0
        #: Whether the state that counts has been put.
        self._final = stopped
        self.ended = False
        #: The schema version to write.
        self.version = runtime.format.version.version

    def begin(self) -> None:
        """:raise DeviceRefused, BlobError: the device has no state to give."""
        self._put_state()

    def read(self, size: int, *, stopped: bool) -> bytes:
        """Up to `size` bytes: fewer when there is no more now (running) or at all (stopped)."""
        while len(self._buffer) < size and self._more(stopped=stopped):
            pass
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _more(self, *, stopped: bool) -> bool:
        if self.ended:
            return False
        if self._streamed is not None:
            chunk, _ = self._streamed.read_chunk(_PIECE)
            if chunk:
                self._put(CHUNK, chunk)
                return True
        if not stopped:
            return False
        if not self._final:
            self._put_state()
            self._final = True
        self._put(END, _END.pack(self._records, self._checksum))
        self.ended = True
        return True

    def _put_state(self) -> None:
        blob = self._runtime.save_as(self.version)
        self._state_size = len(blob)
        self._put(STATE, blob)

    def _put(self, kind: int, content: bytes) -> None:
        for part in (HEAD.pack(_MAGIC, kind, len(content)), content):
            self._checksum = zlib.crc32(part, self._checksum)
            self._buffer += part
        self._records += 1

    def remaining(self) -> tuple[int, int, int]:
        """Bytes of the first pass, bytes written since, and all that there would be if the device were stopped now."""
        initial, dirty = self._streamed.left() if self._streamed is not None else (0, 0)
        initial += len(self._buffer)
        last = 0 if self.ended else HEAD.size + _END.size
        if not self._final:
            last += HEAD.size + self._state_size
        return initial, dirty, initial + dirty + last


class LoadingStream:
    """State in, while the device is in RESUMING. What is wrong is refused at once, and everything after it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._buffer = bytearray()
        self._records = 0
        self._checksum = 0
        self._broken = ""
        #: The end has come, and all before it fits.
        self.complete = False

    def feed(self, data: memoryview) -> None:
        """:raise DeviceRefused, BlobError: this is not what a device like this one gave."""
        if self._broken:
            raise _refused(f"the stream was refused before: {self._broken}")
        try:
            self._buffer += data
            while self._take():
                pass
        except (DeviceRefused, BlobError) as error:
            self._broken = error.reason
            self._buffer.clear()
            raise

    def _take(self) -> bool:
        if self.complete and self._buffer:
            raise _refused("bytes came after the end")
        if len(self._buffer) < HEAD.size:
            return False
        magic, kind, size = HEAD.unpack_from(self._buffer)
        if magic != _MAGIC or kind not in LIMITS or size > LIMITS[kind]:
            raise _refused(f"a record of kind {kind} and {size} bytes begins with {magic!r}")
        if self._records == 0 and kind != STATE:
            raise _refused(f"it begins with a record of kind {kind}, not with a state")
        whole = HEAD.size + size
        if len(self._buffer) < whole:
            return False
        record = bytes(self._buffer[:whole])
        del self._buffer[:whole]
        content = record[HEAD.size :]
        if kind == STATE:
            self._runtime.stage(content)
        elif kind == CHUNK:
            self._runtime.take_chunk(content)
        else:
            self._end(content)
        self._records += 1
        self._checksum = zlib.crc32(record, self._checksum)
        return True

    def _end(self, content: bytes) -> None:
        if len(content) != _END.size or _END.unpack(content) != (self._records, self._checksum):
            raise _refused(f"the end does not fit the {self._records} records before it")
        self.complete = True


def _refused(reason: str) -> DeviceRefused:
    return DeviceRefused(
        f"this is no stream of a device's state: {reason}",
        remedy="carry every byte that MIG_DATA_READ gave, in order, and only those",
        phase=Phase.LOAD,
    )
