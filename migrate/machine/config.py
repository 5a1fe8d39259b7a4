"""machine.toml: what a machine is. Parsed once, every key known; an unknown one is an error that names the nearest.

A Machine has two readers: the supervisor of the host that starts it, and (without paths and commands: those never travel) the
manifest of a migration.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from migrate.errors import UsageError
from migrate.memory import PAGE_SIZE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
OPTION = re.compile(r"[A-Za-z0-9_.:,+-]{0,200}")
_SIZES: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

#: Where devices' windows lie in the embedded machine: one slot each, in the order of machine.toml.
WINDOW_BASE: Final = 0xD000_0000
WINDOW_SIZE: Final = 0x0100_0000
MAX_DEVICES: Final = 40
MAX_MEMORY: Final = WINDOW_BASE
MAX_QEMU_MEMORY: Final = 16 << 40
VCPU_ID: Final = "vcpu0"
#: The types of devices behind devices.bridges.vfio_user and .xremote: what they are is said by their model.
BRIDGED: Final = frozenset({"vfio-user", "x-remote"})
TRACKERS: Final = ("scan", "log", "compare")


@dataclass(frozen=True, slots=True)
class RegionConfig:
    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """One device. `options` are visible to the guest and travel; `local` (paths, back ends) and `command` never do."""

    id: str
    type: str
    protocol: str = "vfio-user"
    gpa: int = 0
    irq: int = 0
    vectors: int = 1  #: pending bits from `irq` on, one for each interrupt vector
    tracker: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    local: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ()

    @property
    def seen_as(self) -> str:
        """What the guest is told that it is: of what is behind a bridge, its model."""
        return self.options.get("model", self.type) if self.type in BRIDGED else self.type


@dataclass(frozen=True, slots=True)
class QemuConfig:
    """The VMM is QEMU: started by `command`, or found running at its monitor `qmp`. None of it travels."""

    command: Sequence[str] = ()
    qmp: str = ""
    bus: str = ""  #: of an adopted machine: where its devices' processes are
    images: Mapping[str, str] = field(default_factory=dict)  #: of an adopted machine: image by device
    backend: str = ""  #: id of the memory's object, where it arrives from another QEMU
    state: str = "ferry"  #: "ferry": devices' states go by the coordinator; "qemu": by QEMU's dbus-vmstate


@dataclass(frozen=True, slots=True)
class MachineConfig:
    name: str
    regions: Sequence[RegionConfig]
    devices: Sequence[DeviceConfig]
    guest: str = ""  #: path of the guest's image; "" is the one that vmferry ships
    cmdline: str = ""
    vcpu: bool = True
    vcpu_tracker: str = ""
    qemu: QemuConfig | None = None

    @property
    def memory_bytes(self) -> int:
        return sum(region.size for region in self.regions)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MachineConfig:
        raw = json.loads(text)
        raw["regions"] = [RegionConfig(**item) for item in raw["regions"]]
        raw["devices"] = [DeviceConfig(**item) for item in raw["devices"]]
        raw["qemu"] = QemuConfig(**raw["qemu"]) if raw.get("qemu") else None
        return cls(**raw)


def parse_size(text: object, where: str) -> int:
    """`"256M"` or a number of bytes, as bytes; whole pages.

    :raises UsageError: otherwise.
    """
    size: int | None = None
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    elif isinstance(text, str) and (match := re.fullmatch(r"(\d{1,12})([KMGT]?)i?B?", text.strip())):
        size = int(match[1]) * _SIZES.get(match[2], 1)
    if size is None or size <= 0 or size % PAGE_SIZE:
        raise UsageError(
            f"{where}: {text!r} is not a size in whole pages of {PAGE_SIZE} bytes",
            remedy='write it as "256M" or "1G"',
        )
    return size


def load(path: Path) -> MachineConfig:
    """:raises UsageError: with the key, what is wrong with it and what it could be."""
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", remedy="give the path of a machine.toml"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text", remedy="give the path of a machine.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}", remedy="mend that line") from None
    return parse(raw, str(path), path.parent)


class _Table:
    """One table of the file; every key is taken once, and what is left over is unknown."""

    def __init__(self, raw: object, where: str, known: Sequence[str]) -> None:
        if not isinstance(raw, Mapping):
            raise UsageError(f"{where} is not a table", remedy="see docs/machine-toml.md")
        self.raw: Mapping[str, Any] = raw
        self.where = where
        check_keys(raw, where, known)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.raw.get(key, default)
        if not isinstance(value, str) or "\0" in value:
            what = "is missing" if value is None else f"is {value!r}, not a text"
            raise UsageError(f"{self.where}: {key} {what}", remedy=f'write {key} = "…"')
        return value

    def number(self, key: str) -> int | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UsageError(f"{self.where}: {key} is {value!r}, not a number", remedy=f"write {key} = 1")
        return value

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        value = self.text(key, default)
        if value != default and value not in choices:
            raise UsageError(
                f"{self.where}: {key} is {value!r}{nearest(value, choices)}",
                remedy=f"one of: {', '.join(choices)}",
            )
        return value


def nearest(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, known, 1, 0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def check_keys(raw: Mapping[str, Any], where: str, known: Sequence[str]) -> None:
    """:raises UsageError: for a key that is not known, naming the nearest that is."""
    for key in raw:
        if key not in known:
            raise UsageError(
                f"{where}: unknown key {key!r}{nearest(key, known)}", remedy=f"known keys: {', '.join(known)}"
            )


def parse(raw: Mapping[str, Any], where: str, base: Path) -> MachineConfig:
    """:param base: what relative paths in the file are relative to."""
    check_keys(raw, where, ("machine", "memory", "vcpu", "qemu", "device"))
    machine = _Table(raw.get("machine", {}), f"{where}: [machine]", ("name", "memory"))
    name = machine.text("name")
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{where}: the name {name!r} is not one", remedy="letters, digits, '_', '.' and '-', at most 63"
        )
    qemu = _qemu(raw, where)
    regions = _regions(raw, machine, where, qemu)
    vcpu = _Table(raw.get("vcpu", {}), f"{where}: [vcpu]", ("guest", "cmdline", "tracker"))
    guest = vcpu.text("guest", "")
    devices = [
        _device(item, f"{where}: [[device]] number {number}", number, base, qemu)
        for number, item in enumerate(_tables(raw, "device", where), 1)
    ]
    _check_devices(devices, where)
    return MachineConfig(
        name=name,
        regions=regions,
        devices=devices,
        guest=str((base / guest).resolve()) if guest else "",
        cmdline=vcpu.text("cmdline", ""),
        vcpu="vcpu" in raw or qemu is not None,
        vcpu_tracker=vcpu.choice("tracker", TRACKERS, ""),
        qemu=qemu,
    )


def _qemu(raw: Mapping[str, Any], where: str) -> QemuConfig | None:
    if "qemu" not in raw:
        return None
    if "vcpu" in raw:
        raise UsageError(f"{where}: both [vcpu] and [qemu]", remedy="keep the one that is its VMM")
    where += ": [qemu]"
    if not isinstance(raw["qemu"], Mapping) or "qmp" not in raw["qemu"]:
        return qemu_table(raw["qemu"], where)
    table = _Table(raw["qemu"], where, ("qmp", "bus", "images", "state"))
    images = table.raw.get("images", {})
    if not isinstance(images, Mapping) or not all(isinstance(path, str) for path in images.values()):
        raise UsageError(
            f"{where}: images is not a table of paths", remedy='write images = { disk0 = "/path" }'
        )
    if raw.get("device") or "memory" in raw:
        raise UsageError(
            f"{where}: a QEMU that runs has its devices and its memory already",
            remedy="leave out [[device]] and [[memory]]: devices are those on its bus",
        )
    return QemuConfig(
        qmp=table.text("qmp"),
        bus=table.text("bus"),
        images=dict(images),
        state=table.choice("state", ("ferry", "qemu"), "ferry"),
    )


def qemu_table(raw: object, where: str) -> QemuConfig:
    """`command` and `state`, as machine.toml and host.toml have them. :raises UsageError:"""
    table = _Table(raw, where, ("command", "state"))
    return QemuConfig(
        command=words(table.raw.get("command"), f"{where}: command"),
        state=table.choice("state", ("ferry", "qemu"), "ferry"),
    )


def words(value: object, where: str) -> tuple[str, ...]:
    """A command as a list of texts, not empty. :raises UsageError:"""
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        raise UsageError(f"{where} is not a list of texts", remedy='write command = ["program", "word", …]')
    return tuple(value)


def _tables(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = raw.get(key, [])
    if not isinstance(value, list):
        raise UsageError(
            f"{where}: {key} is not a list of tables", remedy=f"write [[{key}]] before each of them"
        )
    return value


def _regions(
    raw: Mapping[str, Any], machine: _Table, where: str, qemu: QemuConfig | None
) -> list[RegionConfig]:
    listed = raw.get("memory")
    if listed is None:
        regions = [RegionConfig(0, parse_size(machine.raw.get("memory", "256M"), f"{where}: memory"))]
    elif "memory" in machine.raw:
        raise UsageError(f"{where}: both memory = … and [[memory]]", remedy="keep one of them")
    else:
        regions = []
        for number, item in enumerate(_tables(raw, "memory", where), 1):
            table = _Table(item, f"{where}: [[memory]] number {number}", ("gpa", "size"))
            regions.append(
                RegionConfig(table.number("gpa") or 0, parse_size(table.raw.get("size"), table.where))
            )
    check_regions(regions, where, qemu=qemu is not None)
    return sorted(regions, key=lambda region: region.gpa)


def check_regions(regions: Sequence[RegionConfig], where: str, *, qemu: bool = False) -> None:
    """:param qemu: the memory is one region, which QEMU places in the guest's address space as it likes.
    :raises UsageError: unless there is memory, in whole pages, that overlaps neither itself nor the devices' windows."""
    end = 0
    if qemu and (len(regions) != 1 or regions[0].gpa or not 0 < regions[0].size <= MAX_QEMU_MEMORY):
        raise UsageError(
            f"{where}: the memory of a QEMU guest is one size", remedy='write memory = "1G" under [machine]'
        )
    if not regions:
        raise UsageError(f"{where}: no memory", remedy='write memory = "256M" under [machine]')
    for region in sorted(regions, key=lambda region: region.gpa):
        if region.gpa % PAGE_SIZE or region.size % PAGE_SIZE or region.size <= 0:
            raise UsageError(
                f"{where}: the region at {region.gpa:#x} is not made of whole pages", remedy="mend it"
            )
        if region.gpa < end:
            raise UsageError(
                f"{where}: the region at {region.gpa:#x} overlaps the one before it", remedy="move it"
            )
        end = region.gpa + region.size
    if end > MAX_MEMORY and not qemu:
        raise UsageError(
            f"{where}: memory reaches {end:#x}, where devices' windows begin at {MAX_MEMORY:#x}",
            remedy="the embedded machine has at most 3.25 GiB",
        )


