"""What asking a tracker costs, for each GiB of memory, with a tenth of a percent, a tenth, and all of it dirty (pages at random).

The raw limits: for `scan` the bare ioctl, without making a bitmap of its answer; for `log` ORing two bitmaps of this size; for
`compare` the digests alone, over memory that lies in place.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from migrate.errors import TrackerError
from migrate.memory import (
    CompareTracker,
    DirtyBitmap,
    GuestAddress,
    GuestMemory,
    LogTracker,
    PageRuns,
    RegionSpec,
    ScanTracker,
    Tracker,
    prove,
    scan,
)
from migrate.memory.compare import BLOCK_SIZE
from tests.bench.figures import GIB, Figure, Scale

SHARES = (0.001, 0.1, 1.0)
RUNS = 9

#: Makes pages dirty as a participant with this tracker would. And one pass of the raw limit.
Touch = Callable[[NDArray[np.int64]], None]
Raw = Callable[[], None]


def run(scale: Scale) -> Iterator[Figure]:
    memory = GuestMemory.create([RegionSpec(GuestAddress(0), scale.size)], "collect")
    memory.regions[0].pages[:, 0] = 1
    try:
        for name, make in (("scan", _scan), ("log", _log), ("compare", _compare)):
            try:
                prove.prove(name)
            except TrackerError as error:
                yield Figure("collect", name, "ms/GiB", (), note=error.reason)
                continue
            tracker, touch, raw = make(memory)
            yield from _measure(
                memory, name, tracker, touch, raw, scale.runs(3 if name == "compare" else RUNS)
            )
            tracker.close()
    finally:
        memory.close()


def _measure(
    memory: GuestMemory, name: str, tracker: Tracker, touch: Touch, raw: Raw, runs: int
) -> Iterator[Figure]:
    random = np.random.default_rng(1)
    for share in SHARES:
        count = max(1, int(memory.page_count * share))
        mine, limit = [], []
        for _ in range(runs):
            pages = np.sort(random.choice(memory.page_count, count, replace=False))
            touch(pages)
            limit.append(_timed(raw))
            tracker.collect(DirtyBitmap(memory.page_count))
            touch(pages)
            into = DirtyBitmap(memory.page_count)
            mine.append(_timed(lambda into=into: tracker.collect(into)))  # type: ignore[misc]
            if not into.contains_pages(pages).all() or (name != "compare" and into.count() != count):
                raise AssertionError(f"{name} saw {into.count()} pages of {count}")
        per_gib = 1e3 * GIB / memory.size
        yield Figure(
            "collect",
            f"{name}, {share * 100:g} % dirty",
            "ms/GiB",
            [seconds * per_gib for seconds in mine],
            [seconds * per_gib for seconds in limit],
        )


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _store(memory: GuestMemory) -> Touch:
    def touch(pages: NDArray[np.int64]) -> None:
        memory.regions[0].pages[pages, 0] += np.uint64(1)

    return touch


def _scan(memory: GuestMemory) -> tuple[Tracker, Touch, Raw]:
    tracker = ScanTracker()
    tracker.attach(memory)
    tracker.start()

    def raw() -> None:
        region = memory.regions[0]
        position, end = region.address, region.address + region.size
        while position < end:
            argument = bytearray(
                scan._SCAN_ARGUMENT.pack(
                    scan._SCAN_ARGUMENT.size, scan._WP_MATCHING | scan._CHECK_WPASYNC, position, end, 0,
                    tracker._ranges.ctypes.data, scan._RANGES, 0, 0, scan._PAGE_IS_WRITTEN, 0, scan._PAGE_IS_WRITTEN,
                )
            )  # fmt: skip
            fcntl.ioctl(tracker._pagemap, scan._PAGEMAP_SCAN, argument)
            position = scan._SCAN_ARGUMENT.unpack(argument)[scan._WALK_END]

    return tracker, _store(memory), raw


def _log(memory: GuestMemory) -> tuple[Tracker, Touch, Raw]:
    tracker = LogTracker()
    tracker.attach(memory)
    tracker.start()
    one, other = DirtyBitmap(memory.page_count), DirtyBitmap(memory.page_count)

    def touch(pages: NDArray[np.int64]) -> None:
        tracker.mark_runs(PageRuns.from_pages(pages))

    def raw() -> None:
        nonlocal one
        one |= other

    return tracker, touch, raw


def _compare(memory: GuestMemory) -> tuple[Tracker, Touch, Raw]:
    tracker = CompareTracker()
    tracker.attach(memory)
    tracker.start()
    region = memory.regions[0]
    for low in range(0, region.size, BLOCK_SIZE):
        tracker.record(low >> 12, region.view[low : low + BLOCK_SIZE])

    def digest(low: int) -> None:
        for start in range(low, low + region.size // 2, BLOCK_SIZE):
            hashlib.blake2b(region.view[start : start + BLOCK_SIZE], digest_size=16).digest()

    def raw() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(digest, (0, region.size // 2)))

    return tracker, _store(memory), raw
