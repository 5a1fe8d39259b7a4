"""Hosts for tests; what they can do is in daemons.py."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Host


@pytest.fixture
def base() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def host(base: Path) -> Iterator[Host]:
    """A host whose migrations are fake; not started."""
    found = Host(base / "h")
    yield found
    found.close()


@pytest.fixture
def real_host(base: Path) -> Iterator[Host]:
    """`ferry host`; not started."""
    found = Host(base / "r", real=True)
    yield found
    found.close()