def _device(raw: object, where: str, number: int, base: Path, qemu: QemuConfig | None = None) -> DeviceConfig:
    local = ("output", "input", "image", "peer", "server")
    table = _Table(
        raw, where, ("id", "type", "protocol", "command", "tracker", "irq", "vectors", "options", *local)
    )  # fmt: skip
    command = table.raw.get("command", [])
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise UsageError(
            f"{where}: command is not a list of texts", remedy='write command = ["python3", "my.py"]'
        )
    options = table.raw.get("options", {})
    if not isinstance(options, Mapping):
        raise UsageError(f"{where}: options is not a table", remedy='write options = { vram = "64M" }')
    irq = table.number("irq")
    vectors = table.number("vectors")
    return DeviceConfig(
        id=table.text("id"),
        type=table.text("type"),
        protocol=_protocol(table, qemu),
        gpa=WINDOW_BASE + (number - 1) * WINDOW_SIZE,
        irq=number if irq is None else irq,
        vectors=1 if vectors is None else vectors,
        tracker=table.choice("tracker", TRACKERS, ""),
        options={key: str(value) for key, value in options.items()},
        local={key: str((base / table.text(key)).resolve()) for key in local if key in table.raw},
        command=tuple(command),
    )


def _protocol(table: _Table, qemu: QemuConfig | None) -> str:
    """What speaks to the device: by default what its type and the machine's VMM have in common."""
    if qemu is None:
        return table.choice("protocol", ("vfio-user",), "vfio-user")
    if table.raw.get("protocol") == "vfio-user":
        raise UsageError(
            f"{table.where}: QEMU does not migrate with devices behind vfio-user",
            remedy="use vhost-user-blk or vhost-user-net, or the embedded VMM ([vcpu]); "
            'protocol = "mpqemu" runs, and is not moved either',
        )
    kind = table.text("type")
    default = "vhost-user" if kind.startswith("vhost-user-") else "none"
    protocol = table.choice("protocol", ("vhost-user", "mpqemu", "none"), default)
    if protocol == "vhost-user" != default:
        raise UsageError(
            f"{table.where}: no {kind} of a machine is behind vhost-user",
            remedy='a disk there is type = "vhost-user-blk", a network function "vhost-user-net"',
        )
    return protocol


