"""Damage, as disks, networks and enemies do it: from a corpus and a seed, one hostile input after the other.

Structure is hit on purpose: lengths and counts are set to what readers trip over, pieces are doubled, cut out, moved, and spliced
with those of another input. No coverage is measured; corpora are small and every kind of field is in them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

#: What stands where a length or a head is read.
_TELLING: Final = (
    0, 1, 2, 0x7F, 0x80, 0xC0, 0xC1, 0xC4, 0xC6, 0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFE, 0xFF,
)  # fmt: skip
_LENGTHS: Final = (0, 1, 0x7F, 0xFF, 0x100, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def inputs(corpus: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """The corpus itself, then damaged without end."""
    yield from corpus
    chance = random.Random(seed)
    while True:
        data = bytearray(chance.choice(corpus))
        for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
            chance.choice(_WAYS)(data, chance, corpus)
        yield bytes(data)


def _at(data: bytearray, chance: random.Random) -> int:
    return chance.randrange(len(data)) if data else 0


def _flip(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if data:
        data[_at(data, chance)] ^= 1 << chance.randrange(8)


def _tell(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if data:
        data[_at(data, chance)] = chance.choice(_TELLING)


def _length(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    size = chance.choice((2, 4))
    at = _at(data, chance)
    data[at : at + size] = (chance.choice(_LENGTHS) & ((1 << 8 * size) - 1)).to_bytes(size, "big")


def _cut(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    del data[_at(data, chance) :]


def _drop(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    at = _at(data, chance)
    del data[at : at + chance.choice((1, 2, 4, 16, 64))]


def _double(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    at = _at(data, chance)
    piece = data[at : at + chance.choice((1, 4, 16, 64))]
    data[at:at] = piece * chance.choice((1, 1, 2, 500))


def _splice(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    other = chance.choice(corpus)
    if other:
        start = chance.randrange(len(other))
        data[_at(data, chance) :] = other[start : start + chance.choice((4, 64, 4096))]


def _noise(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    at = _at(data, chance)
    data[at:at] = chance.randbytes(chance.choice((1, 4, 32)))


_WAYS: Final = (_flip, _tell, _tell, _length, _length, _cut, _drop, _double, _splice, _noise)
