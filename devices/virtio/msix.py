"""MSI-X: the table of vectors that a guest masks, and the pending bits beneath it. PCI Local Bus 3.0, §6.8.2.

What a vector's message is (address, data) concerns the VMM alone: here a vector fires an eventfd. A VMM that keeps the table
to itself, as QEMU does, must write it here as well, or every vector stays masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

ENTRY: Final = 16
NO_VECTOR: Final = 0xFFFF
#: Bits of the capability's message control.
ENABLE, FUNCTION_MASK = 0x8000, 0x4000
_MASKED: Final = 1


@dataclass(slots=True)
class _Vector:
    address: int = 0
    data: int = 0
    masked: bool = True
    pending: bool = False


class Msix:
    """`fire(number)` is called for each message that leaves the device."""

    def __init__(self, count: int, fire: Callable[[int], None]) -> None:
        self._fire = fire
        self._count = count
        self.reset()

    def reset(self) -> None:
        self.enabled = False
        self.masked = False
        self._vectors = [_Vector() for _ in range(self._count)]

    @property
    def control(self) -> int:
        """Message control, as the capability has it."""
        return self._count - 1 | (ENABLE if self.enabled else 0) | (FUNCTION_MASK if self.masked else 0)

    @control.setter
    def control(self, value: int) -> None:
        self.enabled, self.masked = bool(value & ENABLE), bool(value & FUNCTION_MASK)
        self._deliver()

    def has(self, number: int) -> bool:
        return number < self._count

    def raise_(self, number: int) -> None:
        """Vector `number`, unless MSI-X is off or there is none of that number."""
        if self.enabled and number < self._count:
            self._vectors[number].pending = True
            self._deliver()

    def _deliver(self) -> None:
        if self.enabled and not self.masked:
            for number, vector in enumerate(self._vectors):
                if vector.pending and not vector.masked:
                    vector.pending = False
                    self._fire(number)

    # -- the table and the pending bits, as they lie in a BAR -----------------------------------------------------------------

    def table(self) -> bytes:
        return b"".join(
            vector.address.to_bytes(8, "little")
            + vector.data.to_bytes(4, "little")
            + (_MASKED if vector.masked else 0).to_bytes(4, "little")
            for vector in self._vectors
        )

    def pending(self) -> bytes:
        bits = sum(vector.pending << number for number, vector in enumerate(self._vectors))
        return bits.to_bytes(-(-self._count // 64) * 8, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A store into the table: 4 or 8 bytes, aligned; others are not possible and change nothing."""
        if size == 8:
            self.write(offset, 4, value & 0xFFFF_FFFF)
            self.write(offset + 4, 4, value >> 32)
            return
        number, field = divmod(offset, ENTRY)
        if size != 4 or field % 4 or number >= self._count:
            return
        vector = self._vectors[number]
        match field:
            case 0:
                vector.address = vector.address & ~0xFFFF_FFFF | value & ~3
            case 4:
                vector.address = vector.address & 0xFFFF_FFFF | value << 32
            case 8:
                vector.data = value
            case _:
                vector.masked = bool(value & _MASKED)
                self._deliver()

    # -- state ----------------------------------------------------------------------------------------------------------------

    def save(self, waiting: Sequence[bool]) -> list[dict[str, object]]:
        """:param waiting: vectors that were fired and that nobody was told of yet."""
        return [
            {
                "address": vector.address,
                "data": vector.data,
                "masked": vector.masked,
                "pending": vector.pending or untold,
            }
            for vector, untold in zip(self._vectors, waiting, strict=True)
        ]

    def load(self, vectors: Sequence[Mapping[str, Any]], *, enabled: bool, masked: bool) -> None:
        self._vectors = [_Vector(**vector) for vector in vectors]
        self.enabled, self.masked = enabled, masked
        self._deliver()
