"""What is compared of two QEMUs before anything moves, and what speaks against moving one. Pure: texts in, reasons out.

Facts travel as options of the machine's vCPU in the manifest, so everything here may have been written by a hostile peer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from migrate.errors import Phase, Reason

#: From this release on guest CPU writes are not lost under TCG ("physmem: Fix migration dirty bitmap coherency with TCG memory
#: access", for 9.0); before it they are where RAM is a multiple of GRAIN (reference/vhost-user-blk-on-qemu.md, T1).
COHERENT: Final = (9, 0)
GRAIN: Final = 256 << 10
#: What a migration through us needs of QEMU.
NEEDED: Final = ("return-path", "pause-before-switchover", "events")
#: Switched on where QEMU has it: it then takes locks of its own images at `cont` and not before.
WANTED: Final = ("late-block-activate",)
_VERSION: Final = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})")
_FUNCTION: Final = "pci."


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one QEMU. The first group must be the same on both sides."""

    machine: str
    ram: int
    cpus: int
    cpu: str
    pci: Mapping[str, str]
    state: str  #: "ferry" or "qemu": by whom devices' states go
    version: str
    accel: str
    vmstate: bool = False  #: whether it has a dbus-vmstate, which carries every helper on its bus
    backend: str = ""  #: id of the memory's object, which the destination's must have
    blocked: tuple[str, ...] = ()
    capabilities: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def from_qemu(cls, raw: Mapping[str, Any]) -> Facts:
        """From the participant that shows QEMU (org.vmferry.Qemu1)."""
        return cls(
            str(raw["machine"]),
            int(raw["ram"]),
            int(raw["cpus"]),
            str(raw["cpu"]),
            dict(raw["pci"]),
            str(raw["state"]),
            str(raw["version"]),
            str(raw["accel"]),
            bool(raw["vmstate"]),
            str(raw["backend"]),
            tuple(map(str, raw["blocked"])),
            frozenset(map(str, raw["capabilities"])),
        )

    def to_options(self) -> dict[str, str]:
        """As they travel."""
        same = {
            "machine": self.machine,
            "ram": str(self.ram),
            "cpus": str(self.cpus),
            "cpu": self.cpu,
            "state": self.state,
            "qemu": self.version,
            "accel": self.accel,
            "backend": self.backend,
        }
        return same | {_FUNCTION + where: what for where, what in self.pci.items()}

    @property
    def release(self) -> tuple[int, int]:
        match = _VERSION.match(self.version)
        return (int(match[1]), int(match[2])) if match else (0, 0)


def _reason(text: str, remedy: str, device: str) -> Reason:
    return Reason(device, str(Phase.PREFLIGHT), text, remedy)


def against(facts: Facts, device: str) -> list[Reason]:
    """What keeps this QEMU from being moved by us, whatever is at the other side."""
    reasons = [
        _reason(
            f"QEMU refuses to migrate: {why}",
            "remove that device from the guest, or end what blocks it",
            device,
        )
        for why in facts.blocked
    ]
    if facts.accel == "tcg" and facts.release < COHERENT and facts.ram % GRAIN == 0:
        reasons.append(
            _reason(
                f"QEMU {facts.version} under TCG loses writes of the guest while it migrates RAM of a multiple of 256 KiB "
                f"({facts.ram >> 10}K)",
                f"give the guest a little less, such as {(facts.ram >> 10) + 8}K; or use KVM, or QEMU 9.0",
                device,
            )
        )
    if facts.vmstate != (facts.state == "qemu"):
        has, way = ("has a", "qemu") if facts.vmstate else ("has no", "ferry")
        reasons.append(
            _reason(
                f"QEMU {has} dbus-vmstate of its own, and the states of its devices are to go by {facts.state}",
                f'say state = "{way}" (`ferry adopt --state {way}`), on both hosts',
                device,
            )
        )
    if missing := [name for name in NEEDED if name not in facts.capabilities]:
        reasons.append(
            _reason(f"QEMU {facts.version} lacks {', '.join(missing)}", "use QEMU 4.0 or later", device)
        )
    return reasons


def differences(source: Mapping[str, str], here: Facts, device: str) -> list[Reason]:
    """Every difference that would make QEMU refuse what it is sent, or the guest see another machine.

    :param source: as the source's facts travelled.
    """
    mine = here.to_options()
    reasons = []
    for key, what in (
        ("machine", "machine type"),
        ("ram", "memory size in bytes"),
        ("cpus", "number of processors"),
        ("cpu", "processor model"),
        ("state", "way of devices' states"),
    ):
        if source.get(key) != mine[key]:
            reasons.append(
                _reason(
                    f"the source's {what} is {source.get(key, 'unknown')[:64]}, the destination's QEMU has {mine[key]}",
                    "mend `command` in the [qemu] table of host.toml there",
                    device,
                )
            )
    functions = {key: value for key, value in source.items() if key.startswith(_FUNCTION)}
    for key in sorted({*functions, *(key for key in mine if key.startswith(_FUNCTION))}):
        if functions.get(key) != mine.get(key):
            there, own = functions.get(key, "nothing")[:16], mine.get(key, "nothing")
            reasons.append(
                _reason(
                    f"at PCI address {key[len(_FUNCTION) :][:16]} the source has {there}, the destination's QEMU {own}",
                    "both sides need the same devices at the same addresses",
                    device,
                )
            )
    return reasons


def is_older(source: Mapping[str, str], here: Facts) -> str | None:
    """A warning where the destination's QEMU is older than the source's: QEMU promises nothing then."""
    match = _VERSION.match(source.get("qemu", ""))
    if match and (int(match[1]), int(match[2])) > here.release:
        return f"the destination's QEMU {here.version} is older than the source's {match[0]}"
    return None
