"""Guest memory as a front end gives it: regions, each mapped from a descriptor of its own, and named in two ways.

Requests name guest addresses; rings are named by where the *front end* has them mapped. What is written is marked in the dirty log,
while there is one, after it was stored.
"""

from __future__ import annotations

from collections.abc import Sequence

from devices.protocols.vhost_user.log import DirtyLog
from devices.protocols.vhost_user.messages import RegionEntry, refused
from devices.virtio.ring import Buffer
from migrate.errors import MemoryFault, Phase
from migrate.memory.addresses import GuestAddress, RegionOffset
from migrate.memory.mapping import Region

MAX_SLOTS = 64


class MemoryTable:
    """devices.virtio.ring.Memory over the regions of a front end. Its methods are called with the device's lock held."""

    def __init__(self) -> None:
        self._slots: list[tuple[RegionEntry, Region]] = []
        self.log: DirtyLog | None = None
        #: Writes are logged: the front end has set LOG_ALL and given a log.
        self.logging = False

    # -- the table ------------------------------------------------------------------------------------------------------------

    def replace(self, entries: Sequence[RegionEntry], fds: Sequence[int]) -> None:
        """The whole table anew; descriptors stay the caller's. :raise BadRequest: nothing was changed then."""
        made: list[tuple[RegionEntry, Region]] = []
        try:
            for entry, fd in zip(entries, fds, strict=True):
                made.append(_slot(entry, fd, made))
        except BaseException:
            for _, region in made:
                region.close()
            raise
        self.clear()
        self._slots = made

    def add(self, entry: RegionEntry, fd: int) -> None:
        """:raise BadRequest: it cannot be, or there are too many."""
        if len(self._slots) >= MAX_SLOTS:
            raise refused(f"more than {MAX_SLOTS} regions of memory")
        self._slots.append(_slot(entry, fd, self._slots))

    def remove(self, entry: RegionEntry) -> None:
        """:raise BadRequest: there is none like it."""
        for slot in self._slots:
            if (slot[0].gpa, slot[0].size, slot[0].user) == (entry.gpa, entry.size, entry.user):
                self._slots.remove(slot)
                slot[1].close()
                return
        raise refused(f"no region of {entry.size} bytes at {entry.gpa:#x} to take away")

    def clear(self) -> None:
        for _, region in self._slots:
            region.close()
        self._slots = []

    def guest_address(self, user: int) -> int:
        """:raise BadRequest: the front end has no guest memory there."""
        for entry, _ in self._slots:
            if entry.user <= user < entry.user + entry.size:
                return entry.gpa + user - entry.user
        raise refused(f"a ring lies at {user:#x}, where the front end has no guest memory")

    def set_log(self, log: DirtyLog | None) -> None:
        """From now on; the one before is let go of."""
        before, self.log = self.log, log
        if before is not None:
            before.close()

    # -- what a device does with it ---------------------------------------------------------------------------------------------

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size, write=False))

    def write(self, gpa: int, data: Buffer) -> None:
        self.view(gpa, len(data), write=True)[:] = data
        self.wrote(gpa, len(data))

    def view(self, gpa: int, size: int, *, write: bool) -> memoryview:
        for entry, region in self._slots:
            if entry.gpa <= gpa and gpa + size <= entry.gpa + entry.size:
                return region.view[gpa - entry.gpa : gpa - entry.gpa + size]
        raise MemoryFault(
            f"{size} bytes at guest address {gpa:#x} are not in the memory that the VMM has given",
            remedy="the guest gave the device a wrong address",
            phase=Phase.RUNNING,
        )

    def wrote(self, gpa: int, size: int) -> None:
        if self.logging and self.log is not None:
            self.log.mark(gpa, size)


def _slot(
    entry: RegionEntry, fd: int, others: Sequence[tuple[RegionEntry, Region]]
) -> tuple[RegionEntry, Region]:
    for other, _ in others:
        if entry.gpa < other.gpa + other.size and other.gpa < entry.gpa + entry.size:
            raise refused(f"the regions of memory at {entry.gpa:#x} and {other.gpa:#x} overlap")
    try:
        return entry, Region(GuestAddress(entry.gpa), entry.size, fd, RegionOffset(entry.offset))
    except MemoryFault as error:
        raise refused(error.reason) from error
