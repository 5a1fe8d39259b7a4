"""host.toml: what a host offers, and the paths of its directory. How the processes of a device type are started is decided here.

    [device.uart16550]
    command = ["python3", "-m", "devices.uart16550", "--max-version", "1"]   # instead of the registered one
    [device.display]
    available = false                                                        # this host does not have it

    [qemu.web1]
    command = ["qemu-system-x86_64", "-machine", "q35", …]                   # how QEMU is started when web1 arrives here

    images = ["/srv/images"]    # where the images of machines that arrive are looked up, by file name

A type that is not named is looked up among the installed ones (entry points of the group `vmferry.devices`).
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from migrate.errors import UsageError
from migrate.machine.config import QemuConfig, check_keys, nearest, qemu_table

#: Longest directory that leaves room for the names of sockets (107 bytes in all).
MAX_DIRECTORY = 60


@dataclass(frozen=True, slots=True)
class DeviceOffer:
    command: Sequence[str] = ()
    available: bool = True


@dataclass(frozen=True, slots=True)
class HostConfig:
    """A host's directory and what stands in its host.toml."""

    directory: Path
    devices: Mapping[str, DeviceOffer] = field(default_factory=dict)
    images: Sequence[Path] = ()
    qemu: Mapping[str, QemuConfig] = field(default_factory=dict)

    def qemu_of(self, name: str) -> QemuConfig:
        """How the QEMU of a machine that arrives is started. :raises UsageError: if nobody has said."""
        if name not in self.qemu:
            raise UsageError(
                f"this host does not know how to start the QEMU of {name!r}{nearest(name, sorted(self.qemu))}",
                remedy=f"add [qemu.{name}] with command = […] to {self.directory / 'host.toml'}",
            )
        return self.qemu[name]

    def image(self, name: str) -> Path:
        """Where the image of that file name is on this host. A name, never a path, comes over the wire.

        :raises UsageError: if no directory of `images` has it.
        """
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise UsageError(f"{name[:80]!r} is not a file name", remedy="see the source's manifest")
        for directory in self.images:
            if (directory / name).exists():
                return directory / name
        where = ", ".join(map(str, self.images)) or "nowhere: its host.toml has no `images`"
        raise UsageError(
            f"the image {name!r} is not on this host (looked in {where})",
            remedy="mount the shared storage there and name its directory in host.toml: images = […]",
        )

    def machine_directory(self, name: str) -> Path:
        return self.directory / "machines" / name

    def command_of(self, type_name: str) -> list[str]:
        """The command that starts a process of this type.

        :raises UsageError: if this host does not offer the type.
        """
        offer = self.devices.get(type_name, DeviceOffer())
        if not offer.available:
            raise UsageError(f"this host does not offer {type_name!r}", remedy="see its host.toml")
        if offer.command:
            return list(offer.command)
        known = {point.name: point.value for point in entry_points(group="vmferry.devices")}
        if type_name not in known:
            raise UsageError(
                f"no device type {type_name!r} is installed here{nearest(type_name, sorted(known))}",
                remedy=f"add [device.{type_name}] with command = […] to {self.directory / 'host.toml'}",
            )
        return [sys.executable, "-m", known[type_name]]


def load(directory: Path) -> HostConfig:
    """:raises UsageError: for a directory that is too deep, or a host.toml that is wrong."""
    directory = directory.absolute()
    if len(str(directory).encode()) > MAX_DIRECTORY:
        raise UsageError(
            f"the directory {directory} is longer than {MAX_DIRECTORY} bytes",
            remedy="sockets need short paths: choose another --dir",
        )
    path = directory / "host.toml"
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return HostConfig(directory)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", remedy="mend it") from None
    check_keys(raw, str(path), ("device", "qemu", "images"))
    devices = {}
    offers = raw.get("device", {})
    if not isinstance(offers, Mapping):
        raise UsageError(
            f"{path}: device is not a table", remedy="write [device.TYPE] before each type's keys"
        )
    for name, table in offers.items():
        where = f"{path}: [device.{name}]"
        if not isinstance(table, Mapping):
            raise UsageError(f"{where} is not a table", remedy="mend it")
        check_keys(table, where, ("command", "available"))
        command, available = table.get("command", []), table.get("available", True)
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            raise UsageError(
                f"{where}: command is not a list of texts", remedy='write command = ["python3", "my.py"]'
            )
        if not isinstance(available, bool):
            raise UsageError(f"{where}: available is neither true nor false", remedy="mend it")
        devices[name] = DeviceOffer(tuple(command), available)
    images = raw.get("images", [])
    if not isinstance(images, list) or not all(
        isinstance(item, str) and os.path.isabs(item) for item in images
    ):
        raise UsageError(
            f"{path}: images is not a list of absolute paths", remedy='write images = ["/srv/images"]'
        )
    machines = raw.get("qemu", {})
    if not isinstance(machines, Mapping):
        raise UsageError(
            f"{path}: qemu is not a table", remedy="write [qemu.MACHINE] before each machine's keys"
        )
    qemu = {name: qemu_table(table, f"{path}: [qemu.{name}]") for name, table in machines.items()}
    return HostConfig(directory, devices, tuple(Path(item) for item in images), qemu)
