"""A device's state through a pipe of the front end's: SET_DEVICE_STATE_FD begins it, CHECK_DEVICE_STATE ends it.

The front end may be slow, or never close its end: the pipe has a thread of its own, and a deadline. What comes in is kept and
judged at the check; nothing is taken over before. Source: docs/interop/vhost-user.rst, "Migrating back-end state".
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import Final

from devices.protocols.vhost_user.messages import LOAD, refused
from migrate.state.blob import MAX_BLOB

#: The answer's bit that says: no descriptor comes back, yours is used.
NO_FD_BACK: Final = 1 << 8
#: Seconds from the beginning to the end of a transfer.
DEADLINE: Final = 10.0
_CHUNK: Final = 64 << 10


class StateTransfer:
    def __init__(self, fd: int, direction: int, blob: bytes) -> None:
        """:param fd: owned from here on. :param blob: what is sent, where that is the direction."""
        self._fd = fd
        self._loads = direction == LOAD
        self._blob = bytearray(blob)
        self._wrong = ""
        self._cancel = os.eventfd(0, os.EFD_CLOEXEC)
        os.set_blocking(fd, False)
        self._thread = threading.Thread(target=self._run, name="device-state", daemon=True)
        self._thread.start()

    def end(self) -> bytes | None:
        """What was loaded, or None where it was saved. By now the front end has seen, or made, the end of the pipe.

        :raise BadRequest: it failed, or there is no end.
        """
        self._thread.join(1.0)
        self.close()
        if self._wrong:
            raise refused(f"the device's state: {self._wrong}")
        return bytes(self._blob) if self._loads else None

    def close(self) -> None:
        """Nothing more goes through."""
        if self._cancel >= 0:
            os.eventfd_write(self._cancel, 1)
            self._thread.join(1.0)
            os.close(self._cancel)
            self._cancel = -1

    def _run(self) -> None:
        try:
            (self._receive if self._loads else self._send)(time.monotonic() + DEADLINE)
        except OSError as error:
            self._wrong = error.strerror or str(error)
        finally:
            os.close(self._fd)  # which is how the other side learns of the end

    def _ready(self, deadline: float) -> bool:
        reading, writing = ([self._fd], []) if self._loads else ([], [self._fd])
        left = max(deadline - time.monotonic(), 0)
        found = select.select([self._cancel, *reading], writing, [], left)
        if self._cancel in found[0]:
            self._wrong = "it was given up"
        elif not found[0] and not found[1]:
            self._wrong = f"nothing moved within {DEADLINE:g} s"
        return not self._wrong

    def _receive(self, deadline: float) -> None:
        while self._ready(deadline):
            data = os.read(self._fd, _CHUNK)
            if not data:
                return
            self._blob += data
            if len(self._blob) > MAX_BLOB:
                self._wrong = f"it is larger than {MAX_BLOB} bytes"
                return

    def _send(self, deadline: float) -> None:
        while self._blob and self._ready(deadline):
            del self._blob[: os.write(self._fd, memoryview(bytes(self._blob[:_CHUNK])))]
