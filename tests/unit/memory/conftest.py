from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from two_regions import LAYOUT

from migrate.memory import GuestMemory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.create(LAYOUT, "test")
    yield memory
    memory.close()


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Descriptors and mappings of guest memory are as many afterwards as before."""

    def count() -> tuple[int, int]:
        with open("/proc/self/maps") as maps:
            mapped = maps.read().count("/memfd:")
        return len(os.listdir("/proc/self/fd")), mapped

    gc.collect()  # what other tests have left to it
    before = count()
    yield
    gc.collect()
    assert count() == before
