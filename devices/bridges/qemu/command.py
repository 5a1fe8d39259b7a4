"""QEMU's command line: what machine.toml says, with our monitor, memory, and the devices whose back ends are processes of ours.

What is added has ids that begin with `ferry-`, so that it cannot meet what the user wrote. In the user's words `{dir}` is the
machine's directory on this host, and `{socket.ID}` where a device's back end listens: that device is then not added.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from migrate.errors import Phase, UsageError

#: Device types that QEMU drives by vhost-user, and the words of `-device` and `-netdev` that make it do so.
BLK: Final = "vhost-user-blk"
NET: Final = "vhost-user-net"
#: What would take QEMU's place or keep it from us.
FORBIDDEN: Final = ("-daemonize", "-incoming", "-S", "-qmp", "-monitor")
_BACKEND: Final = "ferry-ram"


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A device of the machine; `socket` is where it listens for QEMU, "" for one that QEMU does not drive."""

    id: str
    type: str
    socket: str
    options: dict[str, str]
    protocol: str


@dataclass(frozen=True, slots=True)
class Platform:
    """platform.json, as the supervisor writes it: what QEMU is started with, or where the monitor of a running one is."""

    command: tuple[str, ...]
    qmp: str
    bus: str
    state: str  #: "ferry", or "qemu": device state goes by QEMU's dbus-vmstate
    devices: tuple[DeviceEntry, ...]
    backend: str = ""  #: id of the memory's object, "" for ours

    @classmethod
    def read(cls, path: Path) -> Platform:
        raw: dict[str, Any] = json.loads(path.read_text())
        devices = [
            DeviceEntry(item["id"], item["type"], item["socket"], dict(item["options"]), item["protocol"])
            for item in raw["devices"]
        ]
        return cls(
            tuple(raw["command"]), raw["qmp"], raw["bus"], raw["state"], tuple(devices), raw["backend"]
        )

    @property
    def driven(self) -> list[DeviceEntry]:
        """Those that QEMU drives by vhost-user."""
        return [device for device in self.devices if device.protocol == "vhost-user"]

    @property
    def proxied(self) -> list[DeviceEntry]:
        """Those that are behind an x-pci-proxy-dev."""
        return [device for device in self.devices if device.protocol == "mpqemu"]


def build(
    platform: Platform,
    directory: Path,
    monitor: Path,
    memory: tuple[int, int],
    *,
    incoming: bool,
    proxies: Mapping[str, int] = MappingProxyType({}),
) -> list[str]:
    """:param memory: a descriptor that QEMU inherits, and its size in bytes.
    :param proxies: of each device in `platform.proxied` a connection to it, which QEMU inherits.

    :raise UsageError: the command has words that are ours to say.
    """
    words = [word.replace("{dir}", str(directory)) for word in platform.command]
    for word in words:
        if word in FORBIDDEN:
            raise UsageError(
                f"the command of [qemu] has {word}, which ferry has to say itself",
                remedy="leave it out; `ferry adopt` takes a QEMU that runs already",
                phase=Phase.SETUP,
            )
    fd, size = memory
    words += ["-S", "-qmp", f"unix:{_escaped(str(monitor))},server=on,wait=off"]
    backend = platform.backend or _BACKEND
    words += [
        "-object", f"memory-backend-file,id={backend},size={size},mem-path=/proc/self/fd/{fd},share=on",
        "-machine", f"memory-backend={backend}", "-m", f"size={size >> 10}K",
    ]  # fmt: skip
    for device in platform.driven:
        place = f"{{socket.{device.id}}}"
        if any(place in word for word in words):  # the user says where it is
            words = [word.replace(place, _escaped(device.socket)) for word in words]
        else:
            words += _device(device, msix=_has_kvm(words))
    for proxied in platform.proxied:
        words += ["-device", f"x-pci-proxy-dev,id={proxied.id},fd={proxies[proxied.id]}"]
    if platform.state == "qemu":
        words += ["-object", f"dbus-vmstate,id=ferry-vmstate,addr={_escaped(platform.bus)}"]
    return [*words, "-incoming", "defer"] if incoming else words


def _has_kvm(words: Sequence[str]) -> bool:
    """Whether that QEMU runs by KVM: it is asked to, and this host has one. TCG is what it uses otherwise."""
    asked = any(
        word == "-enable-kvm" or "accel=kvm" in word or (option == "-accel" and word.startswith("kvm"))
        for option, word in zip(["", *words], words, strict=False)
    )
    return asked and os.access("/dev/kvm", os.R_OK | os.W_OK)


def _device(device: DeviceEntry, *, msix: bool) -> Sequence[str]:
    """:param msix: a guest may drive a network function by MSI-X. QEMU 7.2 without KVM is killed by SIGSEGV then."""
    chardev = f"ferry-{device.id}"
    words = ["-chardev", f"socket,id={chardev},path={_escaped(device.socket)},reconnect=1"]
    queues = device.options.get("queues", "1")
    if device.type == NET:
        net = f"ferry-net-{device.id}"
        mac = f",mac={device.options['mac']}" if "mac" in device.options else ""
        return [
            *words,
            "-netdev", f"vhost-user,id={net},chardev={chardev}",
            "-device", f"virtio-net-pci,id={device.id},netdev={net}{mac}{'' if msix else ',vectors=0'}",
        ]  # fmt: skip
    return [*words, "-device", f"vhost-user-blk-pci,id={device.id},chardev={chardev},num-queues={queues}"]


def _escaped(text: str) -> str:
    """A comma ends an option's value in QEMU's language, and two are one."""
    return text.replace(",", ",,")
