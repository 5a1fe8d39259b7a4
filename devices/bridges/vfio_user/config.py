"""The configuration space of a PCI function behind a server that knows nothing of ours. It is not in MIG_DATA: with VFIO it is the
VMM's to carry (QEMU's vfio-pci does), so here it is the bridge's. PCI Local Bus 3.0, 6.1 and 6.7; PCI Express 2.0, 7.8.

Two spaces are of one function if everything that says what it is and where its registers are is the same; then the registers that
a guest writes are put back, one by one, the command register last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final, NamedTuple

#: Bytes that are carried: the conventional space, which has all that is written here.
SIZE: Final = 256
_COMMAND, _STATUS, _HEADER_TYPE, _CAPABILITIES = 0x04, 0x06, 0x0E, 0x34
_HAS_CAPABILITIES: Final = 0x10
#: What says which function it is: name, offset, bytes.
_IDENTITY: Final = (
    ("vendor", 0x00, 2), ("device", 0x02, 2), ("revision and class", 0x08, 4), ("header type", _HEADER_TYPE, 1),
    ("subsystem", 0x2C, 4), ("interrupt pin", 0x3D, 1),
)  # fmt: skip
_MSI_WIDE, _MSI_MASKS = 0x0080, 0x0100


class Register(NamedTuple):
    offset: int
    size: int


def of_one_function(ours: bytes, theirs: bytes) -> list[str]:
    """What differs of that which must not; nothing where they are of one function."""
    wrong = [
        f"{name} {_at(theirs, offset, size):#x} where this one has {_at(ours, offset, size):#x}"
        for name, offset, size in _IDENTITY
        if ours[offset : offset + size] != theirs[offset : offset + size]
    ]
    return wrong or ([] if _capabilities(ours) == _capabilities(theirs) else ["its list of capabilities"])


def registers(config: bytes) -> Iterator[Register]:
    """Those that a guest writes, in the order in which they are put back.

    :param config: of the function that they are put back to; nothing is written where that has no register.
    """
    yield Register(0x0C, 1)  # cache line size
    yield Register(0x0D, 1)  # latency timer
    for bar in range(0x10, 0x28, 4):
        yield Register(bar, 4)
    yield Register(0x30, 4)  # the ROM's address
    yield Register(0x3C, 1)  # interrupt line
    for offset, identity in _capabilities(config):
        match identity:
            case 0x01:  # power management: its state
                yield Register(offset + 4, 2)
            case 0x10:  # PCI Express: device and link control, and the second of each
                for control in (0x08, 0x10, 0x28, 0x30):
                    yield Register(offset + control, 2)
            case 0x05:  # MSI
                yield from _msi(offset, _at(config, offset + 2, 2))
            case 0x11:  # MSI-X: whether it is on
                yield Register(offset + 2, 2)
    yield Register(_COMMAND, 2)


def _msi(offset: int, control: int) -> Iterator[Register]:
    """Where to and what, before it is on."""
    wide = 4 if control & _MSI_WIDE else 0
    yield Register(offset + 4, 4)
    if wide:
        yield Register(offset + 8, 4)
    yield Register(offset + 8 + wide, 2)
    if control & _MSI_MASKS:
        yield Register(offset + 12 + wide, 4)
    yield Register(offset + 2, 2)


def _capabilities(config: bytes) -> list[tuple[int, int]]:
    """Offset and identity of each; a chain that runs in circles ends where it would begin again."""
    found: list[tuple[int, int]] = []
    if not _at(config, _STATUS, 2) & _HAS_CAPABILITIES:
        return found
    at = config[_CAPABILITIES] & 0xFC
    for _ in itertools.repeat(None, SIZE // 4):
        if at < 0x40 or any(at == seen for seen, _ in found):
            break
        found.append((at, config[at]))
        at = config[at + 1] & 0xFC
    return found


def value(config: bytes, register: Register) -> bytes:
    return config[register.offset : register.offset + register.size]


def _at(config: bytes, offset: int, size: int) -> int:
    return int.from_bytes(config[offset : offset + size], "little")
