"""The split virtqueue: requests that a driver made available, and those given back to it. Virtio 1.2 §2.7.

Knows guest memory through the protocol `Memory` and nothing else: no transport, no threads, no interrupts. Nothing that a
driver writes is trusted: an index outside of the ring, a chain that loops, a table outside of memory are a DriverFault,
after which the device needs a reset. What a *request* says is judged by who carries it out.

    descriptor   address u64, length u32, flags u16, next u16
    available    flags u16, index u16, heads u16 × size, used_event u16         the driver's
    used         flags u16, index u16, (head u32, length u32) × size, avail_event u16   ours
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any, Final, NamedTuple, Protocol

from migrate.errors import DeviceError, MemoryFault, Phase

Buffer = bytes | bytearray | memoryview
#: Descriptor by index, from a table of its own.
_Reader = Callable[[int], tuple[int, ...]]

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_USED: Final = struct.Struct("<II")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4

#: Descriptors of one chain, those of an indirect table counted: what preadv(2) takes at a time (IOV_MAX).
MAX_CHAIN: Final = 1024
#: Bytes of one chain (§2.7.4).
_MAX_BYTES: Final = 1 << 32
_AVAIL_NO_INTERRUPT: Final = 1
_USED_NO_NOTIFY: Final = 1


class Memory(Protocol):
    """Guest memory as the rings need it. All raise MemoryFault for what is not there, and then did nothing."""

    def read(self, gpa: int, size: int) -> bytes: ...
    def write(self, gpa: int, data: Buffer) -> None:
        """Stored, then marked dirty, when it returns."""

    def view(self, gpa: int, size: int, *, write: bool) -> memoryview:
        """The bytes themselves; what is stored there is marked by `wrote`, before the driver is told of it."""

    def wrote(self, gpa: int, size: int) -> None: ...


class DriverFault(DeviceError):
    """The driver broke the rules of the ring: it must reset the device. Never leaves the device's process."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the guest's driver broke the rules of virtio: {reason}",
            remedy="the guest's driver must reset the device; look at the guest",
            phase=Phase.RUNNING,
        )


class Segment(NamedTuple):
    """Part of a buffer in guest memory."""

    address: int
    length: int


class Chain(NamedTuple):
    """One request: what the device may read, then what it may write. `head` is its name."""

    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]


class Journal(Protocol):
    """Where it is noted what is in flight, for who serves the ring after a process that was killed."""

    def took(self, head: int) -> None:
        """Before anything is done for it."""

    def untook(self, head: int) -> None:
        """Nothing was done for it; it is available again."""

    def returning(self, head: int) -> None:
        """Before its element is in the used ring."""

    def returned(self, head: int, used: int) -> None:
        """The used index says that it is back."""


