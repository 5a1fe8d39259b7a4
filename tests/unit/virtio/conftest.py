from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from virtio_driver import Guest
from virtio_rig import Disk, make_image, make_memory


class Rig:
    """Guest memory and an image, and as many devices on them as a test makes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.memory = make_memory()
        self.guest = Guest(self.memory)
        self.image = make_image(directory)
        self.disks: list[Disk] = []

    def disk(self, **options: object) -> Disk:
        """Stopped, in the state after power-on."""
        self.disks.append(Disk(self.image, self.memory, **options))  # type: ignore[arg-type]
        return self.disks[-1]

    def running(self, **options: object) -> Disk:
        disk = self.disk(**options)
        disk.start()
        disk.run()
        return disk

    def close(self) -> None:
        for disk in self.disks:
            disk.close()
        self.memory.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def rigs(tmp_path: Path) -> Iterator[Callable[[], Rig]]:
    made: list[Rig] = []

    def make() -> Rig:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(Rig(directory))
        return made[-1]

    yield make
    for one in made:
        one.close()
