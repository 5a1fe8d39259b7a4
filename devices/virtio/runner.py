"""The thread of one virtqueue: takes requests, has them carried out, completes them; and how it comes to rest.

A request goes through three steps. *Begin* and *finish* touch rings and guest memory by its bookkeeping, under the device's
lock; *run* is the work on the back end, which may last, without it. So whoever answers a VMM or the bus waits for no disk.

    take ─► begin ─► run ─► finish ─► give back ─► interrupt
    └── lock ──────┘       └── lock ──────────────────────┘

At most one request of a queue is between take and give back. Coming to rest waits for its `run` and completes it; all
others stay in the available ring, which moves with guest memory. A snapshot that is taken while the device runs has that
one request in `in_flight`: whoever loads it carries the request out again, once, and answers it once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from devices.virtio.ring import Chain, DriverFault, SplitQueue
from migrate.errors import MemoryFault

log = logging.getLogger(__name__)


class Work(Protocol):
    """One request being carried out."""

    def run(self) -> None:
        """Without the lock; touches the back end and the views that it got before. Never raises."""

    def finish(self) -> int:
        """With the lock: mark and store what the guest is to see. Bytes written to its buffers. :raise MemoryFault:"""


class QueueRunner:
    """All methods are called with the device's lock held, but those that say otherwise."""

    def __init__(
        self,
        queue: SplitQueue,
        lock: threading.RLock,
        name: str,
        *,
        begin: Callable[[Chain], Work],
        interrupt: Callable[[], None],
        broken: Callable[[DriverFault], None],
        rested: Callable[[], None] = lambda: None,
    ) -> None:
        """
        :param begin: makes a request of a chain. :raise DriverFault: it cannot even be answered.
        :param interrupt: the driver wants to know.
        :param broken: the queue is of no use until a reset.
        :param rested: a request ended after `halt` had said that one was in flight.
        """
        self.queue = queue
        self._begin = begin
        self._interrupt = interrupt
        self._broken = broken
        self._rested = rested
        self._name = name
        self._lock = lock
        self._changed = threading.Condition(lock)
        #: Guards the end of `run` alone, so that who holds the device's lock can wait for it.
        self._ended = threading.Condition(threading.Lock())
        self._running: Work | None = None  # from begin to the end of run
        self._done: Work | None = None  # from there to its completion
        self._head = -1  # of either
        self._allowed = False
        self._closing = False
        self._thread: threading.Thread | None = None
        #: Heads that were in flight when the state was loaded, to be carried out before anything new.
        self._again: list[int] = []

    # -- run and rest --------------------------------------------------------------------------------------------------------

    def allow(self) -> None:
        """Take requests from now on, first those that were in flight, then those that wait, without a notification."""
        self._allowed = True
        self._again = [head for head in self.queue.in_flight if head != self._head]
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
        self._changed.notify()

    def notify(self) -> None:
        """The driver says that there is something."""
        self._changed.notify()

    def halt(self) -> bool:
        """Take nothing more. True if nothing is in flight; else `rested` is called when that has ended."""
        self._allowed = False
        return self._head < 0

    @property
    def busy(self) -> bool:
        """Whether a request is on its way."""
        return self._head >= 0

    def rest(self, deadline: float) -> bool:
        """Take nothing more, wait at most `deadline` seconds for what is in flight, and complete it. False: it lasts."""
        self._allowed = False
        with self._ended:
            if not self._ended.wait_for(lambda: self._running is None, deadline):
                return False
        self._complete()
        return True

    def close(self) -> None:
        """The thread ends when what is in flight has."""
        self._closing = True
        self._allowed = False
        self._changed.notify()

    # -- one request, in steps: by the thread, and by tests that want each of them ------------------------------------------

    def take(self) -> Work | None:
        """The next request, begun; or None, and the driver will notify."""
        if not self._allowed or self._head >= 0 or not self.queue.enabled:
            return None
        try:
            chain = self._next()
            if chain is None:
                return None
            self._head = chain.head
            self._running = work = self._begin(chain)
        except DriverFault as fault:
            self._fail(fault)
            return None
        return work

    def run(self) -> None:
        """Carry out what was taken. Without the device's lock."""
        work = self._running
        assert work is not None
        work.run()
        with self._ended:
            self._running, self._done = None, work
            self._ended.notify_all()

    def complete(self) -> None:
        """Tell the driver. With the device's lock; nothing where `rest` did it."""
        resting = not self._allowed
        if self._complete() and resting:
            self._rested()

    def _next(self) -> Chain | None:
        if self._again:
            return self.queue.chain(self._again.pop(0))
        self.queue.be_deaf()
        chain = self.queue.take()
        if chain is None and self.queue.listen():
            chain = self.queue.take()
        return chain

    def _complete(self) -> bool:
        work, self._done = self._done, None
        if work is None:
            return False
        head, self._head = self._head, -1
        try:
            self.queue.give_back(head, work.finish())
            if self.queue.wants_interrupt():
                self._interrupt()
        except DriverFault as fault:
            self._fail(fault)
        except MemoryFault as error:
            self._fail(DriverFault(error.reason))
        return True

    def _fail(self, fault: DriverFault) -> None:
        self._head, self._allowed = -1, False
        log.warning("event=driver-fault queue=%s reason=%r", self._name, fault.reason)
        self._broken(fault)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while self.take() is None:
                    if self._closing:
                        return
                    self._changed.wait()
            self.run()
            with self._lock:
                self.complete()
