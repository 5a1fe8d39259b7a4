"""A driver's side of virtio, for tests: rings in guest memory, requests to a disk, virtio-pci's registers.

Written from the specification and not from devices/virtio. It can also say what no driver should.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from migrate.memory.addresses import GuestAddress
from migrate.memory.region import GuestMemory

SECTOR = 512
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP, UNTOUCHED = 0, 1, 2, 0xAA
NEXT, WRITE, INDIRECT = 1, 2, 4
EVENT_IDX, INDIRECT_DESC, VERSION_1 = 1 << 29, 1 << 28, 1 << 32


class Guest:
    """Guest memory as a driver writes it, and the pages that it wrote: `touched` and `since_rest`, for who empties them."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.touched: set[int] = set()
        self.since_rest: set[int] = set()

    def write(self, gpa: int, data: bytes) -> None:
        self.memory.find(GuestAddress(gpa), len(data))[:] = data
        if data:
            pages = range(gpa >> 12, (gpa + len(data) - 1 >> 12) + 1)
            self.touched.update(pages)
            self.since_rest.update(pages)

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.memory.find(GuestAddress(gpa), size))

    def write16(self, gpa: int, value: int) -> None:
        self.write(gpa, struct.pack("<H", value))

    def read16(self, gpa: int) -> int:
        return struct.unpack("<H", self.read(gpa, 2))[0]


Piece = tuple[int, int, bool]  # address, length, whether the device may write it


