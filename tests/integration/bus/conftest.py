"""A real dbus-daemon for every test that asks for one, and the event loop to talk to it."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.bus import PrivateBus

OnBus = Callable[[Callable[[PrivateBus], Awaitable[Any]]], Any]


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room in the 107 bytes of a socket's."""
    path = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def on_bus(short_dir: Path) -> OnBus:
    """Run an async test with a bus of its own. Whatever it does, no descriptor is left open afterwards."""

    def run(scenario: Callable[[PrivateBus], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            bus = PrivateBus(short_dir / "bus")
            await bus.start()
            try:
                async with asyncio.timeout(60):
                    return await scenario(bus)
            finally:
                await bus.stop()

        before = open_files()
        result = asyncio.run(main())
        left = {fd: target for fd, target in open_files().items() if before.get(fd) != target}
        assert not left, f"descriptors left open: {left}"
        return result

    return run


def open_files() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            pass  # the listing's own
    return found
