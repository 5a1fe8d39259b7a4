from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from vfio_user_backend import open_descriptors


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room in the 107 bytes of a socket's."""
    path = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    yield path
    shutil.rmtree(path)