def _check_devices(devices: Sequence[DeviceConfig], where: str) -> None:
    if len(devices) > MAX_DEVICES:
        raise UsageError(f"{where}: {len(devices)} devices, at most {MAX_DEVICES}", remedy="remove some")
    ids: set[str] = {VCPU_ID}
    irqs: dict[int, str] = {}
    for device in devices:
        if not NAME.fullmatch(device.id):
            raise UsageError(
                f"{where}: the device id {device.id!r} is not one", remedy="letters, digits, '_', '.', '-'"
            )
        if device.id in ids:
            raise UsageError(
                f"{where}: two participants are called {device.id!r}", remedy="give each its own id"
            )
        if not NAME.fullmatch(device.type):
            raise UsageError(
                f"{where}: {device.id}: the type {device.type!r} is not one", remedy="name a schema"
            )
        lines = range(device.irq, device.irq + device.vectors)
        within = bool(lines) and lines[0] >= 1 and lines[-1] <= 63
        taken = next((irqs[line] for line in lines if line in irqs), "") if within else ""
        if not within or taken:
            raise UsageError(
                f"{where}: {device.id}: its interrupts {device.irq} to {device.irq + device.vectors - 1} are "
                + (f"partly {taken}'s" if taken else "not within 1 to 63"),
                remedy="choose another irq",
            )
        for key, value in device.options.items():
            if not NAME.fullmatch(key) or not OPTION.fullmatch(value):
                raise UsageError(
                    f"{where}: {device.id}: the option {key} = {value!r} has characters that may not travel",
                    remedy="options are seen by the guest and travel; paths have keys of their own (output, image)",
                )
        ids.add(device.id)
        irqs.update(dict.fromkeys(lines, device.id))
