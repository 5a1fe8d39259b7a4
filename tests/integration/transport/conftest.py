"""Fixtures of the transport's tests; what they are made of is in transport_rig.py."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from transport_rig import Hosts, Server, make_hosts, open_descriptors


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    left = {fd: what for fd, what in open_descriptors().items() if before.get(fd) != what}
    assert not left


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: a Unix socket's may have 107 bytes."""
    path = tempfile.mkdtemp(prefix="vf-", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    return make_hosts(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.sock.close()
