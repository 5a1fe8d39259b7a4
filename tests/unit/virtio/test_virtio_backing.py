"""The raw image: what is opened, what is locked, and that bytes go where they belong."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_rig import make_image

from devices.virtio.backing import Image
from migrate.errors import DeviceRefused, UsageError


def opened(path: Path, *, read_only: bool = False) -> Image:
    return Image(str(path), read_only=read_only)


def directory(path: Path) -> None:
    path.mkdir()


def not_whole(path: Path) -> None:
    path.write_bytes(bytes(513))


def empty(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "No such file"),
        (directory, "Is a directory"),
        (os.mkfifo, "not a regular file"),
        (not_whole, "has 513 bytes"),
        (empty, "has 0 bytes"),
    ],
)
def test_what_is_no_raw_image_is_refused_in_one_line_that_names_it(
    tmp_path: Path, make: Callable[[Path], None], says: str
) -> None:
    make(tmp_path / "disk.img")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UsageError, match=says) as caught:
        opened(tmp_path / "disk.img")
    assert str(tmp_path / "disk.img") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A directory that all may search, and a user who may not write everything."""
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    directory.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield directory
    os.seteuid(user)
    shutil.rmtree(directory)


def test_an_image_that_may_not_be_written_can_still_be_had_read_only(nobody: Path) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    path = make_image(nobody)
    path.chmod(0o444)
    os.seteuid(user)
    with pytest.raises(UsageError, match="may not be written") as caught:
        opened(path)
    assert "read_only=on" in caught.value.remedy
    image = opened(path, read_only=True)
    image.read(0, [memoryview(bytearray(512))])
    with pytest.raises(OSError):
        image.write(0, [memoryview(bytes(512))])
    image.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=20), st.integers(0, 3))
def test_buffers_of_any_sizes_are_written_and_read_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], sector: int
) -> None:
    image = opened(make_image(tmp_path_factory.getbasetemp(), 256, "some.img"))
    data = [os.urandom(size) for size in sizes]
    image.write(512 * sector, [memoryview(part) for part in data])
    found = [memoryview(bytearray(size)) for size in sizes]
    image.read(512 * sector, found)
    assert [bytes(part) for part in found] == data
    image.close()


def test_more_buffers_than_one_system_call_takes(tmp_path: Path) -> None:
    image = opened(make_image(tmp_path))
    data = os.urandom(3000)
    image.write(7, [memoryview(data)[n : n + 1] for n in range(3000)])
    found = memoryview(bytearray(3000))
    image.read(7, [found[n : n + 1] for n in range(3000)])
    assert found == data
    image.close()


def test_an_image_that_was_cut_off_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    image = opened(path)
    os.truncate(path, 1024)
    with pytest.raises(OSError, match="shorter"):
        image.read(512, [memoryview(bytearray(1024))])
    image.close()


@pytest.mark.parametrize("punch", [False, True])
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_zeroed_reads_as_zeros_and_nothing_beside_it_does(tmp_path: Path, punch: bool, where: str) -> None:
    path = tmp_path / "disk.img" if where == "disk" else Path(f"/dev/shm/vf-{os.getpid()}.img")
    try:
        size = 3 << 20
        path.write_bytes(b"\xff" * size)
        image = opened(path)
        blocks = path.stat().st_blocks
        image.zero(512, size - 1024, punch=punch)
        data = path.read_bytes()
        assert data == b"\xff" * 512 + bytes(size - 1024) + b"\xff" * 512
        if punch:
            assert path.stat().st_blocks < blocks / 2
        image.close()
    finally:
        if where == "memory":
            path.unlink(missing_ok=True)


def test_after_a_flush_that_failed_no_flush_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = opened(make_image(tmp_path))
    image.flush()

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "told to fail")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError):
            image.flush()
    with pytest.raises(OSError, match="nothing is certain"):
        image.flush()
    image.lock()
    with pytest.raises(DeviceRefused, match="cannot be brought"):
        image.unlock()
    assert image.locked
    image.close()


# -- locks ----------------------------------------------------------------------------------------------------------------------


def test_one_at_a_time_may_have_it_and_letting_go_is_seen_at_once(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    mine, yours = opened(path), opened(path)
    mine.lock()
    mine.lock()
    with pytest.raises(DeviceRefused, match=r"disk\.img is locked by another process") as caught:
        yours.lock()
    assert "fuser" in caught.value.remedy
    assert not yours.locked
    mine.unlock()
    mine.unlock()
    yours.lock()
    with pytest.raises(DeviceRefused):
        mine.lock()
    yours.close()
    mine.lock()
    mine.close()


def test_readers_share_it_and_keep_writers_out(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    one, other, writer = opened(path, read_only=True), opened(path, read_only=True), opened(path)
    one.lock()
    other.lock()
    with pytest.raises(DeviceRefused):
        writer.lock()
    one.unlock()
    other.close()
    writer.lock()
    with pytest.raises(DeviceRefused):
        one.lock()
    one.close()
    writer.close()


def test_the_lock_is_not_lost_when_another_descriptor_of_the_file_is_closed_and_ends_with_its_process(
    tmp_path: Path,
) -> None:
    path = make_image(tmp_path)
    program = (
        "import sys; from devices.virtio.backing import Image; image = Image(sys.argv[1], read_only=False); "
        "image.lock(); open(sys.argv[1]).close(); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        image = opened(path)
        with pytest.raises(DeviceRefused):
            image.lock()
        process.kill()
    image.lock()
    image.close()
