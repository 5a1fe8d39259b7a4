"""The pytest plugin: fixtures for whoever tests that a device of theirs can be moved. Nothing is imported until one is used.

    def test_it_survives_a_migration(assert_migratable):
        assert_migratable(["python3", "my_device.py"], registers=[Read(0), Read(8)])

`assert_migratable` (migratable.py), `device_pair` (pair.py), `private_bus` (a bus of the test's own: its address), `guest_memory`
(sealed memory of so many bytes), `faulty_helper` (faults.py). docs/how-to-test-a-device.md shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from migrate.memory.region import GuestMemory
    from migrate.testing.pair import Pair


@pytest.fixture
def assert_migratable() -> Callable[..., None]:
    """Move a device between two fresh processes, and fail with what a guest would notice."""
    from migrate.testing.migratable import assert_migratable as check

    return check


@pytest.fixture
def private_bus() -> Iterator[str]:
    """A message bus of this test's own, as a machine has one; its address."""
    import asyncio
    import shutil
    import tempfile
    from pathlib import Path

    from migrate.bus import PrivateBus

    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    loop = asyncio.new_event_loop()
    bus = PrivateBus(directory / "bus")
    try:
        loop.run_until_complete(bus.start())
        yield bus.address
    finally:
        loop.run_until_complete(bus.stop())
        loop.close()
        shutil.rmtree(directory)


@pytest.fixture
def device_pair() -> Iterator[Callable[[Sequence[str]], Pair]]:
    """Starts a device's process and a fresh one that waits for its state; they go with the test."""
    from migrate.testing.pair import Pair

    made: list[Pair] = []

    def make(command: Sequence[str]) -> Pair:
        made.append(Pair(command))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def guest_memory() -> Iterator[Callable[[int], GuestMemory]]:
    """Makes sealed guest memory of so many bytes at guest address 0; it goes with the test."""
    from migrate.memory.addresses import GuestAddress
    from migrate.memory.region import GuestMemory, RegionSpec

    made: list[GuestMemory] = []

    def make(size: int) -> GuestMemory:
        made.append(GuestMemory.create([RegionSpec(GuestAddress(0), size)], "test"))
        return made[-1]

    yield make
    for memory in made:
        memory.close()


@pytest.fixture
def faulty_helper(private_bus: str) -> Iterator[Callable[[str, str], Any]]:
    """Starts a helper on `private_bus` that has an Id and one fault (migrate.testing.faults); it goes with the test."""
    import contextlib

    from migrate.testing.faults import faulty_helper as helper

    with contextlib.ExitStack() as stack:
        yield lambda device_id, fault: stack.enter_context(helper(private_bus, device_id, fault))
