"""The in-flight region: which requests were taken and not given back, in memory that outlives this process.

The front end keeps it and hands it to the next process that serves the device, so that a back end that is killed loses no
request and answers none twice. Source: docs/interop/vhost-user.rst, "Inflight I/O tracking", the split virtqueue's layout:

    features u64, version u16, entries u16, last_batch_head u16, used_idx u16,
    entries × (inflight u8, padding 5, next u16, counter u64)                      one a queue, each at a multiple of 64 bytes

Every store here is one of a whole number at its own alignment, so a process that is killed leaves the old value or the new one.
Around a request they go in the order of `took`, the used element, its index, `returned`; `recover` is right after each of them.
"""

from __future__ import annotations

import mmap
from typing import Final

from devices.protocols.vhost_user.messages import refused
from migrate.errors import MemoryFault
from migrate.memory.memfd import check_memfd, create_memfd

_HEAD: Final = 16
_ENTRY: Final = 16
_ALIGN: Final = 64
_VERSION: Final = 1
MAX_QUEUES: Final = 64
MAX_ENTRIES: Final = 32768


def queue_bytes(entries: int) -> int:
    """What one queue takes of the region."""
    return -(-(_HEAD + entries * _ENTRY) // _ALIGN) * _ALIGN


class InflightRegion:
    """Mapped from construction to `close`; the descriptor stays whose it was."""

    def __init__(self, fd: int, size: int, offset: int, queues: int, entries: int) -> None:
        """:raise BadRequest: it is no such memory, or too small."""
        if not 0 < queues <= MAX_QUEUES or not 0 < entries <= MAX_ENTRIES:
            raise refused(f"an in-flight region of {queues} queues of {entries} entries")
        if offset % mmap.ALLOCATIONGRANULARITY or not queues * queue_bytes(entries) <= size <= 1 << 30:
            raise refused(f"an in-flight region of {size} bytes at {offset} for {queues} queues of {entries}")
        try:
            check_memfd(fd, needed=offset + size)
        except MemoryFault as error:
            raise refused(f"the in-flight region: {error.reason}") from error
        self._map = mmap.mmap(fd, size, offset=offset)
        self._view = memoryview(self._map)
        step = queue_bytes(entries)
        self.queues = [
            QueueInflight(self._view[at * step : (at + 1) * step], entries) for at in range(queues)
        ]

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.queues = []
        self._view.release()
        self._map.close()


class QueueInflight:
    """One queue's part: a devices.virtio.ring.Journal."""

    def __init__(self, view: memoryview, entries: int) -> None:
        self.entries = entries
        self._bytes, self._halves, self._words = view, view.cast("H"), view.cast("Q")
        self._counter = 0

    def close(self) -> None:
        for view in (self._halves, self._words, self._bytes):
            view.release()

    def recover(self, used: int) -> list[int]:
        """At the start of a ring: the requests to be carried out again, in the order in which they were taken.

        :param used: the index in the used ring, which is what the driver knows.
        """
        halves = self._halves
        if halves[4] != _VERSION:
            self._words[0] = 0
            halves[5], halves[7] = self.entries, used
            halves[4] = _VERSION
            return []
        if halves[7] != used:
            # Killed after the driver was told, and before that was noted here.
            self._clear(halves[6] % self.entries)
            halves[7] = used
        heads = [head for head in range(self.entries) if self._bytes[_HEAD + head * _ENTRY]]
        counters = {head: self._words[2 + 2 * head + 1] for head in heads}
        self._counter = max(counters.values(), default=0)
        return sorted(heads, key=counters.__getitem__)

    def took(self, head: int) -> None:
        """Before anything is done for it."""
        if head < self.entries:
            self._counter += 1
            self._words[2 + 2 * head + 1] = self._counter
            self._bytes[_HEAD + head * _ENTRY] = 1

    def untook(self, head: int) -> None:
        """It is available again."""
        if head < self.entries:
            self._clear(head)

    def returning(self, head: int) -> None:
        """Before its element is put into the used ring."""
        self._halves[6] = head

    def returned(self, head: int, used: int) -> None:
        """The used ring's index says that it is back."""
        if head < self.entries:
            self._clear(head)
        self._halves[7] = used

    def _clear(self, head: int) -> None:
        self._bytes[_HEAD + head * _ENTRY] = 0


def make(queues: int, entries: int) -> tuple[int, int]:
    """A descriptor and the bytes of a fresh region. :raise BadRequest: no device has that many."""
    if not 0 < queues <= MAX_QUEUES or not 0 < entries <= MAX_ENTRIES:
        raise refused(f"an in-flight region for {queues} queues of {entries} entries")
    page = mmap.PAGESIZE
    size = -(-queues * queue_bytes(entries) // page) * page
    return create_memfd("vhost-inflight", size), size
