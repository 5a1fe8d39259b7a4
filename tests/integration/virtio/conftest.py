from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_machine import DiskMachine


@pytest.fixture
def machines() -> Iterator[Callable[[Callable[..., Awaitable[Any]]], None]]:
    """Run an async test with as many machines as it has parameters. None of their processes is left afterwards."""
    pytest.importorskip(
        "unicorn", reason="the vCPU needs Unicorn, an optional extra: pip install vmferry[vcpu]"
    )
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))

    def run(scenario: Callable[..., Awaitable[Any]]) -> None:
        async def main() -> None:
            count = scenario.__code__.co_argcount  # type: ignore[attr-defined]
            made = [DiskMachine(directory / str(number)) for number in range(count)]
            try:
                async with asyncio.timeout(90):
                    await scenario(*made)
            finally:
                for machine in made:
                    await machine.close()

        asyncio.run(main())

    yield run
    shutil.rmtree(directory)
