"""A bandwidth limit holds its rate over all threads, wakes when it is changed, and costs nothing when off."""

from __future__ import annotations

import threading
import time

from migrate.coordinator.limits import RateLimit


def test_the_rate_is_never_exceeded_however_many_threads_pay() -> None:
    rate, each, threads = 50e6, 64 << 10, 4
    limit = RateLimit(rate)
    sent = [0] * threads
    stop = threading.Event()

    def work(number: int) -> None:
        while not stop.is_set():
            limit.pay(each)
            sent[number] += each

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    start = time.monotonic()
    for worker in workers:
        worker.start()
    stop.wait(1.0)
    stop.set()
    elapsed = time.monotonic() - start
    limit.set(0)
    for worker in workers:
        worker.join()
    # An upper bound holds on the slowest machine; how near to it a machine comes is for `make bench`.
    assert sum(sent) <= rate * elapsed * 1.05 + threads * each


def test_a_thread_that_sleeps_by_an_old_limit_is_woken_by_a_new_one() -> None:
    limit = RateLimit(1000.0)
    worker = threading.Thread(target=limit.pay, args=(1_000_000,))
    worker.start()
    limit.set(0)
    worker.join(10.0)
    assert not worker.is_alive()


def test_idle_time_is_not_saved_up_for_a_burst() -> None:
    now = [0.0]
    limit = RateLimit(1e6, clock=lambda: now[0])
    limit.pay(0)
    now[0] = 100.0
    waits: list[float] = []
    limit._changed = Recorder(waits)
    for _ in range(10):
        limit.pay(100_000)
    # 1 MB at 1 MB/s is one second, less the little that may be caught up on.
    assert 0.97 <= waits[-1] <= 1.0


class Recorder(threading.Event):
    def __init__(self, waits: list[float]) -> None:
        super().__init__()
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.append(timeout or 0.0)
        return False
