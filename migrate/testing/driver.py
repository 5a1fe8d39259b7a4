"""What `assert_migratable` asks of the guest's side of a device, and the steps of traffic. How it is reached is a driver's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Final, Protocol

from migrate.errors import UsageError

#: Drivers by name: packages announce theirs under this group of entry points.
GROUP: Final = "vmferry.drivers"


class Driver(Protocol):
    """One connection to one device process."""

    def read(self, region: int, offset: int, size: int) -> int: ...
    def write(self, region: int, offset: int, size: int, value: int) -> None: ...
    def interrupts(self) -> Mapping[tuple[int, int], int]:
        """What was raised since the last time this was asked, and how often."""

    def close(self) -> None: ...


#: Makes a driver: the device's socket, and guest address, size and descriptor of each region of memory.
MakeDriver = Callable[[str, Sequence[tuple[int, int, int]]], Driver]


@dataclass(frozen=True, slots=True)
class Read:
    offset: int
    size: int = 8
    region: int = 0


@dataclass(frozen=True, slots=True)
class Write:
    offset: int
    value: int
    size: int = 8
    region: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """The guest writes to its own memory."""

    gpa: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    """The device has so long to do something by itself."""

    seconds: float


Step = Read | Write | Memory | Wait


def driver(name: str) -> MakeDriver:
    """:raise UsageError: no installed package has it."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise UsageError(
            f"no driver {name!r} is installed: {', '.join(sorted(found)) or 'there is none'}",
            remedy="give one as `driver`",
        )
    made: MakeDriver = found[name].load()
    return made


def random_traffic(registers: Sequence[Read], seed: int, steps: int = 60) -> list[Step]:
    """Accesses to these registers, as many writes as reads, and some time in between: the same for the same seed."""
    chance = random.Random(seed)
    made: list[Step] = []
    for _ in range(steps):
        register = chance.choice(registers)
        if chance.random() < 0.5:
            made.append(register)
        else:
            bits = chance.choice((1, 4, 8 * register.size))
            made.append(Write(register.offset, chance.getrandbits(bits), register.size, register.region))
        if chance.random() < 0.1:
            made.append(Wait(0.005))
    return made
