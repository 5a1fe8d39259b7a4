"""The guest's disk from outside: are its blocks whole, and is every write there that the guest was told would last?

init.c says how a block looks. Unused blocks are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 65536
_SECTORS, _WORDS = 128, 64
MAGIC: Final = int.from_bytes(b"FRRYDISK", "little")
_A, _B, _C = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


@dataclass(frozen=True, slots=True)
class DiskReport:
    """Generations by block, and what is wrong, a sentence each."""

    generations: dict[int, int]
    wrong: list[str]

    def lost(self, synced: int, blocks: int) -> list[int]:
        """Blocks whose last write up to generation `synced` is not there: the guest writes block n % `blocks` with generation n."""
        expected = {n % blocks: n for n in range(max(1, synced - blocks + 1), synced + 1)}
        return [block for block, least in sorted(expected.items()) if self.generations.get(block, 0) < least]


def check(path: Path) -> DiskReport:
    words: NDArray[np.uint64] = np.fromfile(path, np.uint64)
    blocks = words[: len(words) // (BLOCK // 8) * (BLOCK // 8)].reshape(-1, _SECTORS, _WORDS)
    generations: dict[int, int] = {}
    wrong: list[str] = []
    for number in np.nonzero(blocks[:, 0, 0] == MAGIC)[0].tolist():
        block = blocks[number]
        generation = int(block[0, 2])
        generations[number] = generation
        if bool((block[:, 2] != generation).any()):
            wrong.append(f"block {number} is torn: generations {sorted(set(block[:, 2].tolist()))}")
        elif not np.array_equal(block, expected(number, generation)):
            wrong.append(f"block {number} of generation {generation} has other bytes than were written")
    return DiskReport(generations, wrong)


def expected(block: int, generation: int) -> NDArray[np.uint64]:
    """What the guest writes: an array of sectors and words."""
    found = np.empty((_SECTORS, _WORDS), np.uint64)
    with np.errstate(over="ignore"):
        which = np.uint64(block) * _A ^ np.uint64(generation) * _B
        mixed = which ^ (np.arange(_SECTORS * _WORDS, dtype=np.uint64) + np.uint64(1)) * _C
    found[:] = (mixed ^ mixed >> np.uint64(29)).reshape(_SECTORS, _WORDS)
    found[:, 0], found[:, 1], found[:, 2] = MAGIC, block, generation
    found[:, 3] = np.arange(_SECTORS)
    return found
