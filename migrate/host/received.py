"""The machine that a coordinator asks for, read back from JSON and checked: what came over the network is in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from migrate.errors import Phase, UsageError
from migrate.machine.config import (
    MAX_DEVICES,
    NAME,
    OPTION,
    DeviceConfig,
    MachineConfig,
    QemuConfig,
    RegionConfig,
    check_regions,
)
from migrate.machine.hostconfig import HostConfig

MAX_REGIONS = 64
_WHERE = "the manifest"


def machine_of(raw: object, host: HostConfig) -> MachineConfig:
    """The machine, with no command in it, and no path but of images where this host keeps them.

    :raises UsageError: if it is not one.
    """
    if not isinstance(raw, Mapping) or not _is_name(raw.get("name")):
        raise _bad("names no machine")
    regions = raw.get("regions")
    if not isinstance(regions, list) or not 0 < len(regions) <= MAX_REGIONS:
        raise _bad("has no memory")
    devices = raw.get("devices")
    if not isinstance(devices, list) or len(devices) > MAX_DEVICES:
        raise _bad(f"has no list of at most {MAX_DEVICES} devices")
    memory = [RegionConfig(_number(item, "gpa"), _number(item, "size")) for item in regions]
    qemu = _qemu(raw, host)
    check_regions(memory, _WHERE, qemu=qemu is not None)
    members = [_device(item, host) for item in devices]
    if len({member.id for member in members}) != len(members):
        raise _bad("has two devices with one id")
    return MachineConfig(str(raw["name"]), memory, members, vcpu=raw.get("vcpu") is True, qemu=qemu)


def _qemu(raw: Mapping[str, Any], host: HostConfig) -> QemuConfig | None:
    """How this host starts it; of what came, only what the memory's object is called."""
    given = raw.get("qemu")
    if not isinstance(given, Mapping):
        return None
    backend: Any = given.get("backend")
    return replace(host.qemu_of(str(raw["name"])), backend=backend if _is_name(backend) else "")


def _device(raw: object, host: HostConfig) -> DeviceConfig:
    if not isinstance(raw, Mapping) or not all(_is_name(raw.get(key)) for key in ("id", "type", "protocol")):
        raise _bad("has a device without id, type or protocol")
    options = raw.get("options", {})
    if not isinstance(options, Mapping) or not all(
        _is_name(key) and isinstance(value, str) and OPTION.fullmatch(value) for key, value in options.items()
    ):
        raise _bad(f"has options of {raw['id']} that may not travel")
    return DeviceConfig(
        raw["id"],
        raw["type"],
        raw["protocol"],
        gpa=_number(raw, "gpa"),
        irq=_number(raw, "irq"),
        vectors=_number(raw, "vectors"),
        tracker="compare" if raw.get("tracker") == "compare" else "",
        options=dict(options),
        local=_images(raw.get("local", {}), host),
    )


def _images(raw: object, host: HostConfig) -> dict[str, str]:
    if not isinstance(raw, Mapping):
        raise _bad("has images that are none")
    found = {}
    for option, path in raw.items():
        if option != "image" or not isinstance(path, str) or str(host.image(os.path.basename(path))) != path:
            raise _bad(f"names a file of this host that is no image ({option})")
        found[option] = path
    return found


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _number(raw: object, key: str) -> int:
    value: Any = raw.get(key) if isinstance(raw, Mapping) else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise _bad(f"has a {key} that is no number")
    return value


def _bad(what: str) -> UsageError:
    return UsageError(
        f"{_WHERE} {what}",
        phase=Phase.PREFLIGHT,
        remedy="check that both hosts run the same version of vmferry",
    )
