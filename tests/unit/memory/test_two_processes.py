"""Two processes, each writing the same memfds through a mapping of its own under a tracker of its own.

A real second process, told over pipes what to write. The collector ORs both bitmaps; the oracle is the copy being equal.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from two_regions import LAYOUT, PAGES
from writer import Writer

from migrate.errors import TrackerError
from migrate.memory import DirtyBitmap, GuestMemory, PageRuns, prove

PEER = """
import struct, sys, threading
sys.path[:0] = {path!r}
from two_regions import PAGES
from writer import Writer
from migrate.memory import GuestMemory, prove
memory = GuestMemory()
for gpa, size, fd in {regions!r}:
    memory.attach(gpa, size, fd)
tracker = prove.make({name!r})
tracker.attach(memory)
tracker.start()
writer = Writer(memory, tracker)

enough = threading.Event()

def count_into_odd_pages():
    count = 0
    while not enough.is_set():
        count += 1
        writer.store((2 * count * 5 + 1) % PAGES, count.to_bytes(8, "little"), offset=count % 500 * 8)

thread = threading.Thread(target=count_into_odd_pages)
while order := sys.stdin.buffer.read(8):
    page, value = struct.unpack("ii", order)
    if page == -3:
        enough.set()
        thread.join()
        sys.stdout.buffer.write(b"k")
    elif page == -2:
        thread.start()
        sys.stdout.buffer.write(b"k")
    elif page == -1:
        sys.stdout.buffer.write(writer.dirty().to_bytes())
    else:
        writer.fill(page, value)
        sys.stdout.buffer.write(b"k")
    sys.stdout.buffer.flush()
"""


class Peer:
    """Another process with the same memory."""

    def __init__(self, memory: GuestMemory, name: str) -> None:
        regions = [(region.gpa, region.size, region.fd) for region in memory.regions]
        path = [os.path.dirname(__file__), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PEER.format(path=path, regions=regions, name=name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[region.fd for region in memory.regions],
        )
        self.dirty()  # it has started

    def fill(self, page: int, value: int) -> None:
        assert self._ask(page, value, 1) == b"k"

    def dirty(self) -> DirtyBitmap:
        return DirtyBitmap.from_bytes(self._ask(-1, 0, PAGES // 8), PAGES)

    def start_counting(self) -> None:
        """Write odd pages all the time, beside being collected."""
        assert self._ask(-2, 0, 1) == b"k"

    def stop_counting(self) -> None:
        assert self._ask(-3, 0, 1) == b"k"

    def _ask(self, page: int, value: int, answer: int) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(struct.pack("ii", page, value))
        self._process.stdin.flush()
        return self._process.stdout.read(answer)

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.fixture(params=["scan", "log"])
def pair(request: pytest.FixtureRequest, memory: GuestMemory) -> Iterator[tuple[Writer, Peer]]:
    try:
        prove.prove(request.param)
    except TrackerError as error:
        pytest.skip(str(error))
    tracker = prove.make(request.param)
    tracker.attach(memory)
    tracker.start()
    peer = Peer(memory, request.param)
    yield Writer(memory, tracker), peer
    peer.close()
    tracker.close()


def send(memory: GuestMemory, dirty: DirtyBitmap, copy: GuestMemory) -> None:
    runs = dirty.runs()
    pages = np.empty((runs.pages, 512), dtype=np.uint64)
    memory.gather(runs, pages)
    copy.scatter(runs, pages)


def test_each_process_sees_its_own_writes_only(pair: tuple[Writer, Peer]) -> None:
    ours, theirs = pair
    ours.fill(3, 1)
    theirs.fill(30, 1)
    theirs.fill(31, 1)
    assert ours.memory.regions[1].pages[9].any(), "the memory is shared"
    assert ours.dirty_pages() == [3]
    assert theirs.dirty().runs() == PageRuns([(30, 2)])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.one_of(
            st.just("round"),
            st.tuples(st.sampled_from([0, 1]), st.integers(0, PAGES - 1), st.integers(0, 3)),
        ),
        max_size=60,
    )
)
def test_the_joined_bitmaps_of_both_miss_nothing(pair: tuple[Writer, Peer], steps: list[object]) -> None:
    ours, theirs = pair
    copy = GuestMemory.create(LAYOUT)
    everything = DirtyBitmap.full(PAGES)
    ours.dirty()
    theirs.dirty()
    send(ours.memory, everything, copy)

    def transfer() -> None:
        dirty = ours.dirty()
        dirty |= theirs.dirty()
        send(ours.memory, dirty, copy)

    for step in steps:
        if isinstance(step, tuple):
            who, page, value = step
            (ours, theirs)[who].fill(page, value)
        else:
            transfer()
    transfer()
    assert ours.memory.difference(copy).pages_array().tolist() == []
    copy.close()


def test_nothing_is_lost_while_both_write_and_are_collected(pair: tuple[Writer, Peer]) -> None:
    ours, theirs = pair
    copy = GuestMemory.create(LAYOUT)
    enough = threading.Event()

    def write() -> None:
        count = 0
        while not enough.is_set():
            count += 1
            ours.store(2 * count * 3 % PAGES, count.to_bytes(8, "little"), offset=count % 500 * 8)

    def transfer() -> tuple[bool, bool]:
        mine, other = ours.dirty(), theirs.dirty()
        busy = mine.any(), other.any()
        mine |= other
        send(ours.memory, mine, copy)
        return busy

    thread = threading.Thread(target=write)
    thread.start()
    theirs.start_counting()
    both = 0
    while both < 30:
        both += all(transfer())
    enough.set()
    thread.join()
    theirs.stop_counting()
    transfer()
    assert ours.memory.difference(copy).pages_array().tolist() == []
    copy.close()
