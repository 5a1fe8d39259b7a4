"""What a destination says of the disks of a machine that would arrive: shared storage is proved, everything else is refused."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from migrate.coordinator import disks
from migrate.errors import IncompatibleError, Reason
from migrate.machine.hostconfig import HostConfig
from migrate.protocol.messages import DeviceEntry, DiskEntry

SIZE = 1 << 20


def parts(image: Path) -> Any:
    return SimpleNamespace(members=[SimpleNamespace(id="disk0", entry={"images": {"image": str(image)}})])


def host(directory: Path) -> HostConfig:
    return HostConfig(directory, {}, (directory,))


def image_in(directory: Path, size: int = SIZE) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "disk0.img"
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextmanager
def shared(image: Path) -> Iterator[str]:
    """The source's token stands beside the image."""
    tokens = disks.Tokens()
    tokens.write(parts(image))
    try:
        yield tokens.by_disk["disk0", "image"]
    finally:
        tokens.remove()


@contextmanager
def locked_by_somebody(image: Path) -> Iterator[None]:
    code = (
        "import fcntl,os,struct,sys\n"
        "fd=os.open(sys.argv[1],os.O_RDWR)\n"
        "fcntl.fcntl(fd,fcntl.F_OFD_SETLK,struct.pack('hhqqi4x',fcntl.F_WRLCK,0,0,0,0))\n"
        "print('locked',flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield
        process.communicate()


def asked(directory: Path, token: str, *, read_only: bool = False) -> tuple[dict[str, str], list[Reason]]:
    entry = SimpleNamespace(id="disk0", disks=(DiskEntry("image", "disk0.img", SIZE, read_only, token),))
    return disks.find(host(directory), entry)  # type: ignore[arg-type]


def the_reason(directory: Path, token: str) -> Reason:
    found, [reason] = asked(directory, token)
    assert found == {}
    assert (reason.device, reason.phase) == ("disk0", "preflight")
    assert reason.remedy
    return reason


def test_an_image_on_shared_storage_is_found_and_its_token_goes_afterwards(tmp_path: Path) -> None:
    image = image_in(tmp_path)
    with shared(image) as token:
        assert asked(tmp_path, token) == ({"image": str(image)}, [])
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["disk0.img"]


def test_a_local_file_of_the_same_name_is_refused(tmp_path: Path) -> None:
    there = image_in(tmp_path / "there")
    image_in(tmp_path / "here")
    with shared(there) as token:
        assert "a different file under the same name" in the_reason(tmp_path / "here", token).reason
        # Also where a token of another job stands beside it.
        (tmp_path / "here" / "disk0.img.vmferry").write_text("0" * 32 + "\n")
        assert "a different file under the same name" in the_reason(tmp_path / "here", token).reason


def test_a_source_that_wrote_no_token_is_refused(tmp_path: Path) -> None:
    image_in(tmp_path)
    assert "a different file under the same name" in the_reason(tmp_path, "").reason


def test_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "'disk0.img' is not on this host" in the_reason(tmp_path, "0" * 32).reason


def test_an_image_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with shared(image_in(tmp_path, SIZE // 2)) as token:
        reason = the_reason(tmp_path, token).reason
    assert f"has {SIZE // 2} bytes here and {SIZE} on the source" in reason


def test_an_image_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk0.img").mkdir()
    assert "is not a regular file" in the_reason(tmp_path, "0" * 32).reason


def test_an_image_that_may_not_be_written_here_is_refused_and_a_read_only_disk_is_not(tmp_path: Path) -> None:
    """As nobody in particular: to root a mode says nothing."""
    image = image_in(tmp_path)
    with shared(image) as token:
        for path in (tmp_path, image, Path(f"{image}.vmferry")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        pid = os.fork()
        if pid == 0:  # only calls the system and the code under test
            code = 1
            try:
                if os.geteuid() == 0:
                    for parent in tmp_path.parents:
                        if parent.name.startswith(
                            ("pytest-", "popen-")
                        ):  # the latter where tests run side by side
                            parent.chmod(0o755)
                    os.setgroups([])
                    os.setresgid(65534, 65534, 65534)
                    os.setresuid(65534, 65534, 65534)
                refused = [reason.reason for reason in asked(tmp_path, token)[1]]
                allowed = asked(tmp_path, token, read_only=True)[1]
                code = (
                    0 if len(refused) == 1 and "may not be written here" in refused[0] and not allowed else 2
                )
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        tmp_path.chmod(0o755)


def test_a_lock_of_the_source_itself_is_no_reason(tmp_path: Path) -> None:
    image = image_in(tmp_path)
    with shared(image) as token, locked_by_somebody(image):
        # The token's lock is seen, so the source's device would be seen as well: this one is its own.
        assert asked(tmp_path, token) == ({"image": str(image)}, [])


def test_a_lock_of_a_third_party_is_a_reason_where_the_sources_locks_are_not_seen(tmp_path: Path) -> None:
    image = image_in(tmp_path)
    with shared(image) as token:
        # As on a mount whose locks stay on the host that takes them.
        path = Path(f"{image}.vmferry")
        path.unlink()
        path.write_text(f"{token}\n")
        assert asked(tmp_path, token)[1] == []
        with locked_by_somebody(image):
            assert "is locked by another process" in the_reason(tmp_path, token).reason
        assert asked(tmp_path, token)[1] == []


def test_the_source_says_beside_which_images_it_can_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError) as caught:
        disks.Tokens().write(parts(tmp_path / "nowhere" / "disk0.img"))
    [reason] = caught.value.reasons()
    assert reason.device == "disk0"
    assert "no token can be written" in reason.reason


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    image = image_in(tmp_path)
    before = os.listdir("/proc/self/fd")
    with shared(image) as token:
        asked(tmp_path, token)
        asked(tmp_path, "wrong")
    assert os.listdir("/proc/self/fd") == before


def test_the_lock_on_a_token_is_one_that_others_see(tmp_path: Path) -> None:
    image = image_in(tmp_path)
    with shared(image), open(f"{image}.vmferry", "rb") as token:
        answer = fcntl.fcntl(token, fcntl.F_OFD_GETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
    assert struct.unpack("hhqqi4x", answer)[0] == fcntl.F_WRLCK


def test_an_entry_without_disks_has_nothing_against_it(tmp_path: Path) -> None:
    entry: DeviceEntry = SimpleNamespace(id="rtc0", disks=())  # type: ignore[assignment]
    assert disks.find(host(tmp_path), entry) == ({}, [])