class SplitQueue:
    """One virtqueue. All methods are called with the device's lock held; what is not said otherwise raises DriverFault."""

    def __init__(self, memory: Memory, max_size: int) -> None:
        """:param max_size: the most entries that a driver may choose, a power of two up to 32768."""
        self._memory = memory
        self.max_size = max_size
        self.event_idx = False
        self.indirect = False
        self.journal: Journal | None = None
        self.reset()

    def reset(self) -> None:
        self.size = self.max_size
        self.enabled = False
        #: Guest addresses of the descriptor table, the available ring and the used ring.
        self.descriptors = self.available = self.used = 0
        #: How many heads were taken, and given back, modulo 2^16.
        self.taken = 0
        self.returned = 0
        #: Heads taken and not given back, in the order in which they came.
        self.in_flight: dict[int, None] = {}
        #: The used index when the driver was last considered for an interrupt. None: nobody knows, so it gets one.
        self._signalled: int | None = None
        #: Whether the driver was told not to notify. None: what it was told is not known.
        self._deaf: bool | None = None

    def begin_at(self, index: int) -> None:
        """A ring that another, or an earlier one of ours, served up to there. What its driver was told is not known."""
        self.taken = self.returned = index
        self.in_flight.clear()
        self._signalled = self._deaf = None

    def used_index(self) -> int:
        """What the driver was told is back. :raise DriverFault: the ring is not in memory."""
        return self._load(self.used + 2)

    def resume(self, used: int, heads: Sequence[int]) -> None:
        """As it was left by a process that was killed: these heads were taken, and are carried out again."""
        self.begin_at(used)
        self.in_flight = dict.fromkeys(heads)
        self.taken = (used + len(heads)) & 0xFFFF

    def configure(self, *, event_idx: bool, indirect: bool) -> None:
        """What was negotiated."""
        self.event_idx, self.indirect = event_idx, indirect

    def reachable(self) -> bool:
        """Whether its rings are guest memory now. Raises nothing."""
        try:
            self._memory.view(self.descriptors, _DESCRIPTOR.size * self.size, write=False)
            self._memory.view(self.available, 6 + 2 * self.size, write=False)
            self._memory.view(self.used, 6 + _USED.size * self.size, write=True)
        except MemoryFault:
            return False
        return True

    # -- requests in ------------------------------------------------------------------------------------------------------

    def take(self) -> Chain | None:
        """The next request, or None. It is in flight from here on."""
        index = self._load(self.available + 2)
        waiting = (index - self.taken) & 0xFFFF
        if not waiting:
            return None
        if waiting > self.size:
            raise DriverFault(
                f"the available index went from {self.taken} to {index} in a ring of {self.size}"
            )
        head = self._load(self.available + 4 + 2 * (self.taken % self.size))
        if head in self.in_flight:
            raise DriverFault(f"descriptor {head} was made available twice")
        chain = self.chain(head)
        if self.journal is not None:
            self.journal.took(head)
        self.in_flight[head] = None
        self.taken = (self.taken + 1) & 0xFFFF
        return chain

    def chain(self, head: int) -> Chain:
        """The request that begins with this descriptor; also to take one up again that is in flight."""
        readable: list[Segment] = []
        writable: list[Segment] = []
        reader: _Reader = self._direct
        count, index, direct = self.size, head, True
        left, total = count, 0
        while True:
            if index >= count:
                raise DriverFault(f"descriptor {index} does not exist, the table has {count}")
            if not left:
                raise DriverFault(
                    f"the chain of descriptor {head} has more than {count} descriptors: it loops"
                )
            left -= 1
            address, length, flags, following = reader(index)
            if flags & _INDIRECT:
                if not direct or not self.indirect or flags & _NEXT:
                    raise DriverFault(f"descriptor {index} is indirect where it may not be")
                reader, count = self._table(address, length)
                left, index, direct = count, 0, False
                continue
            total += length
            if total > _MAX_BYTES:
                raise DriverFault(f"the chain of descriptor {head} has more than {_MAX_BYTES} bytes")
            if flags & _WRITE:
                writable.append(Segment(address, length))
            elif writable:
                raise DriverFault(f"descriptor {index} is readable after one that is writable")
            else:
                readable.append(Segment(address, length))
            if not flags & _NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            index = following

    def _direct(self, index: int) -> tuple[int, ...]:
        address = self.descriptors + _DESCRIPTOR.size * index
        return _DESCRIPTOR.unpack(self._read(address, _DESCRIPTOR.size))

    def _table(self, address: int, length: int) -> tuple[_Reader, int]:
        count, rest = divmod(length, _DESCRIPTOR.size)
        if rest or not 0 < count <= MAX_CHAIN:
            raise DriverFault(f"an indirect table of {length} bytes; 16 to {16 * MAX_CHAIN} are possible")
        table = self._read(address, length)  # once: the driver may not change it under us
        return (lambda index: _DESCRIPTOR.unpack_from(table, _DESCRIPTOR.size * index)), count

    def put_back(self, head: int) -> None:
        """The request that was taken last is not taken after all."""
        del self.in_flight[head]
        if self.journal is not None:
            self.journal.untook(head)
        self.taken = (self.taken - 1) & 0xFFFF

    # -- and back -----------------------------------------------------------------------------------------------------------

    def give_back(self, head: int, written: int) -> None:
        """Complete a request: data and status are in memory and marked by now. `written`: bytes of its buffers."""
        entry = self.used + 4 + _USED.size * (self.returned % self.size)
        if self.journal is not None:
            self.journal.returning(head)
        try:
            self._memory.write(entry, _USED.pack(head, written))
        except MemoryFault as error:
            raise DriverFault(error.reason) from error
        self._store(self.used + 2, (self.returned + 1) & 0xFFFF)
        self.returned = (self.returned + 1) & 0xFFFF
        if self.journal is not None:
            self.journal.returned(head, self.returned)
        del self.in_flight[head]

    def wants_interrupt(self) -> bool:
        """Whether the driver wants to be told of what was given back since the last call."""
        before, self._signalled = self._signalled, self.returned
        if before == self.returned:
            return False
        _fence()
        if not self.event_idx:
            return not self._load(self.available) & _AVAIL_NO_INTERRUPT
        event = self._load(self.available + 4 + 2 * self.size)
        # §2.7.7.2. Where nobody knows what it was told, one interrupt too many does no harm.
        return before is None or (self.returned - event - 1) & 0xFFFF < (self.returned - before) & 0xFFFF

    # -- whether the driver has to notify us --------------------------------------------------------------------------------

    def listen(self) -> bool:
        """From now on the driver notifies. True: something came before it could know that, so look again."""
        if self.event_idx:
            self._store(self.used + 4 + _USED.size * self.size, self.taken)
        elif self._deaf is not False:
            self._store(self.used, 0)
        self._deaf = False
        _fence()
        return self._load(self.available + 2) != self.taken

    def be_deaf(self) -> None:
        """While we look by ourselves, the driver need not notify. With event_idx it knows by the index it was told."""
        if not self.event_idx and not self._deaf:
            self._store(self.used, _USED_NO_NOTIFY)
        self._deaf = True

    # -- memory ---------------------------------------------------------------------------------------------------------------

    def _read(self, gpa: int, size: int) -> bytes:
        try:
            return self._memory.read(gpa, size)
        except MemoryFault as error:
            raise DriverFault(error.reason) from error

    def _load(self, gpa: int) -> int:
        # cast and not a slice: an index is read and written in one access, on every processor.
        try:
            return self._memory.view(gpa, 2, write=False).cast("H")[0]
        except MemoryFault as error:
            raise DriverFault(error.reason) from error

    def _store(self, gpa: int, value: int) -> None:
        try:
            self._memory.view(gpa, 2, write=True).cast("H")[0] = value
            self._memory.wrote(gpa, 2)
        except MemoryFault as error:
            raise DriverFault(error.reason) from error

    # -- state ----------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {
            "size": self.size,
            "enabled": self.enabled,
            "descriptors": self.descriptors,
            "available": self.available,
            "used": self.used,
            "taken": self.taken,
            "returned": self.returned,
            "in_flight": list(self.in_flight),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.reset()
        self.size, self.enabled = state["size"], state["enabled"]
        self.descriptors, self.available, self.used = state["descriptors"], state["available"], state["used"]
        self.taken, self.returned = state["taken"], state["returned"]
        self.in_flight = dict.fromkeys(state["in_flight"])


def wrong(state: Mapping[str, Any], max_size: int) -> str | None:
    """Why a saved queue cannot be one, beyond what the schema says; None if it can."""
    size, heads = state["size"], state["in_flight"]
    if size > max_size or size.bit_count() != 1:
        return f"a queue of {size} entries; this device has up to {max_size}, by powers of two"
    if len(set(heads)) != len(heads) or any(head >= size for head in heads):
        return "requests in flight that are named twice or do not exist"
    if (state["taken"] - state["returned"]) & 0xFFFF != len(heads):
        return f"{len(heads)} requests in flight where its counters say {(state['taken'] - state['returned']) & 0xFFFF}"
    return None


_barrier: Final = Lock()


def _fence() -> None:
    """What was stored before is visible before anything is loaded after: the one order that x86 does not keep by itself.

    Python has no fence; taking a lock is one (a locked exchange on x86, acquire and release around it elsewhere).
    """
    with _barrier:
        pass
