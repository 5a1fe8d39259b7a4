"""[qemu] of machine.toml and host.toml, and the command line that comes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from devices.bridges.qemu.command import DeviceEntry, Platform, build
from migrate.cli.adopt import images, machine_toml
from migrate.errors import UsageError
from migrate.machine import hostconfig
from migrate.machine.config import MachineConfig, parse

HERE = Path("/m")


def made(text: dict[str, Any], **more: Any) -> MachineConfig:
    return parse({"machine": {"name": "m", "memory": "128M"}, "qemu": text, **more}, "toml", HERE)


def test_a_machine_of_qemus_has_one_memory_and_drives_what_is_behind_vhost_user() -> None:
    devices = [{"id": "disk0", "type": "vhost-user-blk", "image": "d.img"}, {"id": "clock", "type": "rtc"}]
    machine = made({"command": ["qemu"]}, device=devices)
    assert machine.qemu is not None
    assert machine.qemu.command == ("qemu",)
    assert [device.protocol for device in machine.devices] == ["vhost-user", "none"]
    assert MachineConfig.from_json(machine.to_json()).to_json() == machine.to_json()


@pytest.mark.parametrize(
    ("text", "more", "why"),
    [
        ({}, {}, "command is not a list of texts"),
        ({"command": []}, {}, "command is not a list of texts"),
        ({"command": "qemu"}, {}, "command is not a list of texts"),
        ({"command": ["q"], "stat": "ferry"}, {}, "did you mean 'state'"),
        ({"command": ["q"], "state": "both"}, {}, "one of: ferry, qemu"),
        ({"command": ["q"]}, {"vcpu": {}}, "both [vcpu] and [qemu]"),
        ({"command": ["q"]}, {"device": [{"id": "u", "type": "rtc", "protocol": "vfio-user"}]}, "vfio-user"),
        (
            {"command": ["q"]},
            {"device": [{"id": "u", "type": "virtio-blk", "protocol": "vhost-user"}]},
            "vhost-user-blk",
        ),
        (
            {"command": ["q"]},
            {"device": [{"id": "u", "type": "rtc", "protocol": "mpqmu"}]},
            "did you mean 'mpqemu'",
        ),
        ({"qmp": "/q"}, {}, "bus is missing"),
        ({"qmp": "/q", "bus": "b", "images": {"d": 1}}, {}, "images is not a table of paths"),
        ({"qmp": "/q", "bus": "b"}, {"device": [{"id": "u", "type": "rtc"}]}, "has its devices"),
        ({"qmp": "/q", "bus": "b", "command": ["q"]}, {}, "unknown key 'command'"),
    ],
)
def test_what_is_wrong_in_it_is_named(text: dict[str, Any], more: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(text, **more)
    assert why in str(caught.value)


def test_memory_in_several_regions_is_refused() -> None:
    raw = {"machine": {"name": "m"}, "memory": [{"gpa": 0, "size": "1M"}, {"gpa": 1 << 30, "size": "1M"}]}
    with pytest.raises(UsageError, match="one size"):
        parse({**raw, "qemu": {"command": ["q"]}}, "toml", HERE)


def test_a_guest_may_have_more_memory_than_the_embedded_machine() -> None:
    machine = parse({"machine": {"name": "m", "memory": "64G"}, "qemu": {"command": ["q"]}}, "toml", HERE)
    assert machine.memory_bytes == 64 << 30


def test_a_host_knows_the_qemus_that_it_was_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostconfig, "MAX_DIRECTORY", 200)
    (tmp_path / "host.toml").write_text('[qemu.web1]\ncommand = ["q", "-x"]\nstate = "qemu"\n')
    host = hostconfig.load(tmp_path)
    assert (host.qemu_of("web1").command, host.qemu_of("web1").state) == (("q", "-x"), "qemu")
    with pytest.raises(UsageError, match="did you mean 'web1'"):
        host.qemu_of("web2")


def platform(*words: str, state: str = "ferry", backend: str = "") -> Platform:
    devices = (
        DeviceEntry("disk0", "vhost-user-blk", "/m/d0,1.sock", {"queues": "2"}, "vhost-user"),
        DeviceEntry("clock", "rtc", "", {}, "none"),
    )
    return Platform(words, "", "unix:path=/bus", state, devices, backend)


def line(found: Platform, *, incoming: bool = False) -> list[str]:
    return build(found, HERE, HERE / "qmp.sock", (9, 1 << 27), incoming=incoming)


def test_the_command_gets_memory_monitor_and_the_devices_that_it_drives() -> None:
    words = line(platform("qemu", "-serial", "file:{dir}/out"))
    assert words[:3] == ["qemu", "-serial", "file:/m/out"]
    assert "-S" in words
    assert "memory-backend-file,id=ferry-ram,size=134217728,mem-path=/proc/self/fd/9,share=on" in words
    assert "socket,id=ferry-disk0,path=/m/d0,,1.sock,reconnect=1" in words
    assert "vhost-user-blk-pci,id=disk0,chardev=ferry-disk0,num-queues=2" in words
    assert not any("clock" in word or "dbus-vmstate" in word for word in words)
    assert "-incoming" not in words


def test_a_destination_waits_and_states_by_qemu_need_its_object() -> None:
    words = line(platform("qemu", state="qemu", backend="m"), incoming=True)
    assert words[-2:] == ["-incoming", "defer"]
    assert "dbus-vmstate,id=ferry-vmstate,addr=unix:path=/bus" in words
    assert "memory-backend=m" in words


def test_whoever_says_where_a_disk_is_gets_it_there_and_nowhere_else() -> None:
    words = line(platform("qemu", "-chardev", "socket,id=c,path={socket.disk0}", "-device", "x,addr=5"))
    assert "socket,id=c,path=/m/d0,,1.sock" in words
    assert not any("ferry-disk0" in word for word in words)


def test_a_proxied_device_gets_a_connection_that_qemu_inherits() -> None:
    found = Platform(
        ("qemu",), "", "b", "ferry", (DeviceEntry("port0", "uart16550", "/m/d0.sock", {}, "mpqemu"),)
    )
    words = build(found, HERE, HERE / "qmp.sock", (9, 1 << 27), incoming=False, proxies={"port0": 12})
    assert "x-pci-proxy-dev,id=port0,fd=12" in words
    assert not any("vhost-user" in word for word in words)


@pytest.mark.parametrize(
    ("words", "kvm_is_there", "msix"),
    [
        ((), True, False),
        (("-accel", "tcg", "-kernel", "/kvm/bzImage"), True, False),
        (("-accel", "kvm"), True, True),
        (("-machine", "q35,accel=kvm:tcg"), True, True),
        (("-machine", "q35,accel=kvm:tcg"), False, False),
        (("-enable-kvm",), True, True),
    ],
)
def test_a_network_function_has_no_msix_where_qemu_would_be_killed_for_it(
    words: tuple[str, ...], kvm_is_there: bool, msix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: kvm_is_there)
    entry = DeviceEntry("net0", "vhost-user-net", "/m/d0.sock", {"mac": "52:54:00:00:00:01"}, "vhost-user")
    found = build(
        Platform(("qemu", *words), "", "b", "ferry", (entry,)), HERE, HERE / "q", (9, 1 << 27), incoming=False
    )
    function = "virtio-net-pci,id=net0,netdev=ferry-net-net0,mac=52:54:00:00:00:01"
    assert (function if msix else f"{function},vectors=0") in found


@pytest.mark.parametrize("word", ["-S", "-incoming", "-qmp", "-monitor", "-daemonize"])
def test_words_that_are_ours_to_say_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=f"has {word}"):
        line(platform("qemu", word))


def test_adopt_says_what_it_adopts_in_the_words_of_machine_toml(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(machine_toml("web1", '/q"s', "unix:path=/b", {"disk0": "/srv/a b.img"}, "qemu"))
    from migrate.machine.config import load

    qemu = load(path).qemu
    assert qemu is not None
    assert (qemu.qmp, qemu.bus, dict(qemu.images), qemu.state) == (
        '/q"s',
        "unix:path=/b",
        {"disk0": "/srv/a b.img"},
        "qemu",
    )
    with pytest.raises(UsageError, match="is not ID=PATH"):
        images(["disk0"])
