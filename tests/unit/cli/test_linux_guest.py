"""The Linux guest's parts without a QEMU: its archive, what it says, its disk seen from outside, the committed program."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from migrate.cli.demo.linux import console, image, initramfs
from migrate.errors import UsageError

SOURCE = initramfs.INIT.parent


def tree(root: Path, *, version: str = "6.1.0-9-cloud-amd64", suffix: str = ".ko") -> Path:
    """A kernel as Debian's package unpacks it, with modules of a few bytes."""
    (root / "boot").mkdir(parents=True, exist_ok=True)
    (root / "boot" / f"vmlinuz-{version}").write_bytes(b"kernel")
    drivers = root / "lib" / "modules" / version / "kernel" / "drivers" / "virtio"
    drivers.mkdir(parents=True)
    for name in initramfs.MODULES:
        data = f"module {name}".encode()
        (drivers / f"{name}{suffix}").write_bytes(lzma.compress(data) if suffix.endswith("xz") else data)
    return root


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content by name, read as the format says."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        at = (at + 110 + length + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[at : at + size])
        at = (at + size + 3) & ~3


@pytest.mark.parametrize("suffix", [".ko", ".ko.xz"])
def test_the_archive_holds_our_program_and_the_modules_in_order(tmp_path: Path, suffix: str) -> None:
    kernel = initramfs.find_kernel(tree(tmp_path, suffix=suffix))
    found = entries(initramfs.build(kernel))
    assert found["init"] == (0o100755, initramfs.INIT.read_bytes())
    assert [found[f"modules/{n}"][1].decode() for n in range(6)] == [
        f"module {name}" for name in initramfs.MODULES
    ]
    assert found["dev/console"][0] == 0o020600


def test_the_newest_kernel_is_taken(tmp_path: Path) -> None:
    for version in ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "5.10.0-99-cloud-amd64"):
        tree(tmp_path, version=version)
    assert initramfs.find_kernel(tmp_path).image.name == "vmlinuz-6.1.0-56-cloud-amd64"


def test_without_a_kernel_or_a_module_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no Linux cloud kernel"):
        initramfs.find_kernel(tmp_path)
    kernel = initramfs.find_kernel(tree(tmp_path))
    next(kernel.modules.rglob("virtio_blk.ko")).unlink()
    with pytest.raises(UsageError, match="no module virtio_blk"):
        initramfs.build(kernel)


def test_modules_that_python_cannot_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing for \.zst"):
        initramfs.build(initramfs.find_kernel(tree(tmp_path, suffix=".ko.zst")))


# -- what it says -------------------------------------------------------------------------------------------------------------

BEFORE = b"ready\ntick 1 100\nsynced 8\ntick 2 120\ntick 3 1"
AFTER = b"40\n[    1.5] a line of the kernel\ntick 4 200\nsynced 16\nti"


def test_a_line_may_begin_on_one_host_and_end_on_the_other() -> None:
    report = console.read(BEFORE, AFTER, 0)
    assert (report.ticks_before, report.ticks_after) == (2, 4)
    assert (report.corrupt, report.missed, report.longest_gap_ms) == (0, 0, 60.0)
    assert console.last_synced(BEFORE + AFTER) == 16


@pytest.mark.parametrize(
    ("after", "corrupt", "missed"),
    [
        (b"40\ntick 5 160\n", 0, 1),
        (b"40\ntick 3 160\n", 0, 1),
        (b"40\nCORRUPT memory page=3 expected=4 got=5\ncorrupt 1\ntick 4 160\n", 2, 0),
        (b"40\ntick 4", 0, 0),
        (b"4?\ntick 4 160\n", 1, 1),
        (b"40\nsynced 8 9\n", 1, 0),
    ],
    ids=[
        "a tick is missing",
        "a tick is there twice",
        "corrupt",
        "cut off",
        "a byte is wrong",
        "no line of its",
    ],
)
def test_what_is_wrong_is_seen(after: bytes, corrupt: int, missed: int) -> None:
    report = console.read(BEFORE, after, 0)
    assert (report.corrupt, report.missed) == (corrupt, missed)
    assert bool(report.strange) == bool(corrupt)


def test_the_last_whole_tick_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "console"
    assert console.last_tick(path) == 0
    path.write_bytes(b"x" * 9000 + BEFORE)
    assert console.last_tick(path) == 2


# -- its disk -----------------------------------------------------------------------------------------------------------------


def disk(path: Path, generations: dict[int, int], blocks: int = 4) -> Path:
    data = np.zeros((blocks, 128, 64), np.uint64)
    for block, generation in generations.items():
        data[block] = image.expected(block, generation)
    data.tofile(path)
    return path


def test_blocks_that_are_whole_tell_their_generations(tmp_path: Path) -> None:
    report = image.check(disk(tmp_path / "disk", {0: 4, 1: 5, 3: 3}))
    assert (report.generations, report.wrong) == ({0: 4, 1: 5, 3: 3}, [])
    assert report.lost(5, 4) == [2]
    assert report.lost(6, 4) == [2]
    assert image.check(disk(tmp_path / "disk", {0: 4, 1: 5, 2: 2, 3: 3})).lost(5, 4) == []


def test_a_torn_block_and_a_byte_that_is_wrong_are_found(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk", {0: 4, 1: 5})
    with path.open("r+b") as file:
        file.seek(7 * 512 + 16)
        file.write(struct.pack("<Q", 3))
        file.seek(65536 + 100 * 512 + 99)
        file.write(b"?")
    assert [text.split(":")[0] for text in image.check(path).wrong] == [
        "block 0 is torn",
        "block 1 of generation 5 has other bytes than were written",
    ]


def test_the_committed_program_is_what_its_source_makes(tmp_path: Path) -> None:
    missing = [tool for tool in ("make", "gcc") if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"to build the guest's program, {' and '.join(missing)} is missing: apt-get install build-essential"
        )
    ours = (SOURCE / "COMPILER").read_text().strip()
    version = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
    if (found := version.stdout.splitlines()[0]) != ours:
        pytest.skip(f"init was made by {ours}; this is {found}, which makes other bytes")
    subprocess.run(["make", "-B", "-C", SOURCE, f"OUT={tmp_path}"], check=True, capture_output=True)
    assert (tmp_path / "init").read_bytes() == initramfs.INIT.read_bytes(), "run make there, and commit init"
