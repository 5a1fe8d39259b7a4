"""What the built-in guest said about its disks against what is in the images: disk.c, scsi.c and blocks.c of the guest in Python.

After `D n` on the UART (of the SCSI disk `F n`) every operation up to n lasts. So each sector holds what its last operation up to
n put there, or a later one, which may or may not have got to the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SECTOR, SECTORS = 512, 8  # bytes of a sector, sectors of a block
_STEP = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1


def mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & _ALL
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & _ALL
    return x ^ x >> 31


@dataclass(frozen=True, slots=True)
class Kind:
    """A disk of the guest's: the letters of its lines, at the start and after a flush; and its own order of blocks."""

    start: str
    flush: str
    salt: int = 0
    writes_only: bool = False

    def block(self, operation: int, blocks: int) -> int:
        return mix(operation ^ self.salt) % blocks

    def zeroes(self, operation: int) -> bool:
        """Whether it is a discard or a write of zeroes."""
        return not self.writes_only and (mix(operation) >> 48) % 16 < 2


VIRTIO = Kind("V", "D")
SCSI = Kind("L", "F", salt=0x5C51_0000, writes_only=True)


def zeroes(operation: int) -> bool:
    return VIRTIO.zeroes(operation)


def content(sector: int, operation: int, seed: int, kind: Kind = VIRTIO) -> bytes:
    """What an operation puts into a sector."""
    if kind.zeroes(operation):
        return bytes(SECTOR)
    name = operation << 32 | sector
    first = mix(name ^ seed << 16) | 1
    words = [name, seed, *((first + number * _STEP) & _ALL for number in range(SECTOR // 8 - 2))]
    return b"".join(word.to_bytes(8, "little") for word in words)


def durable(said: Sequence[str], kind: Kind = VIRTIO) -> tuple[int, int]:
    """Operations and sectors of the last line about a flush; 0 where there is none."""
    lines = [line for line in said if re.match(rf"{kind.flush} \d+ \d+$", line)]
    return (int(lines[-1].split()[1]), int(lines[-1].split()[2])) if lines else (0, 0)


def missing(image: Path, said: Sequence[str], beyond: int = 32, kind: Kind = VIRTIO) -> list[str]:
    """What was said to last and is not in the image; nothing is as it must be.

    :param said: whole lines of the UART, of one boot.
    :param beyond: operations that may have got to the image since: as many as the guest does from flush to flush (`flush=`).
    """
    (volume,) = [line for line in said if re.match(rf"{kind.start}( \d+){{3,4}}$", line)]
    blocks, seed = (int(word) for word in volume.split()[-2:])
    last, sectors = durable(said, kind)
    found = [] if sectors == last * SECTORS else [f"{last} operations on {sectors} sectors"]
    data = image.read_bytes()
    for block, operations in _by_block(last, blocks, beyond, kind).items():
        for sector in range(block * SECTORS, (block + 1) * SECTORS):
            there = data[SECTOR * sector : SECTOR * (sector + 1)]
            if not any(there == content(sector, one, seed, kind) for one in operations):
                name = int.from_bytes(there[:8], "little")
                found.append(
                    f"sector {sector} is of {name >> 32} and not of {operations[0]}, {operations[1:]}"
                )
    return found


def _by_block(last: int, blocks: int, beyond: int, kind: Kind) -> dict[int, list[int]]:
    """For each block that has something that lasts: its last operation that does, and those that came after."""
    found: dict[int, list[int]] = {}
    for operation in range(1, last + 1):
        found[kind.block(operation, blocks)] = [operation]
    for operation in range(last + 1, last + 1 + beyond):
        if (block := kind.block(operation, blocks)) in found:
            found[block].append(operation)
    return found


def lines(said: Iterable[str]) -> list[str]:
    return [line for line in said if line[:2] in ("D ", "V ")]
