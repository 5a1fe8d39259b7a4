"""virtio-pci as a driver meets it: capabilities, negotiation, queues, interrupts, reset; and what a careless one does to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtio_driver import EVENT_IDX, IN, INDIRECT_DESC, OK, VERSION_1, Ring
from virtio_rig import ACCEPTED, Disk, Rig, complete, take

from devices.virtio_blk import QUEUE_SIZE, VECTORS
from migrate.errors import DeviceRefused

NEEDS_RESET = 0x40


@pytest.fixture
def disk(rig: Rig) -> Disk:
    return rig.running()


# -- the function ---------------------------------------------------------------------------------------------------------------


def test_a_driver_finds_a_modern_virtio_disk_and_every_part_of_it_within_bar_0(disk: Disk) -> None:
    read = disk.pci.read
    assert (read(7, 0x00, 2), read(7, 0x02, 2)) == (0x1AF4, 0x1042)
    assert read(7, 0x08, 4) == 0x01800001  # mass storage, revision 1
    assert read(7, 0x0E, 1) == 0  # header type
    assert read(7, 0x06, 2) & 0x10  # there are capabilities
    assert read(7, 0x3D, 1) == 0  # no INTx
    assert sorted(disk.pci.areas) == [1, 2, 3, 4, 5]
    size = disk.device.regions[0].size
    assert all(offset + length <= size for offset, length in disk.pci.areas.values())
    assert disk.pci.areas[1][1] == 0x38
    assert read(7, disk.pci.msix + 2, 2) == VECTORS - 1


def test_the_size_of_bar_0_is_found_as_pci_wants_it_and_other_bars_are_not_there(disk: Disk) -> None:
    for number in range(6):
        at = 0x10 + 4 * number
        disk.pci.write(7, at, 4, 0xFFFF_FFFF)
        found = disk.pci.read(7, at, 4)
        assert found == (2**32 - disk.device.regions[0].size if number == 0 else 0)
    disk.pci.write(7, 0x10, 4, 0xD300_0000)
    assert disk.pci.read(7, 0x10, 4) == 0xD300_0000


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 63), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))))
def test_what_is_fixed_in_configuration_space_stays_whatever_is_written(
    disk: Disk, writes: list[tuple[int, int, int]]
) -> None:
    def fixed() -> list[int]:
        space = [disk.pci.read(7, at, 4) for at in range(0, 256, 4)]
        for at, mask in ((0x04, 0x0406), (0x10, 0xFFFF_8000), (0x3C, 0xFF), (0x40, 0xC000_0000)):
            space[at // 4] &= ~mask
        del space[0x98 // 4 : 0xA8 // 4]  # the window onto the BAR
        return space

    before = fixed()
    for word, size, value in writes:
        disk.pci.write(7, 4 * word, size, value & (1 << 8 * size) - 1)
    assert fixed() == before


def test_bar_0_is_reached_through_configuration_space_as_well(disk: Disk) -> None:
    at = disk.pci.msix
    while disk.pci.read(7, at + 3, 1) != 5 or disk.pci.read(7, at, 1) != 0x09:
        at = disk.pci.read(7, at + 1, 1)

    def reach(offset: int, size: int, value: int | None = None) -> int:
        disk.pci.write(7, at + 8, 4, disk.pci.areas[1][0] + offset)
        disk.pci.write(7, at + 12, 4, size)
        if value is not None:
            disk.pci.write(7, at + 16, 4, value)
        return disk.pci.read(7, at + 16, 4)

    assert reach(0x12, 2) == 2  # queues
    assert reach(0x14, 1, 1) == 1
    assert reach(0x14, 1, 2) == 3
    assert disk.pci.common(0x14, 1) == 3
    # What is no access reaches nothing.
    for offset, size in ((0x14, 3), (0x12, 0), (0x11, 2), (0x7FFF, 4), (2**32 - 4, 4)):
        reach(offset - disk.pci.areas[1][0] & 0xFFFF_FFFF, size, 0xFF)
    assert disk.pci.common(0x14, 1) == 3


# -- negotiation ----------------------------------------------------------------------------------------------------------------


def test_features_are_those_of_a_disk_and_of_the_rings(disk: Disk) -> None:
    blk = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14
    assert disk.pci.features() == blk | EVENT_IDX | INDIRECT_DESC | VERSION_1
    disk.pci.common(0x00, 4, 2)
    assert disk.pci.common(0x04, 4) == 0


@pytest.mark.parametrize("features", [0, EVENT_IDX, VERSION_1 | 1 << 5, VERSION_1 | 1 << 63])
def test_features_that_cannot_be_are_refused_and_the_driver_sees_it(disk: Disk, features: int) -> None:
    assert not disk.pci.accept(features) & 8
    assert not disk.pci.status(4) & 4
    assert disk.pci.accept(ACCEPTED) & 8


def test_features_stay_as_they_were_agreed(disk: Disk) -> None:
    disk.pci.accept(VERSION_1)
    disk.pci.common(0x08, 4, 0)
    disk.pci.common(0x0C, 4, EVENT_IDX)
    assert disk.pci.common(0x0C, 4) == 0


def test_status_bits_are_added_and_never_taken_away_but_by_a_reset(disk: Disk) -> None:
    disk.pci.common(0x14, 1, 3)
    disk.pci.common(0x14, 1, 1)
    assert disk.pci.common(0x14, 1) == 3
    disk.pci.common(0x14, 1, NEEDS_RESET)
    assert disk.pci.common(0x14, 1) == 3
    disk.pci.common(0x14, 1, 0)
    assert disk.pci.common(0x14, 1) == 0


def test_a_queue_is_set_up_once_and_what_it_cannot_be_is_not_taken(rig: Rig, disk: Disk) -> None:
    pci = disk.pci
    pci.accept(ACCEPTED)
    pci.common(0x16, 2, 1)
    assert pci.common(0x18, 2) == QUEUE_SIZE
    for size in (0, 3, 2 * QUEUE_SIZE, 0x8000):
        pci.common(0x18, 2, size)
        assert pci.common(0x18, 2) == QUEUE_SIZE
    for vector, taken in ((0, 0), (VECTORS - 1, VECTORS - 1), (VECTORS, 0xFFFF), (0xFFFF, 0xFFFF)):
        pci.common(0x1A, 2, vector)
        assert pci.common(0x1A, 2) == taken
    pci.set_up_queue(1, Ring(rig.guest, 0x1_0000, 16), 2)
    assert (pci.common(0x18, 2), pci.common(0x1A, 2), pci.common(0x1C, 2)) == (16, 2, 1)
    before = [pci.common(at, 8) for at in (0x20, 0x28, 0x30)]
    assert before[0] == 0x1_0000
    for at in (0x20, 0x28, 0x30):
        pci.common(at, 4, 1)
        pci.common(at + 4, 4, 1)
    pci.common(0x18, 2, 8)
    pci.common(0x1C, 2, 0)
    assert [pci.common(at, 8) for at in (0x20, 0x28, 0x30)] == before
    assert (pci.common(0x18, 2), pci.common(0x1C, 2)) == (16, 1)
    pci.common(0x16, 2, 2)  # there is none
    assert [pci.common(0x18, 2), pci.common(0x1C, 2), pci.common(0x1E, 2), pci.common(0x20, 8)] == [0] * 4
    pci.common(0x18, 2, 8)


def test_the_configuration_says_how_large_the_disk_is_and_what_a_request_may_be(disk: Disk) -> None:
    config = disk.pci.config
    assert (config(0, 8), config(0, 4), config(4, 4)) == (64, 64, 0)
    assert (config(8, 4), config(12, 4), config(20, 4), config(34, 2)) == (64 << 10, 126, 512, 2)
    assert (config(36, 4), config(40, 4), config(44, 4)) == (1 << 21, 16, 1)
    assert (config(48, 4), config(52, 4), config(56, 1)) == (1 << 15, 16, 1)


# -- interrupts -----------------------------------------------------------------------------------------------------------------


def finish_one(disk: Disk, queue: object) -> None:
    queue.ask(IN, length=512)  # type: ignore[attr-defined]
    assert disk.step(0)
    assert queue.answers()[0].status == OK  # type: ignore[attr-defined]


def test_each_queue_has_its_vector_and_an_event_is_signalled_once(rig: Rig, disk: Disk) -> None:
    queues = disk.set_up(rig.guest)
    for number, queue in enumerate(queues):
        queue.ask(IN, length=512)
        assert disk.step(number)
        assert [disk.edges(vector) for vector in range(VECTORS)] == [
            1 if vector == number + 1 else 0 for vector in range(VECTORS)
        ]
    assert disk.pci.read(0, disk.pci.areas[3][0], 1) == 0


def test_a_masked_vector_is_pending_and_comes_when_it_is_unmasked(rig: Rig, disk: Disk) -> None:
    queue = disk.set_up(rig.guest)[0]
    table, pending = (disk.pci.read(7, disk.pci.msix + at, 4) for at in (4, 8))
    control = disk.pci.read(7, disk.pci.msix + 2, 2)
    for mask, unmask in (
        (lambda: disk.pci.write(0, table + 28, 4, 1), lambda: disk.pci.write(0, table + 28, 4, 0)),
        (
            lambda: disk.pci.write(7, disk.pci.msix + 2, 2, control | 0x4000),
            lambda: disk.pci.write(7, disk.pci.msix + 2, 2, control),
        ),
    ):
        mask()
        finish_one(disk, queue)
        assert disk.edges(1) == 0
        assert disk.pci.read(0, pending, 4) == 0b10
        unmask()
        assert disk.edges(1) == 1
        assert disk.pci.read(0, pending, 4) == 0


def test_vectors_are_masked_at_first_and_keep_what_is_written(disk: Disk) -> None:
    table = disk.pci.read(7, disk.pci.msix + 4, 4)
    assert all(disk.pci.read(0, table + 16 * vector + 12, 4) == 1 for vector in range(VECTORS))
    disk.pci.write(0, table + 16, 8, 0x1122334455667788)
    disk.pci.write(0, table + 24, 8, 0x1_99AABBCC)
    assert disk.pci.read(0, table + 16, 8) == 0x1122334455667788
    assert disk.pci.read(0, table + 24, 8) == 0x1_99AABBCC
    disk.pci.write(0, table + 16 * VECTORS + 12, 4, 0)
    disk.pci.write(0, table + 24, 1, 7)
    assert disk.pci.read(0, table + 24, 4) == 0x99AABBCC


def test_without_msix_the_interrupt_status_tells_and_reading_it_acknowledges(rig: Rig, disk: Disk) -> None:
    queue = disk.set_up(rig.guest)[0]
    disk.pci.write(7, disk.pci.msix + 2, 2, 0)
    finish_one(disk, queue)
    isr = disk.pci.areas[3][0]
    assert disk.edges(1) == 0
    assert disk.pci.read(0, isr, 1) == 1
    assert disk.pci.read(0, isr, 1) == 0


# -- what stops it --------------------------------------------------------------------------------------------------------------


def test_nothing_is_served_before_the_driver_is_ready_or_while_it_may_not_master_the_bus(
    rig: Rig, disk: Disk
) -> None:
    queue = disk.set_up(rig.guest)[0]
    disk.pci.write(7, 0x04, 2, 0x0002)
    queue.ask(IN, length=512)
    disk.pci.notify(0)
    assert not disk.step(0)
    disk.pci.write(7, 0x04, 2, 0x0006)
    assert disk.step(0)
    disk.pci.accept(ACCEPTED)
    assert not disk.step(0)


def test_a_driver_that_breaks_a_rule_is_told_to_reset_and_after_that_all_is_well(
    rig: Rig, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    queue = disk.set_up(rig.guest)[0]
    disk.pci.common(0x10, 2, 0)  # vector 0 for changes of the configuration
    disk.pci.use_vector(0)
    queue.ask(IN, length=512)
    rig.guest.write16(queue.ring.available + 2, 100)
    disk.pci.notify(0)
    assert not disk.step(0)
    assert disk.pci.common(0x14, 1) & NEEDS_RESET
    assert disk.edges(0) == 1
    assert disk.pci.read(0, disk.pci.areas[3][0], 1) == 2
    assert "went from 0 to 100" in caplog.text
    rig.guest.write16(queue.ring.available + 2, 1)
    disk.pci.notify(0)
    assert not disk.step(0)
    finish_one(disk, disk.set_up(rig.guest)[0])


def test_a_reset_while_a_request_is_on_its_way_is_over_when_that_has_ended(rig: Rig, disk: Disk) -> None:
    queue = disk.set_up(rig.guest)[0]
    queue.ask(IN, length=512)
    runner = disk.device.runners[0]
    assert take(runner)
    disk.pci.common(0x14, 1, 0)
    assert disk.pci.common(0x14, 1) != 0
    disk.pci.common(0x14, 1, 1)
    runner.run()
    assert disk.pci.common(0x14, 1) != 0
    complete(runner)
    assert disk.pci.common(0x14, 1) == 0
    finish_one(disk, disk.set_up(rig.guest)[0])


def test_a_reset_of_the_function_forgets_what_a_driver_set_up(rig: Rig, disk: Disk) -> None:
    fresh = disk.save()
    queue = disk.set_up(rig.guest)[0]
    finish_one(disk, queue)
    assert disk.save() != fresh
    with disk.device.lock:
        disk.device.reset()
    assert disk.save() == fresh


# -- state ----------------------------------------------------------------------------------------------------------------------


def busy(rig: Rig) -> Disk:
    """A disk in which as much as possible is not as after a reset."""
    disk = rig.running()
    queue = disk.set_up(rig.guest)[0]
    disk.pci.write(7, 0x10, 4, 0xD000_8000)
    disk.pci.write(7, 0x3C, 1, 11)
    for selector in (0x00, 0x08, 0x16):
        disk.pci.common(selector, 2 if selector == 0x16 else 4, 1)
    disk.pci.common(0x10, 2, 4)
    table = disk.pci.read(7, disk.pci.msix + 4, 4)
    disk.pci.write(0, table + 16 + 12, 4, 1)
    finish_one(disk, queue)
    disk.pci.write(0, table, 8, 0x1_FEE0_0000)
    queue.ask(IN, length=512)
    queue.ask(IN, length=512)
    take(disk.device.runners[0])
    return disk


def test_a_state_is_the_same_after_it_was_loaded(rig: Rig) -> None:
    state = busy(rig).save()
    other = rig.disk()
    other.load(state)
    assert other.save() == state


def test_edges_that_nobody_was_told_of_go_with_the_state_and_come_when_it_runs(rig: Rig) -> None:
    disk = rig.running()
    queue = disk.set_up(rig.guest)[0]
    for irq in disk.device.all_irqs:
        irq.connect(None)
    finish_one(disk, queue)
    disk.rest()
    state = disk.save()
    assert disk.save() == state
    disk.device.release_locks()
    other = rig.disk()
    other.load(state)
    assert other.edges(1) == 0
    other.start()
    assert other.edges(1) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state | {"capacity": 65}, "65 sectors"),
        (lambda state: state | {"read_only": True}, "may be written"),
        (lambda state: state | {"serial": "other"}, "serial"),
        (lambda state: state | {"features": 1 << 40, "status": 11}, "0x10000000000"),
        (lambda state: state | {"queues": state["queues"][:1]}, "1 queues"),
        (lambda state: _queue(state, size=96), "queue 1: a queue of 96"),
        (lambda state: _queue(state, in_flight=[1]), "queue 1: 1 requests in flight"),
        (lambda state: _queue(state, taken=7), "queue 1: 0 requests in flight"),
    ],
)
def test_a_state_that_does_not_fit_this_disk_is_refused_with_what_does_not(
    rig: Rig, change: Callable[[dict], dict], says: str
) -> None:
    disk = rig.disk()
    state = disk.device.save()
    disk.device.check(state)
    with pytest.raises(DeviceRefused, match=says):
        disk.device.check(change(state))


def _queue(state: dict, **fields: object) -> dict:
    return state | {"queues": [state["queues"][0], state["queues"][1] | fields]}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 0, 0, 7]),
            st.integers(0, 0x40)
            | st.integers(0x1000, 0x1004)
            | st.integers(0x4000, 0x4090)
            | st.integers(0, 0x7FF8),
            st.sampled_from([1, 2, 4, 8]),
            st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 3, 7, 15, 128]),
        ),
        max_size=60,
    )
)
def test_no_access_breaks_it_and_its_state_always_fits_its_schema(
    disk: Disk, accesses: list[tuple[int, int, int, int]]
) -> None:
    for region, offset, size, value in accesses:
        at = min(offset, disk.device.regions[region].size - 8) & ~(size - 1)
        disk.pci.write(region, at, size, value & (1 << 8 * size) - 1)
        disk.pci.read(region, at, size)
        disk.step(0)
    state = disk.save()
    disk.load(state)
    assert disk.save() == state
