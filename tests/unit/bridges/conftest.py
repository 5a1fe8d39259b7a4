from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bridge_rig import Bridged, Make


@pytest.fixture
def make() -> Iterator[Make]:
    """Bridges, each with a directory; none of their descriptors is left."""
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    made: list[Bridged] = []

    def one(*arguments: object, **fields: object) -> Bridged:
        made.append(Bridged(directory / str(len(made)), *arguments, **fields))  # type: ignore[arg-type]
        return made[-1]

    before = len(os.listdir("/proc/self/fd"))
    yield one
    for each in made:
        each.close()
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before
    shutil.rmtree(directory)
