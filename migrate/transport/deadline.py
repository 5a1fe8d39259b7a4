"""One deadline for a row of blocking steps."""

from __future__ import annotations

import time


class Deadline:
    """A moment on the monotonic clock, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, for `settimeout`.

        :raise TimeoutError: there are none (a timeout of 0 would mean "do not block").
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {self.seconds:g} s")
        return left
