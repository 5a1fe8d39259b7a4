"""A driver pushes requests at random while the disk is stopped, moved, snapshotted, resumed, reset at any step of any of them:
every answered write is there, every request is answered once, and every page that the device wrote was marked dirty.

No threads and no clock: the steps of the queues' threads are rules like all others, so every run of a history is the same.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from virtio_driver import (
    DISCARD,
    EVENT_IDX,
    FLUSH,
    IN,
    INDIRECT_DESC,
    OK,
    OUT,
    SECTOR,
    WRITE_ZEROES,
    Answer,
    DiskQueue,
    Guest,
    struct,
)
from virtio_rig import ACCEPTED, Disk, access, complete, make_image, make_memory, take

from migrate.memory.bitmap import DirtyBitmap
from migrate.memory.log import LogTracker
from migrate.memory.region import GuestMemory

SECTORS, RING, QUEUES = 24, 4, 2
WRITES = (OUT, DISCARD, WRITE_ZEROES)


class History(RuleBasedStateMachine):
    @initialize(
        event_idx=st.booleans(),
        indirect=st.booleans(),
        start=st.sampled_from([0, 0xFFFE]),
        seed=st.integers(0, 255),
    )
    def begin(self, event_idx: bool, indirect: bool, start: int, seed: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
        self.image = make_image(self.directory, SECTORS)
        self.seed = seed
        self.features = ACCEPTED & ~(0 if event_idx else EVENT_IDX) & ~(0 if indirect else INDIRECT_DESC)
        self.indirect = indirect
        #: What the disk must hold: what was answered.
        self.content = bytearray(SECTOR * SECTORS)
        self.memory = make_memory()
        self.guest = Guest(self.memory)
        self.disk = self.make(self.memory)
        self.resting = False
        self.disk.start()
        self.disk.run()
        self.queues: list[DiskQueue] = self.disk.set_up(self.guest, self.features, RING, start)
        self.guest.touched.clear()
        #: The destination's memory: only what was tracked gets there.
        self.copy = make_memory()
        self.copy.regions[0].view[:] = self.memory.regions[0].view

    def make(self, memory: GuestMemory) -> Disk:
        disk = Disk(self.image, memory)
        disk.device.memory.tracker = tracker = LogTracker()
        tracker.attach(disk.device.memory.attached)
        tracker.start()
        return disk

    # -- the driver -------------------------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> set[int]:
        """Sectors of requests that are not answered: a driver orders overlapping ones itself."""
        return {
            sector
            for queue in self.queues
            for asked in queue.asked.values()
            for first, count in touched(asked.kind, asked.sector, asked.data, asked.length)
            for sector in range(first, first + count)
        }

    @rule(
        number=st.integers(0, QUEUES - 1),
        kind=st.sampled_from([IN, OUT, OUT, OUT, FLUSH, DISCARD, WRITE_ZEROES]),
        sector=st.integers(0, SECTORS - 1),
        count=st.integers(1, 4),
        cut=st.integers(0, 2000),
        by_table=st.booleans(),
        tell=st.booleans(),
    )
    def submit(
        self, number: int, kind: int, sector: int, count: int, cut: int, by_table: bool, tell: bool
    ) -> None:
        queue = self.queues[number]
        by_table = by_table and self.indirect
        count = min(count, SECTORS - sector)
        if len(queue.ring.free) < (1 if by_table else 4) or self.in_use & set(range(sector, sector + count)):
            return
        self.seed = self.seed * 5 + 1 & 0xFF
        data, length = b"", 0
        if kind == OUT:
            data = b"".join(bytes((self.seed + n & 0xFF, sector + n)) * 256 for n in range(count))
        elif kind == IN:
            length = SECTOR * count
        elif kind != FLUSH:
            data = struct.pack("<QII", sector, count, 0)
        _, wanted = queue.ask(
            kind, sector if kind in (IN, OUT) else 0, data, length, cut=cut, indirect=by_table
        )
        if wanted or tell:
            self.notify(number)

    def notify(self, number: int) -> None:
        """By the register, but without the lines that a driver would only read."""
        if not self.resting:
            with self.disk.device.lock:
                self.disk.device.write(0, self.disk.pci.areas[2][0] + 4 * number, 2, number)

    @rule(number=st.integers(0, QUEUES - 1))
    def hear(self, number: int) -> None:
        for answer in self.queues[number].answers():
            self.judge(answer)

    def judge(self, answer: Answer) -> None:
        asked = answer.asked
        assert answer.status == OK
        assert answer.written == asked.length + 1
        for first, count in touched(asked.kind, asked.sector, asked.data, asked.length):
            span = slice(SECTOR * first, SECTOR * (first + count))
            if asked.kind == IN:
                assert answer.data == self.content[span]
            else:
                self.content[span] = asked.data if asked.kind == OUT else bytes(SECTOR * count)

    # -- the queues' threads ------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.resting)
    @rule(number=st.integers(0, QUEUES - 1))
    def take(self, number: int) -> None:
        take(self.disk.device.runners[number])

    @rule(number=st.integers(0, QUEUES - 1))
    def carry_out(self, number: int) -> None:
        runner = self.disk.device.runners[number]
        if runner._running is not None:
            runner.run()

    @rule(number=st.integers(0, QUEUES - 1))
    def finish(self, number: int) -> None:
        complete(self.disk.device.runners[number])

    # -- rest, and what can follow ----------------------------------------------------------------------------------------

    @precondition(lambda self: not self.resting)
    @rule()
    def rest(self) -> None:
        # As the threads would, while the stop waits for them.
        for number in range(QUEUES):
            self.carry_out(number)
        self.disk.rest()
        self.resting = True
        self.guest.since_rest = set()
        self.at_rest = (self.disk.save(), self.memory.regions[0].pages.copy(), self.image.read_bytes())

    @precondition(lambda self: self.resting)
    @rule()
    def resume(self) -> None:
        self.disk.start()
        self.disk.run()
        self.resting = False

    @precondition(lambda self: self.resting)
    @rule()
    def move(self) -> None:
        """To another process, whose memory has only what was tracked."""
        self.synchronise()
        assert self.copy.equal_to(self.memory)
        state = self.disk.save()
        self.disk.device.release_locks()
        old, self.memory, self.copy = self.memory, self.copy, self.memory
        self.replace(self.memory, state)
        self.disk.start()
        self.disk.run()
        self.resting = False
        assert old is self.copy

    @precondition(lambda self: not self.resting)
    @rule()
    def lose_the_process_and_go_on_from_a_snapshot(self) -> None:
        """What was carried out and not answered is carried out again."""
        state = self.disk.save()
        self.synchronise()
        self.replace(self.memory, state)
        self.disk.start()
        self.disk.run()

    @rule()
    def synchronise(self) -> None:
        """A round of pre-copy: what the driver and the device wrote goes over."""
        dirty = DirtyBitmap(self.memory.page_count)
        tracker = self.disk.device.memory.tracker
        assert tracker is not None
        tracker.collect(dirty)
        for page in self.guest.touched:
            dirty.set_range(page, 1)
        self.guest.touched.clear()
        pages = dirty.pages_array()
        self.copy.regions[0].pages[pages] = self.memory.regions[0].pages[pages]

    def replace(self, memory: GuestMemory, state: bytes) -> None:
        self.disk.lose()
        self.disk = self.make(memory)
        self.disk.load(state)
        assert self.disk.save() == state
        for queue in self.queues:
            queue.ring.guest.memory = memory

    @invariant()
    def at_rest_nothing_changes_by_itself(self) -> None:
        if getattr(self, "resting", False):
            state, pages, image = self.at_rest
            changed = np.flatnonzero((self.memory.regions[0].pages != pages).any(axis=1))
            # The driver of a machine at rest does nothing; that of these rules goes on.
            assert set(changed.tolist()) <= self.guest.since_rest
            assert self.disk.save() == state
            assert self.image.read_bytes() == image

    # -- the end ----------------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "disk"):
            return
        if self.resting:
            self.resume()
        for number in range(QUEUES):
            self.carry_out(number)
            self.finish(number)
            while self.disk.step(number):
                pass
            self.hear(number)
            assert not self.queues[number].asked
        assert self.image.read_bytes() == self.content
        self.disk.close()
        self.memory.close()
        self.copy.close()
        shutil.rmtree(self.directory)


def touched(kind: int, sector: int, data: bytes, length: int) -> list[tuple[int, int]]:
    """First sector and number of sectors that a request reads or changes."""
    if kind in (DISCARD, WRITE_ZEROES):
        first, count, _ = struct.unpack("<QII", data)
        return [(first, count)]
    return [(sector, len(data) // SECTOR if kind == OUT else length // SECTOR)]


History.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestHistories = History.TestCase


def test_the_tracker_of_these_histories_can_miss_a_write() -> None:
    """The control: a page that was stored to and not marked is not in the copy."""
    memory = make_memory()
    found = access(memory)
    found.tracker = LogTracker()
    found.tracker.attach(found.attached)
    found.tracker.start()
    found.view(0x5000, 1, write=True)[0] = 1
    found.view(0x6000, 1, write=True)[0] = 1
    found.wrote(0x6000, 1)
    dirty = DirtyBitmap(memory.page_count)
    found.tracker.collect(dirty)
    assert dirty.pages_array().tolist() == [6]
    found.tracker.close()
    found.attached.close()
    memory.close()
