"""How many SCSI requests are under way in a QEMU, which no command of its monitor tells: its trace does, a line a request.

Why anybody has to know: QEMU 7.2's `stop` lets a request that takes more than one step go on, and the LSI controllers' saved state
has no request in it. A machine that was moved with one under way waits for its answer for ever (docs/mpqemu.md).
"""

from __future__ import annotations

import logging
import os
import select
import threading
from typing import Final

log = logging.getLogger(__name__)

_BEGINS, _ENDS = "scsi_req_alloc", "scsi_req_dequeue"
EVENTS: Final = (_BEGINS, _ENDS)
#: Of a line that is none of these, how much is told in our log.
_MOST: Final = 300


class Requests:
    """Reads the trace on a thread of its own, so that QEMU never waits for a pipe that is full."""

    def __init__(self) -> None:
        self._read, self.pipe = os.pipe()
        os.set_blocking(self._read, False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._under_way = 0
        self._rest = b""
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="trace", daemon=True)
        self._thread.start()

    def inherited(self) -> None:
        """QEMU has its end by now, and we need ours no more."""
        os.close(self.pipe)

    def under_way(self) -> int:
        """As of everything that QEMU had done before it last answered somebody: it writes a line before it goes on."""
        with self._lock:
            self._drain()
            return self._under_way

    def _drain(self) -> bool:
        """With the lock. False: nothing will come any more."""
        while True:
            try:
                data = os.read(self._read, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line.decode(errors="replace"))

    def _take(self, line: str) -> None:
        word = line.partition(" ")[0].rpartition(":")[2]  # with -msg timestamp=on there is a time before it
        if word == _BEGINS:
            self._under_way += 1
        elif word == _ENDS:
            self._under_way -= 1
        elif line:
            log.info("event=qemu-says line=%r", line[:_MOST])

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        going = True
        while going:
            poll.poll()
            with self._lock:
                going = not self._closing and self._drain()

    def close(self) -> None:
        """QEMU has ended."""
        with self._lock:
            self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._read)
        os.close(self._wake)
