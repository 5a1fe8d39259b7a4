from __future__ import annotations

import fcntl
import os
import tempfile

import pytest

from migrate.errors import MemoryFault
from migrate.memory import PAGE_SIZE, check_memfd, create_memfd, read_sealed, sealed_bytes

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def raw_memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("raw", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_guest_memory_can_be_neither_resized_nor_resealed_nor_inherited() -> None:
    fd = create_memfd("guest", 3 * PAGE_SIZE)
    try:
        for size in (PAGE_SIZE, 4 * PAGE_SIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert not os.get_inheritable(fd)
        assert os.fstat(fd).st_blocks == 0
        check_memfd(fd, needed=3 * PAGE_SIZE)
        with pytest.raises(MemoryFault, match=r"has 12288 bytes where 12289 are needed"):
            check_memfd(fd, needed=3 * PAGE_SIZE + 1)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1, 1 << 70])
def test_guest_memory_has_a_sane_size(size: int) -> None:
    with pytest.raises(MemoryFault):
        create_memfd("guest", size)


@pytest.mark.parametrize(
    ("seals", "says"),
    [
        (0, "SEAL, SHRINK, GROW"),
        (fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL, "SHRINK"),
        (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL, "GROW"),
        (SIZE_SEALS, "SEAL"),
        (SIZE_SEALS | fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE, "sealed against writing"),
        (SIZE_SEALS | fcntl.F_SEAL_SEAL | 0x10, "sealed against writing"),
    ],
)
def test_a_memfd_with_other_seals_is_not_mapped(seals: int, says: str) -> None:
    fd = raw_memfd(PAGE_SIZE, seals)
    try:
        with pytest.raises(MemoryFault, match=says):
            check_memfd(fd, needed=PAGE_SIZE)
    finally:
        os.close(fd)


def test_what_is_no_memfd_is_refused() -> None:
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile(dir="/dev/shm") as shared:
        for fd in (file.fileno(), shared.fileno(), 9999, -1):
            with pytest.raises(MemoryFault):
                check_memfd(fd, needed=0)
            with pytest.raises(MemoryFault):
                read_sealed(fd, 0, limit=10)


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 999], ids=["empty", "byte", "256K"])
def test_sealed_bytes_arrive_and_can_never_change(data: bytes) -> None:
    fd = sealed_bytes(data)
    try:
        os.lseek(fd, 7, os.SEEK_SET)
        assert read_sealed(fd, len(data), limit=len(data)) == data
        assert os.lseek(fd, 0, os.SEEK_CUR) == 7
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"y", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, len(data) + 1)
    finally:
        os.close(fd)


def test_a_blob_longer_than_the_limit_or_of_another_size_than_announced_is_not_read() -> None:
    fd = sealed_bytes(b"12345678")
    try:
        for size, limit in ((8, 7), (7, 8), (9, 9), (-1, 8)):
            with pytest.raises(MemoryFault):
                read_sealed(fd, size, limit=limit)
    finally:
        os.close(fd)


@pytest.mark.parametrize("seals", [0, SIZE_SEALS, fcntl.F_SEAL_WRITE, SIZE_SEALS | 0x10])
def test_a_blob_that_its_sender_could_still_change_is_not_read(seals: int) -> None:
    fd = raw_memfd(8, seals)
    try:
        with pytest.raises(MemoryFault, match="lacks the seals"):
            read_sealed(fd, 8, limit=8)
    finally:
        os.close(fd)
