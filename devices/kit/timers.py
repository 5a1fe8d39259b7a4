"""Periodic calls of a device: in a thread of their own, under the device's lock, and only while it runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Timer:
    """One periodic call; made by `Device.every`."""

    __slots__ = ("action", "cancelled", "due", "failed", "seconds")

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self.seconds = seconds
        self.action = action
        self.due = 0.0
        self.cancelled = False
        self.failed = False

    def cancel(self) -> None:
        """No call begins after this (when called under the device's lock, as all of a device's methods are)."""
        self.cancelled = True


class Timers:
    """The timers of one device. All methods are called with the lock held."""

    def __init__(self, lock: threading.RLock) -> None:
        self._changed = threading.Condition(lock)
        self._timers: list[Timer] = []
        self._running = False
        self._thread: threading.Thread | None = None

    def every(self, seconds: float, action: Callable[[], None]) -> Timer:
        if not seconds > 0:
            raise ValueError(f"a period is more than 0 seconds, not {seconds}")
        timer = Timer(seconds, action)
        timer.due = time.monotonic() + seconds
        self._timers = [one for one in self._timers if not one.cancelled] + [timer]
        if self._running:
            self._wake()
        return timer

    def run(self) -> None:
        """RUNNING: the periods begin now."""
        self._running = True
        now = time.monotonic()
        for timer in self._timers:
            timer.due = now + timer.seconds
        if self._timers:
            self._wake()

    def rest(self) -> None:
        """P2P or STOP: as the lock is held, no call is in progress, and none begins."""
        self._running = False

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="timers", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _loop(self) -> None:
        with self._changed:
            while True:
                self._timers = [timer for timer in self._timers if not timer.cancelled]
                if not self._running or not self._timers:
                    self._changed.wait()
                    continue
                timer = min(self._timers, key=lambda one: one.due)
                delay = timer.due - time.monotonic()
                if delay > 0:
                    self._changed.wait(delay)
                    continue
                # A late call is made once and the period goes on from now: a burst after a delay helps nobody.
                timer.due = time.monotonic() + timer.seconds
                try:
                    timer.action()
                except Exception:
                    # Once: a timer that fails a thousand times a second would fill the disk.
                    if not timer.failed:
                        log.exception("event=timer-failed period=%s", timer.seconds)
                    timer.failed = True
