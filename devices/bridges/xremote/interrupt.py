"""The one interrupt, from QEMU's eventfd to the VMM's. A thread carries it over: QEMU makes every descriptor that it is sent a
blocking one, which the VMM's, shared with it, may not become.

QEMU signals a level once, when it rises; whoever connects or unmasks while it is up is told of it here.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Interrupt:
    """:param asserted: whether it is up now."""

    def __init__(self, asserted: Callable[[], bool]) -> None:
        self._asserted = asserted
        #: What QEMU signals; and what it listens to, for an end of interrupt that we do not need.
        self.raised, self.resample = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._target: int | None = None
        self._masked = self._closing = False
        self._thread = threading.Thread(target=self._loop, name="interrupt", daemon=True)
        self._thread.start()

    def connect(self, eventfd: int | None) -> None:
        """Owns `eventfd`; None: there is nobody to be interrupted."""
        with self._lock:
            before, self._target, self._masked = self._target, eventfd, False
        if before is not None:
            os.close(before)
        self._look()

    def mask(self, masked: bool) -> None:
        with self._lock:
            self._masked = masked
        self._look()

    def _look(self) -> None:
        if self._target is not None and not self._masked and self._asserted():
            self.signal()

    def signal(self) -> None:
        with self._lock:
            self._signal()

    def _signal(self) -> None:
        if self._target is not None and not self._masked:
            try:
                os.eventfd_write(self._target, 1)
            except OSError as error:  # it is the VMM's, and may be anything
                log.warning("event=interrupt-lost error=%s", error)

    def settle(self) -> None:
        """The device stands still: what it has raised by now is with the VMM when this returns."""
        ready = select.poll()
        ready.register(self.raised, select.POLLIN)
        with self._lock:
            if not ready.poll(0):
                return
            os.eventfd_read(self.raised)
            self._signal()

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self.raised, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closing:
            poll.poll()
            self.settle()

    def close(self) -> None:
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for fd in (self.raised, self.resample, self._wake, self._target):
            if fd is not None:
                os.close(fd)
        self._target = None
