"""The PCI function as the guest sees it: its BARs as regions, and its configuration space. PCI Local Bus 3.0, 6.1 and 6.2.5.

An access to a BAR goes to QEMU by an address in QEMU's own memory, so every BAR has a place there that is the bridge's choice and
that QEMU always decodes. What the guest writes into BARs, and whether it has them decoded, is kept here and given back to it: it is
state, and goes in the blob. All else of the configuration space is QEMU's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from devices.protocols.mpqemu.client import Client
from migrate.errors import DeviceRefused, Phase

_COMMAND, _STATUS, _CACHE_LINE, _BARS, _ROM, _INTERRUPT_LINE = 0x04, 0x06, 0x0C, 0x10, 0x30, 0x3C
_DECODE: Final = 0x3  # ports and memory
_INTERRUPT: Final = 0x0008
_PORTS, _WIDE, _LOW_FLAGS, _PORT_FLAGS = 0x1, 0x4, 0xF, 0x3
BARS: Final = 6
CONFIG_SIZE: Final = 256
#: Where BARs are in QEMU: ports, memory below 4 GiB and above. Guest memory may not be there.
_PORT_SPACE: Final = range(0xC000, 0x1_0000)
MEMORY_SPACE: Final = range(0xE000_0000, 0xFEC0_0000)
WIDE_SPACE: Final = range(1 << 56, 1 << 57)

#: Of controllers whose saved state lacks what they are in the midst of: BAR, offset and bit that say that they are connected to a
#: target. SCNTL1.CON of the LSI 53C895A (LSI's manual, 4.3) and 53C810; QEMU 7.2 saves neither the target nor the request.
_CONNECTED: Final[Mapping[tuple[int, int], tuple[int, int, int]]] = {
    (0x1000, 0x0012): (1, 0x01, 0x10),
    (0x1000, 0x0001): (1, 0x01, 0x10),
}


class Remote(Protocol):
    """Whoever has the connection to QEMU, which may be another one from one time to the next."""

    device: str

    @property
    def client(self) -> Client: ...


class Bar(NamedTuple):
    """`size` is 0 where there is none, and for the upper half of one of 64 bits. `flags` are its low bits, which say its kind."""

    size: int = 0
    flags: int = 0
    place: int = 0

    @property
    def ports(self) -> bool:
        return bool(self.flags & _PORTS)


class Function:
    def __init__(self, remote: Remote) -> None:
        """Learns the BARs' sizes from a QEMU that stands still, or waits. :raise DeviceError: it has some that do not fit."""
        self._remote = remote
        client = remote.client
        self.vendor = client.config_read(0, 2)
        self.device = client.config_read(2, 2)
        self.revision = client.config_read(8, 1)
        self.class_code = client.config_read(8, 4) >> 8
        self.bars = self._probe()
        self._written = [0] * BARS
        self._decode = 0
        self.place()

    # -- BARs ---------------------------------------------------------------------------------------------------------------

    def _probe(self) -> list[Bar]:
        free = {space.start: space.start for space in (_PORT_SPACE, MEMORY_SPACE, WIDE_SPACE)}
        bars: list[Bar] = []
        while len(bars) < BARS:
            number = len(bars)
            low = self._size_of(number)
            if not low:
                bars.append(Bar())
                continue
            ports, wide = bool(low & _PORTS), not low & _PORTS and bool(low & _WIDE)
            mask = low & ~(_PORT_FLAGS if ports else _LOW_FLAGS) & 0xFFFF_FFFF
            if ports:
                mask |= 0xFFFF_0000  # QEMU's ports have 16 bits
            if wide and number + 1 < BARS:
                mask |= self._size_of(number + 1) << 32
                size = -mask & (1 << 64) - 1
            else:
                size = -mask & (1 << 32) - 1
            space = _PORT_SPACE if ports else WIDE_SPACE if wide else MEMORY_SPACE
            place = -(-free[space.start] // size) * size
            if place + size > space.stop:
                raise DeviceRefused(
                    f"its BAR {number} has {size} bytes, for which there is no room",
                    device=self._remote.device,
                    phase=Phase.SETUP,
                    remedy="this function does not fit behind the bridge",
                )
            free[space.start] = place + size
            bars.append(Bar(size, low & (_PORT_FLAGS if ports else _LOW_FLAGS), place))
            if wide and len(bars) < BARS:
                bars.append(Bar())
        return bars

    def _size_of(self, number: int) -> int:
        client, offset = self._remote.client, _BARS + 4 * number
        client.config_write(offset, 4, 0xFFFF_FFFF)
        return client.config_read(offset, 4)

    def place(self) -> None:
        """Have a QEMU that is new, was reset, or has loaded a state decode the BARs where we look for them."""
        client = self._remote.client
        for number, bar in enumerate(self.bars):
            if bar.size:
                client.config_write(_BARS + 4 * number, 4, bar.place & 0xFFFF_FFFF)
                if bar.flags & _WIDE and not bar.ports:
                    client.config_write(_BARS + 4 * number + 4, 4, bar.place >> 32)
        client.config_write(_COMMAND, 2, client.config_read(_COMMAND, 2) | _DECODE)

    def read(self, number: int, offset: int, size: int) -> int:
        bar = self.bars[number]
        return self._remote.client.bar_read(bar.place + offset, size, memory=not bar.ports)

    def write(self, number: int, offset: int, size: int, value: int) -> None:
        bar = self.bars[number]
        self._remote.client.bar_write(bar.place + offset, size, value, memory=not bar.ports)

    # -- configuration space --------------------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """:param size: 1, 2 or 4, aligned."""
        if offset & ~3 == _ROM:
            return 0
        if _BARS <= offset < _BARS + 4 * BARS:
            return self._shown(offset - _BARS >> 2) >> 8 * (offset & 3) & (1 << 8 * size) - 1
        value = self._remote.client.config_read(offset, size)
        return value & ~_DECODE | self._decode if offset == _COMMAND else value

    def config_write(self, offset: int, size: int, value: int) -> None:
        if offset & ~3 == _ROM:
            return
        if _BARS <= offset < _BARS + 4 * BARS:
            number, shift = offset - _BARS >> 2, 8 * (offset & 3)
            kept = self._written[number] & ~((1 << 8 * size) - 1 << shift)
            self._written[number] = kept | value << shift
            return
        if offset == _COMMAND:
            self._decode, value = value & _DECODE, value | _DECODE
        self._remote.client.config_write(offset, size, value)

    def _shown(self, number: int) -> int:
        """A BAR as the guest reads it: what it wrote, without the bits that are fixed by size and kind."""
        bar = self.bars[number]
        if bar.size:
            return self._written[number] & -bar.size & 0xFFFF_FFFF | bar.flags
        before = self.bars[number - 1] if number else bar
        if before.size and before.flags & _WIDE and not before.ports:
            return self._written[number] & (-before.size >> 32) & 0xFFFF_FFFF
        return 0

    # -- what there is to know of it ------------------------------------------------------------------------------------------

    def asserted(self) -> bool:
        """Whether its interrupt is raised (the Interrupt Status bit)."""
        return bool(self._remote.client.config_read(_STATUS, 2) & _INTERRUPT)

    def connected(self) -> bool:
        """Whether it is in the midst of something that QEMU does not save."""
        found = _CONNECTED.get((self.vendor, self.device))
        return found is not None and bool(self.read(found[0], found[1], 1) & found[2])

    def reset(self) -> None:
        """QEMU has reset the device, and not its configuration space (7.2, tried). 6.2.2 and 6.2.4 say what power-on does there."""
        client = self._remote.client
        self._written, self._decode = [0] * BARS, 0
        client.config_write(_COMMAND, 2, 0)
        for register in (_CACHE_LINE, _INTERRUPT_LINE):
            client.config_write(register, 1, 0)
        self.place()

    def identity(self) -> dict[str, object]:
        """What must be the same on both sides."""
        return {
            "vendor": self.vendor,
            "device": self.device,
            "revision": self.revision,
            "class_code": self.class_code,
            "bar_sizes": [bar.size for bar in self.bars],
        }

    def save(self) -> dict[str, object]:
        return {"bars": list(self._written), "decode": self._decode}

    def load(self, state: Mapping[str, Any]) -> None:
        bars: Sequence[int] = state["bars"]
        self._written, self._decode = list(bars), state["decode"]
        self.place()
