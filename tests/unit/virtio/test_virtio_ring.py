"""The split virtqueue, against a driver written from the specification, and against drivers that break its rules."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import INDIRECT, NEXT, WRITE, Guest, Ring
from virtio_rig import SIZE, access, make_memory

from devices.virtio.ring import MAX_CHAIN, DriverFault, SplitQueue, wrong

BASE, BUFFERS, TABLE = 0x10000, 0x40000, 0x80000


class Pair:
    """A driver's ring and the device's queue on it."""

    def __init__(self, size: int = 4, *, event_idx: bool = False, start: int = 0) -> None:
        self.memory = make_memory()
        self.guest = Guest(self.memory)
        self.ring = Ring(self.guest, BASE, size, event_idx=event_idx, start=start)
        self._access = access(self.memory)
        self.queue = SplitQueue(self._access, 128)
        self.queue.size, self.queue.enabled = size, True
        self.queue.descriptors, self.queue.available = self.ring.descriptors, self.ring.available
        self.queue.used = self.ring.used
        self.queue.taken = self.queue.returned = start
        self.queue.configure(event_idx=event_idx, indirect=True)

    def close(self) -> None:
        self._access.attached.close()
        self.memory.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def test_a_chain_arrives_as_it_was_described_and_comes_back_with_its_length(pair: Pair) -> None:
    head = pair.ring.chain([(BUFFERS, 16, False), (BUFFERS + 99, 512, True), (BUFFERS + 7, 1, True)])
    assert pair.queue.take() is None
    pair.ring.offer(head)
    chain = pair.queue.take()
    assert chain is not None
    assert (chain.head, chain.readable) == (head, ((BUFFERS, 16),))
    assert chain.writable == ((BUFFERS + 99, 512), (BUFFERS + 7, 1))
    assert list(pair.queue.in_flight) == [head]
    assert pair.queue.take() is None
    assert pair.ring.returned() == []
    pair.queue.give_back(head, 513)
    assert pair.ring.returned() == [(head, 513)]
    assert not pair.queue.in_flight


@pytest.mark.parametrize("start", [0, 0xFFFC])
@pytest.mark.parametrize("event_idx", [False, True])
def test_rings_and_their_indexes_go_round(start: int, event_idx: bool) -> None:
    pair = Pair(4, event_idx=event_idx, start=start)
    for turn in range(30):
        heads = [pair.ring.chain([(BUFFERS + turn, 1, False)]) for _ in range(turn % 4 + 1)]
        for head in heads:
            pair.ring.offer(head)
        for head in heads:
            chain = pair.queue.take()
            assert chain is not None
            assert (chain.head, chain.readable[0].address) == (head, BUFFERS + turn)
        # In another order than they came.
        for head in reversed(heads):
            pair.queue.give_back(head, turn)
        assert pair.ring.returned() == [(head, turn) for head in reversed(heads)]
    pair.close()


def test_an_indirect_table_may_be_longer_than_the_ring(pair: Pair) -> None:
    pieces = [(BUFFERS + 8 * n, 8, n >= 500) for n in range(MAX_CHAIN)]
    pair.ring.offer(pair.ring.chain(pieces, TABLE))
    chain = pair.queue.take()
    assert chain is not None
    assert [*chain.readable, *chain.writable] == [piece[:2] for piece in pieces]
    assert len(chain.readable) == 500


def test_an_indirect_table_may_follow_direct_descriptors(pair: Pair) -> None:
    pair.ring.describe(2, BUFFERS, 16, NEXT, 1)
    pair.ring.describe(1, TABLE, 16, INDIRECT)
    pair.guest.write(TABLE, struct.pack("<QIHH", BUFFERS + 16, 4, WRITE, 0))
    pair.ring.offer(2)
    chain = pair.queue.take()
    assert chain is not None
    assert (chain.readable, chain.writable) == (((BUFFERS, 16),), ((BUFFERS + 16, 4),))


# -- what is given back and who is told ---------------------------------------------------------------------------------------


def complete(pair: Pair) -> bool:
    """One request, there and back: whether the driver is interrupted for it."""
    pair.ring.offer(pair.ring.chain([(BUFFERS, 1, True)]))
    chain = pair.queue.take()
    assert chain is not None
    pair.queue.give_back(chain.head, 1)
    return pair.queue.wants_interrupt()


def test_without_event_idx_the_drivers_flag_keeps_interrupts_back(pair: Pair) -> None:
    assert complete(pair)
    assert not pair.queue.wants_interrupt()  # nothing came back since
    pair.guest.write16(pair.ring.available, 1)
    assert not complete(pair)
    pair.guest.write16(pair.ring.available, 0)
    assert complete(pair)


def test_with_event_idx_an_interrupt_comes_when_the_index_is_passed() -> None:
    pair = Pair(event_idx=True)
    complete(pair)
    pair.ring.returned()  # wants the next one
    assert complete(pair)
    assert not complete(pair)  # it was told of this index
    pair.ring.returned()
    used_event = pair.ring.available + 4 + 2 * 4
    pair.guest.write16(used_event, pair.ring.seen + 1)
    assert not complete(pair)
    assert complete(pair)
    pair.close()


def test_after_a_load_the_driver_is_told_once_too_often_and_not_once_too_seldom() -> None:
    pair = Pair(event_idx=True)
    complete(pair)
    pair.guest.write16(pair.ring.available + 4 + 2 * 4, 1000)  # it does not want to know
    pair.ring.seen = 0
    state = pair.queue.save()
    pair.queue.load(state)
    assert complete(pair)
    assert not complete(pair)
    assert pair.queue.save() == state | {"taken": 3, "returned": 3}
    pair.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_driver_notifies_only_while_we_listen(event_idx: bool) -> None:
    pair = Pair(event_idx=event_idx)

    def offer() -> bool:
        return pair.ring.offer(pair.ring.chain([(BUFFERS, 1, True)]))

    assert not pair.queue.listen()
    assert offer()
    pair.queue.be_deaf()
    assert not offer()
    assert pair.queue.listen()  # two came
    assert pair.queue.take()
    assert pair.queue.take()
    assert not pair.queue.listen()
    assert offer()
    pair.close()


# -- drivers that break the rules ---------------------------------------------------------------------------------------------


def outside_of_the_ring(pair: Pair) -> None:
    pair.ring.offer(4)


def next_outside_of_the_ring(pair: Pair) -> None:
    pair.ring.describe(0, BUFFERS, 1, NEXT, 4)
    pair.ring.offer(0)


def loop(pair: Pair) -> None:
    pair.ring.describe(0, BUFFERS, 1, NEXT, 1)
    pair.ring.describe(1, BUFFERS, 1, NEXT, 0)
    pair.ring.offer(0)


def too_far(pair: Pair) -> None:
    pair.guest.write16(pair.ring.available + 2, 5)


def backwards(pair: Pair) -> None:
    pair.guest.write16(pair.ring.available + 2, 0xFFFF)


def twice(pair: Pair) -> None:
    pair.ring.offer(pair.ring.chain([(BUFFERS, 1, True)]))
    assert pair.queue.take()
    pair.ring.offer(0)


def readable_after_writable(pair: Pair) -> None:
    pair.ring.offer(pair.ring.chain([(BUFFERS, 1, True), (BUFFERS, 1, False)]))


def too_many_bytes(pair: Pair) -> None:
    pair.ring.offer(pair.ring.chain([(BUFFERS, 2**32 - 1, True), (BUFFERS, 2, True)]))


def table(content: bytes, length: int | None = None, flags: int = INDIRECT, address: int = TABLE):
    def offer(pair: Pair) -> None:
        pair.guest.write(TABLE, content)
        pair.ring.describe(0, address, len(content) if length is None else length, flags, 1)
        pair.ring.describe(1, BUFFERS, 1)
        pair.ring.offer(0)

    return offer


def entry(flags: int = 0, following: int = 0) -> bytes:
    return struct.pack("<QIHH", BUFFERS, 1, flags, following)


def ring_outside_of_memory(part: str) -> Callable[[Pair], None]:
    def move(pair: Pair) -> None:
        pair.ring.offer(pair.ring.chain([(BUFFERS, 1, True)]))
        setattr(pair.queue, part, SIZE - 1)

    return move


@pytest.mark.parametrize(
    ("break_a_rule", "says"),
    [
        (outside_of_the_ring, "descriptor 4 does not exist"),
        (next_outside_of_the_ring, "descriptor 4 does not exist"),
        (loop, "it loops"),
        (too_far, "went from 0 to 5"),
        (backwards, "went from 0 to 65535"),
        (twice, "made available twice"),
        (readable_after_writable, "readable after"),
        (too_many_bytes, "bytes"),
        (table(entry(), flags=INDIRECT | NEXT), "indirect where it may not be"),
        (table(entry(INDIRECT)), "indirect where it may not be"),
        (table(entry(NEXT, 1)), "descriptor 1 does not exist"),
        (table(entry(NEXT, 0) * 2), "it loops"),
        (table(entry(), length=15), "indirect table of 15"),
        (table(b"", length=0), "indirect table of 0"),
        (table(b"", length=16 * MAX_CHAIN + 16), "indirect table of"),
        (table(b"", length=32, address=SIZE - 16), "not inside one memory region"),
        (table(b"", length=16, address=2**64 - 16), "not inside one memory region"),
        (ring_outside_of_memory("descriptors"), "not inside one memory region"),
        (ring_outside_of_memory("available"), "not inside one memory region"),
    ],
)
def test_a_broken_rule_is_a_drivers_fault_and_takes_nothing(
    pair: Pair, break_a_rule: Callable[[Pair], None], says: str
) -> None:
    break_a_rule(pair)
    before = pair.queue.save()
    with pytest.raises(DriverFault, match=says):
        pair.queue.take()
    assert pair.queue.save() == before


def test_an_indirect_table_that_was_not_negotiated_is_a_fault(pair: Pair) -> None:
    pair.queue.configure(event_idx=False, indirect=False)
    pair.ring.offer(pair.ring.chain([(BUFFERS, 1, True)], TABLE))
    with pytest.raises(DriverFault, match="indirect"):
        pair.queue.take()


def test_a_used_ring_outside_of_memory_is_a_fault_and_nothing_is_given_back(pair: Pair) -> None:
    pair.ring.offer(pair.ring.chain([(BUFFERS, 1, True)]))
    assert pair.queue.take()
    before = pair.queue.save()
    for used in (SIZE - 4, SIZE):
        pair.queue.used = used
        with pytest.raises(DriverFault):
            pair.queue.give_back(0, 1)
        assert pair.queue.save() == before | {"used": used}
    with pytest.raises(DriverFault):
        pair.queue.listen()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_in_the_rings_a_queue_gives_chains_or_a_fault_and_ends(data: st.DataObject) -> None:
    pair = Pair(8)
    try:
        small = st.integers(0, 9)
        for index in range(8):
            pair.ring.describe(
                index,
                data.draw(st.sampled_from([BUFFERS, TABLE, SIZE - 8, 2**64 - 1, BASE])),
                data.draw(st.sampled_from([0, 1, 16, 64, 4096, 2**32 - 1])),
                data.draw(st.integers(0, 7) | st.integers(0, 65535)),
                data.draw(small),
            )
        pair.guest.write(TABLE, data.draw(st.binary(max_size=128)))
        for _ in range(data.draw(st.integers(1, 4))):
            pair.ring.offer(data.draw(small))
        if data.draw(st.booleans()):
            pair.guest.write16(pair.ring.available + 2, data.draw(st.integers(0, 65535)))
        for _ in range(10):
            chain = pair.queue.take()
            if chain is None:
                break
            assert len(chain.readable) + len(chain.writable) <= MAX_CHAIN + 8
            pair.queue.give_back(chain.head, 0)
    except DriverFault:
        pass
    finally:
        pair.close()


def test_a_saved_queue_that_cannot_be_one_is_told_apart() -> None:
    good = {"size": 8, "taken": 1, "returned": 0xFFFF, "in_flight": [3, 7]}
    assert wrong(good, 128) is None
    for change in (
        {"size": 256},
        {"size": 6},
        {"in_flight": [3, 8]},
        {"in_flight": [3, 3]},
        {"in_flight": [3]},
        {"taken": 2},
    ):
        assert wrong(good | change, 128), change
