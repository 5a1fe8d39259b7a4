"""QEMU's migration stream of an x-remote process as streamed state: byte for byte, in migrate.state.chunks.

QEMU writes it once the device stands still, into a memfd, so its size is known before the first byte is sent. The destination's
QEMU reads it when the state is applied.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

from devices.bridges.xremote.remote import Remote
from migrate.errors import DeviceRefused, Phase
from migrate.state import chunks

#: Most bytes of a stream: some hundred times what a controller has, and room for a display's.
MOST: Final = 256 << 20
_CHUNK: Final = 4 << 20


class QemuStream:
    """What devices.kit.stream.Streamed wants."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        #: The device stands still, so that there is something to be read.
        self.stopped = False
        self._fd = -1  # a memfd: what QEMU wrote, or what it is to read
        self.size = 0
        self._open = False
        self._at = self._number = 0
        #: Whether the end was read, or written.
        self.ended = False
        self._digest = hashlib.sha256()

    def _anew(self) -> None:
        self._at = self._number = 0
        self.ended, self._digest = False, hashlib.sha256()

    def forget(self) -> None:
        """The device runs on: what was written of it is past."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self.size = -1, 0
        self._anew()

    # -- out ------------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._anew()
        if self.stopped:
            self.write_down()
        self._open = True

    def write_down(self) -> None:
        """Of a device that stands still. What was written since it last ran is still right, and QEMU would refuse to do it again.

        :raise DeviceRefused, DeviceTimeout: QEMU did not, or it is too much.
        """
        if self._fd >= 0:
            return
        fd = os.memfd_create("qemu-stream", os.MFD_CLOEXEC)
        try:
            self._remote.save(fd)
            size = os.fstat(fd).st_size
            if size > MOST:
                raise self._refused(f"its QEMU has {size} bytes of state; {MOST} go", Phase.SAVE)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self.size = fd, size

    def end(self) -> None:
        self._open = False

    def read_chunk(self, max_bytes: int) -> tuple[bytes, int]:
        if not self._open or max_bytes <= chunks.OVERHEAD:
            raise self._refused("no state can be read now", Phase.SAVE)
        if self.ended or self._fd < 0:
            return b"", 0
        data = os.pread(self._fd, min(max_bytes - chunks.OVERHEAD, _CHUNK), self._at)
        self._at += len(data)
        self.ended = self._at == self.size
        self._digest.update(data)
        chunk = chunks.pack(self._number, data, last=self.ended)
        self._number += 1
        return chunk, self.size - self._at

    def left(self) -> tuple[int, int]:
        """Before the stop nobody knows."""
        return (self.size - self._at, 0)

    # -- in -------------------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """A QEMU waits for a stream, from its beginning."""
        self.forget()
        self._open = False
        self._fd = os.memfd_create("qemu-stream", os.MFD_CLOEXEC)

    def write_chunk(self, chunk: bytes) -> None:
        """:raise DeviceRefused: it is no such chunk, one before it is missing, or it is too much."""
        found = chunks.unpack(chunk)
        if found is None or found.number not in (0, self._number):
            raise self._refused(
                f"{len(chunk)} bytes, where number {self._number} is next, are no chunk of its stream",
                Phase.LOAD,
            )
        if found.number == 0 and self._number:
            self.clear()  # the device was reset on its way out
        elif self.ended:
            raise self._refused("a chunk came after its stream's end", Phase.LOAD)
        if self.size + len(found.data) > MOST:
            raise self._refused(f"more than {MOST} bytes of state were sent", Phase.LOAD)
        at = 0
        while at < len(found.data):
            at += os.pwrite(self._fd, found.data[at:], self.size + at)
        self.size += len(found.data)
        self._digest.update(found.data)
        self._number, self.ended = found.number + 1, found.last

    def hand_over(self) -> None:
        """:raise DeviceRefused: not all of it has come, or QEMU does not take it."""
        if not self.ended:
            raise self._refused("its stream has not come to its end", Phase.LOAD)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._remote.load(self._fd)

    def digests(self) -> bytes:
        """SHA-256 of all that was read, or written. What QEMU made of it, nobody can tell who does not know it."""
        return self._digest.digest()

    def _refused(self, reason: str, phase: Phase) -> DeviceRefused:
        return DeviceRefused(
            reason, device=self._remote.device, phase=phase, remedy="see its log, and its QEMU's"
        )
