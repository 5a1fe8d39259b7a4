"""The platform file: what the supervisor tells the vCPU process about the machine. JSON, read once at start.

{"devices": [{"id": "uart0", "type": "uart16550", "socket": "/run/…", "gpa": 3489660928, "irq": 0, "vectors": 1}, …],
 "guest": "/path/guest.bin" or null, "cmdline": "dirty=64", "entry_gpa": 1048576}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from devices.vcpu import platform_page
from migrate.errors import Phase, UsageError

#: The largest window that a device gets. Of a PCI function it begins with BAR 0, and here has its configuration space.
WINDOW_SIZE: Final = 0x0100_0000
CONFIG_OFFSET: Final = 0x00F0_0000
DEFAULT_ENTRY: Final = 0x10_0000
#: Our own guest, which travels with the package.
BUILT_IN_GUEST: Final = Path(__file__).parent / "guest" / "guest.bin"

_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "id": (str,),
    "type": (str,),
    "socket": (str,),
    "gpa": (int,),
    "irq": (int,),
    "vectors": (int,),
    "devices": (list,),
    "guest": (str, type(None)),
    "cmdline": (str,),
    "entry_gpa": (int,),
}


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One device: where its process listens (vfio-user), where the guest sees it, which interrupt lines are its."""

    id: str
    type: str
    socket: str
    gpa: int
    irq: int
    #: Lines from `irq` on: one a MSI-X vector of a PCI function.
    vectors: int = 1

    @property
    def lines(self) -> range:
        return range(self.irq, self.irq + self.vectors)


@dataclass(frozen=True, slots=True)
class PlatformFile:
    devices: tuple[DeviceEntry, ...]
    #: The program put into memory at a cold start; None for the one that comes with vmferry.
    guest: Path | None = None
    cmdline: str = ""
    #: Where it goes and where execution begins.
    entry_gpa: int = DEFAULT_ENTRY

    def __post_init__(self) -> None:
        seen: dict[tuple[str, object], str] = {}
        for device in self.devices:
            if device.irq < 0 or device.vectors < 1 or device.lines.stop > platform_page.LINES:
                raise _wrong(
                    f"{device.id} has irq {device.irq}, vectors {device.vectors}; there are {platform_page.LINES} lines"
                )
            if device.gpa % WINDOW_SIZE or device.gpa < 0 or _overlaps_platform_page(device.gpa):
                raise _wrong(f"{device.id} has gpa {device.gpa:#x}: not a free multiple of {WINDOW_SIZE:#x}")
            lines = [("irq", line) for line in device.lines]
            for what, value in (("id", device.id), ("gpa", device.gpa), *lines):
                other = seen.setdefault((what, value), device.id)
                if other is not device.id:
                    raise _wrong(f"{other} and {device.id} have the same {what}, {value}")

    @classmethod
    def read(cls, path: Path) -> PlatformFile:
        """:raise UsageError: it cannot be read, or is not what the module's first lines say."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _wrong(f"{path}: {error}") from None
        fields = _fields(
            content, "the file", required={"devices"}, optional={"guest", "cmdline", "entry_gpa"}
        )
        required = {"id", "type", "socket", "gpa", "irq"}
        devices = tuple(
            DeviceEntry(**_fields(entry, f"devices[{index}]", required=required, optional={"vectors"}))
            for index, entry in enumerate(fields["devices"])
        )
        guest = fields.get("guest")
        return cls(
            devices,
            Path(guest) if guest is not None else None,
            fields.get("cmdline", ""),
            fields.get("entry_gpa", DEFAULT_ENTRY),
        )


def _overlaps_platform_page(gpa: int) -> bool:
    return platform_page.GPA - WINDOW_SIZE < gpa < platform_page.GPA + platform_page.SIZE


def _fields(value: object, where: str, *, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(f"{where} is not an object")
    if missing := required - value.keys():
        raise _wrong(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := value.keys() - required - optional:
        raise _wrong(f"{where} has {', '.join(sorted(map(repr, unknown)))}, which nobody knows")
    for name, content in value.items():
        if not isinstance(content, _TYPES[name]) or isinstance(content, bool):
            raise _wrong(f"{where}: {name} is {content!r:.60}")
    return value


def _wrong(reason: str) -> UsageError:
    return UsageError(
        f"platform file: {reason}",
        remedy="the supervisor writes it; see devices/vcpu/platform_file.py",
        phase=Phase.SETUP,
    )