class Ring:
    """The driver's half of a split virtqueue of `size` entries, at `base`."""

    def __init__(
        self, guest: Guest, base: int, size: int, *, event_idx: bool = False, start: int = 0
    ) -> None:
        self.guest = guest
        self.size = size
        self.event_idx = event_idx
        self.descriptors = base
        self.available = base + 16 * size
        self.used = (self.available + 6 + 2 * size + 3) & ~3
        self.end = self.used + 6 + 8 * size
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self.offered = self.seen = start  # indexes as far as this side has come
        guest.write(self.available, bytes(6 + 2 * size))
        guest.write(self.used, bytes(6 + 8 * size))
        guest.write16(self.available + 2, start)
        guest.write16(self.used + 2, start)

    def describe(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.guest.write(
            self.descriptors + 16 * index, struct.pack("<QIHH", address, length, flags, following)
        )

    def chain(self, pieces: Sequence[Piece], table: int = 0) -> int:
        """Describe a buffer, through an indirect table at `table` if there is one. Its head."""
        count = 1 if table else len(pieces)
        taken = [self.free.pop(0) for _ in range(count)]
        entries = [
            (address, length, (WRITE if writable else 0) | (NEXT if number + 1 < len(pieces) else 0))
            for number, (address, length, writable) in enumerate(pieces)
        ]
        if table:
            packed = (struct.pack("<QIHH", *entry, number + 1) for number, entry in enumerate(entries))
            self.guest.write(table, b"".join(packed))
            self.describe(taken[0], table, 16 * len(pieces), INDIRECT)
        else:
            for index, entry, following in zip(taken, entries, [*taken[1:], 0], strict=True):
                self.describe(index, *entry, following)
        self.chains[taken[0]] = taken
        return taken[0]

    def offer(self, head: int) -> bool:
        """Make it available. Whether the device wants to be notified of it."""
        self.guest.write16(self.available + 4 + 2 * (self.offered % self.size), head)
        before, self.offered = self.offered, (self.offered + 1) & 0xFFFF
        self.guest.write16(self.available + 2, self.offered)
        if self.event_idx:
            event = self.guest.read16(self.used + 4 + 8 * self.size)
            return (self.offered - event - 1) & 0xFFFF < (self.offered - before) & 0xFFFF
        return not self.guest.read16(self.used) & 1

    def returned(self) -> list[tuple[int, int]]:
        """(head, bytes written) of what came back, and an interrupt is wanted for the next one."""
        found = []
        while self.seen != self.guest.read16(self.used + 2):
            entry = self.guest.read(self.used + 4 + 8 * (self.seen % self.size), 8)
            head, written = struct.unpack("<II", entry)
            self.free += self.chains.pop(head)  # KeyError: the device answered what was not asked, or twice
            self.seen = (self.seen + 1) & 0xFFFF
            found.append((head, written))
        if self.event_idx:
            self.guest.write16(self.available + 4 + 2 * self.size, self.seen)
        return found


@dataclass
class Asked:
    """A request and where its parts lie."""

    kind: int
    sector: int
    length: int  # of the data that the device writes
    data: bytes  # that it reads
    pieces: list[Piece]
    status_at: int
    data_at: int


@dataclass
class Answer:
    asked: Asked
    status: int
    written: int
    data: bytes


@dataclass
class DiskQueue:
    """Requests to a disk over one ring: one slot of guest memory for each head."""

    ring: Ring
    slots: int  # guest address of the first slot
    slot: int = 0x4000  # bytes of each
    asked: dict[int, Asked] = field(default_factory=dict)

    def ask(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        length: int = 0,
        *,
        cut: int = 0,
        indirect: bool = False,
    ) -> tuple[int, bool]:
        """Submit a request; its head, and whether the device wants a notification.

        :param cut: where both streams of bytes are cut once more than a simple driver would. 0: nowhere.
        """
        head = self.ring.free[0]
        at = self.slots + head * self.slot
        guest = self.ring.guest
        header = struct.pack("<IIQ", kind, 0, sector)
        guest.write(at, header + data)
        # The status on a page of its own: that it was written says nothing of the data's page.
        reply = at + 0x3000 - length
        guest.write(reply, b"\x55" * length + bytes((UNTOUCHED,)))
        if cut:
            pieces = cut_at(at, len(header + data), cut, False) + cut_at(reply, length + 1, cut, True)
        else:
            pieces = [(at, len(header), False)]
            pieces += [(at + len(header), len(data), False)] if data else []
            pieces += [(reply, length, True)] if length else []
            pieces += [(reply + length, 1, True)]
        table = at + 0x3800 if indirect else 0
        assert self.ring.chain(pieces, table) == head
        self.asked[head] = Asked(kind, sector, length, data, pieces, reply + length, reply)
        return head, self.ring.offer(head)

    def answers(self) -> list[Answer]:
        guest, found = self.ring.guest, []
        for head, written in self.ring.returned():
            asked = self.asked.pop(head)
            status = guest.read(asked.status_at, 1)[0]
            found.append(Answer(asked, status, written, guest.read(asked.data_at, asked.length)))
        return found


def cut_at(address: int, length: int, cut: int, writable: bool) -> list[Piece]:
    cut %= length
    pieces = [(address, cut, writable), (address + cut, length - cut, writable)]
    return [piece for piece in pieces if piece[1]]


# -- registers ----------------------------------------------------------------------------------------------------------------

Read = Callable[[int, int, int], int]  # region, offset, size
Store = Callable[[int, int, int, int], None]  # region, offset, size, value


class Pci:
    """virtio-pci as a driver finds it: by its capabilities, in region 7, and through BAR 0, in region 0."""

    def __init__(self, read: Read, write: Store) -> None:
        self.read, self.write = read, write
        self.areas: dict[int, tuple[int, int]] = {}  # type → offset and length in BAR 0
        self.msix = 0
        at = read(7, 0x34, 1)
        while at:
            kind = read(7, at, 1)
            if kind == 0x11:
                self.msix = at
            elif kind == 0x09:
                assert read(7, at + 4, 1) == 0  # BAR 0
                self.areas[read(7, at + 3, 1)] = (read(7, at + 8, 4), read(7, at + 12, 4))
                if read(7, at + 3, 1) == 2:
                    self.step = read(7, at + 16, 4)
            at = read(7, at + 1, 1)

    def common(self, offset: int, size: int, value: int | None = None) -> int:
        at = self.areas[1][0] + offset
        if value is None:
            return self.read(0, at, size)
        self.write(0, at, size, value)
        return value

    def status(self, *bits: int) -> int:
        for bit in bits:
            self.common(0x14, 1, self.common(0x14, 1) | bit)
        return self.common(0x14, 1)

    def features(self) -> int:
        found = 0
        for half in (0, 1):
            self.common(0x00, 4, half)
            found |= self.common(0x04, 4) << 32 * half
        return found

    def accept(self, features: int) -> int:
        """Through to FEATURES_OK; the status that came of it."""
        self.common(0x14, 1, 0)
        assert self.common(0x14, 1) == 0
        self.write(7, 0x04, 2, 0x0006)  # memory space, bus master
        self.status(1, 2)
        for half in (0, 1):
            self.common(0x08, 4, half)
            self.common(0x0C, 4, features >> 32 * half & 0xFFFF_FFFF)
        return self.status(8)

    def use_vector(self, vector: int) -> None:
        """MSI-X on, and this vector not masked."""
        control = self.read(7, self.msix + 2, 2)
        self.write(7, self.msix + 2, 2, control | 0x8000)
        self.write(0, self.read(7, self.msix + 4, 4) + 16 * vector + 12, 4, 0)

    def set_up_queue(self, number: int, ring: Ring, vector: int = 0xFFFF) -> None:
        self.common(0x16, 2, number)
        self.common(0x18, 2, ring.size)
        self.common(0x1A, 2, vector)
        for offset, value in ((0x20, ring.descriptors), (0x28, ring.available), (0x30, ring.used)):
            self.common(offset, 4, value & 0xFFFF_FFFF)
            self.common(offset + 4, 4, value >> 32)
        self.common(0x1C, 2, 1)

    def notify(self, number: int) -> None:
        self.common(0x16, 2, number)
        offset = self.common(0x1E, 2) * self.step
        self.write(0, self.areas[2][0] + offset, 2, number)

    def config(self, offset: int, size: int) -> int:
        return self.read(0, self.areas[4][0] + offset, size)
