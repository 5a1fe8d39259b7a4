"""What may be changed while a migration runs: the bandwidth that page threads share, the downtime limit, what a stall leads to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum

#: A thread that slept too long, or had nothing to send, may catch up on this much time, s.
CATCH_UP_SECONDS = 0.02


class OnStall(StrEnum):
    """What to do when rounds no longer bring the remainder down."""

    ABORT = "abort"  #: end the migration; the source runs on
    EXTEND_DOWNTIME = (
        "extend-downtime"  #: raise the downtime limit to what would be enough, up to EXTEND_AT_MOST times
    )
    WAIT = "wait"  #: go on sending until it converges, is cancelled or runs into its timeout


#: How far `extend-downtime` goes beyond the limit that was asked for.
EXTEND_AT_MOST = 8.0


class RateLimit:
    """Bytes a second, over all threads that pay. Off, it costs one comparison."""

    def __init__(self, rate: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """:param rate: bytes/s; 0 is off."""
        self._clock = clock
        self._lock = threading.Lock()
        self._due = 0.0  #: when everything that was paid for is through, on the clock
        self._changed = threading.Event()
        self.rate = rate

    def set(self, rate: float) -> None:
        """From now on; whoever sleeps by the old rate wakes up."""
        with self._lock:
            self.rate = rate
            self._due = self._clock()
            self._changed.set()
            self._changed = threading.Event()

    def pay(self, size: int) -> None:
        """Call after sending `size` bytes: sleeps until the rate allows the next."""
        if not self.rate:
            return
        with self._lock:
            if not self.rate:
                return
            now = self._clock()
            self._due = max(self._due, now - CATCH_UP_SECONDS) + size / self.rate
            wait, changed = self._due - now, self._changed
        if wait > 0:
            changed.wait(wait)
