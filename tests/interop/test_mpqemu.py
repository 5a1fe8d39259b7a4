"""Devices of ours behind the x-pci-proxy-dev of a real QEMU: its firmware boots from one, Linux finds and drives the others."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from migrate.cli.demo.linux import initramfs
from tests.faults.leftovers import Pen, pen
from tests.faults.rig import eventually
from tests.interop.qemu_world import QEMU, World, needs_qemu

pytestmark = [needs_qemu, pytest.mark.timeout(180)]

_SOURCE = Path(__file__).parent / "pci_guest.c"
#: Boot code: clears DS, then writes what follows it, up to a NUL, to SeaBIOS's debug port, and halts.
_BOOT = bytes.fromhex("fa 31c0 8ed8 be167c ba0204 ac 84c0 7403 ee ebf8 f4 ebfd")


class Devices:
    """Device processes that listen for QEMU; QEMU is started with a connection to each."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self._connections: list[socket.socket] = []
        bus = subprocess.run(
            ["dbus-daemon", "--session", "--fork", f"--address=unix:path={directory}/bus", "--print-pid"],
            capture_output=True, check=True,
        )  # fmt: skip
        stack.callback(os.kill, int(bus.stdout), 15)

    def add(self, module: str, *words: str, protocol: str = "mpqemu") -> str:
        """:returns: its socket."""
        path = f"{self.directory}/{module}.sock"
        command = [
            sys.executable, "-m", f"devices.{module}", "--id", module, "--bus", f"unix:path={self.directory}/bus",
            "--socket", path, "--protocol", protocol, *words,
        ]  # fmt: skip
        with (self.directory / f"{module}.log").open("wb") as log:
            process = subprocess.Popen(command, stderr=log)
        self._stack.callback(process.wait, 10)
        self._stack.callback(process.terminate)
        eventually(lambda: "event=ready" in self.log(module), f"{module} is on its bus")
        return path

    def log(self, module: str) -> str:
        return (self.directory / f"{module}.log").read_text()

    def connect(self, path: str) -> int:
        connection = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(path)
        self._connections.append(connection)
        return connection.fileno()

    def start(self, *words: str, memory: str = "128M") -> subprocess.Popen[bytes]:
        command = [
            QEMU, "-M", "pc", "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot", "-m", memory,
            "-object", f"memory-backend-memfd,id=ram,size={memory},share=on", "-machine", "memory-backend=ram",
            *words,
        ]  # fmt: skip
        fds = [connection.fileno() for connection in self._connections]
        qemu = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        for connection in self._connections:
            connection.close()  # QEMU has its own copy, and its end is the connection's
        self._connections = []
        self._stack.callback(qemu.wait, 10)
        self._stack.callback(qemu.kill)
        return qemu

    def proxies(self, *paths: str) -> Sequence[str]:
        return [word for path in paths for word in ("-device", f"x-pci-proxy-dev,fd={self.connect(path)}")]


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Devices]:
    with ExitStack() as stack:
        yield Devices(tmp_path, stack)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def test_the_firmware_boots_from_a_disk_behind_x_pci_proxy_dev(devices: Devices, tmp_path: Path) -> None:
    """SeaBIOS polls: configuration space, BAR, a virtqueue in shared memory, and data by DMA, all over MPQemuMsg."""
    sector = (_BOOT + b"booted from a device of ours\n\0").ljust(510, b"\0") + b"\x55\xaa"
    (tmp_path / "disk.img").write_bytes(sector.ljust(1 << 20, b"\0"))
    path = devices.add("virtio_blk", "--option", f"image={tmp_path}/disk.img")
    said = tmp_path / "debug"
    words = ["-debugcon", f"file:{said}", "-global", "isa-debugcon.iobase=0x402"]
    for attempt in range(2):  # the second QEMU finds the disk as after power-on
        qemu = devices.start(*words, *devices.proxies(path), memory="64M")
        eventually(lambda: "booted from a device of ours" in _text(said), f"the boot sector runs ({attempt})")
        qemu.kill()
        qemu.wait()
        said.unlink()
    assert "driver-fault" not in devices.log("virtio_blk")


def test_a_linux_guest_finds_the_functions_and_drives_them_polled(devices: Devices, tmp_path: Path) -> None:
    program, archive = tmp_path / "program", tmp_path / "initrd"
    subprocess.run(["gcc", "-O1", "-static", "-o", str(program), str(_SOURCE)], check=True)
    kernel = initramfs.find_kernel()
    archive.write_bytes(initramfs.build(kernel, program.read_bytes()))
    line, output, console = tmp_path / "line", tmp_path / "uart.out", tmp_path / "console"
    os.mkfifo(line)
    serial = devices.add("uart16550", "--option", f"output={output}", "--option", f"input={line}")
    clock = devices.add("rtc")
    qemu = devices.start(
        "-kernel", str(kernel.image), "-initrd", str(archive), "-append", "console=ttyS0 quiet panic=1",
        "-serial", f"file:{console}", *devices.proxies(serial, clock),
    )  # fmt: skip
    eventually(lambda: "the guest is here\n" in _text(output), "the guest speaks on the port")
    line.write_bytes(b"who is there?\n")
    assert qemu.wait(60) == 0
    assert _text(output) == "the guest is here\nthe guest heard: who is there?\n"
    said = _text(console)
    assert "1b36:0002 class 070002" in said
    assert "1af4:10f0 class 080300" in said
    port = re.search(r"serial port ([0-9a-f]+)", said)
    assert port is not None
    assert int(port[1], 16) % 16 == 0, said  # the proxy takes no fewer than 16
    found = re.search(r"clock (\d+) scratch 5eed", said)
    assert found is not None, said
    assert abs(int(found[1]) / 1e9 - time.time()) < 60


def test_memory_that_is_not_sealed_is_refused_and_said(devices: Devices, tmp_path: Path) -> None:
    path = devices.add("rtc")
    devices.start(
        *devices.proxies(path), "-S",
        "-object", "memory-backend-memfd,id=open,size=128M,share=on,seal=off", "-machine", "memory-backend=open",
    )  # fmt: skip
    eventually(lambda: "event=client-dropped" in devices.log("rtc"), "the client is dropped")
    assert "seal" in devices.log("rtc")


@pytest.fixture
def world() -> Iterator[World]:
    with pen() as ground:
        yield from _world(ground)


def _world(ground: Pen) -> Iterator[World]:
    world = World(ground)
    world.write_machine(devices=False)
    for path in world.images:
        path.write_bytes(bytes(16 << 20))
    with world.toml.open("a") as toml:
        toml.write('[[device]]\nid = "port0"\ntype = "uart16550"\nprotocol = "mpqemu"\n')
    yield world
    world.close()


def test_a_machine_with_such_a_device_runs_and_the_preflight_quotes_qemu(world: World) -> None:
    assert world.a.ferry("run", str(world.toml)).code == 0
    world.a.ticks_on()
    said = world.move(world.a, world.b)
    assert (said.code, said.outcome["running_on"]) == (3, "source"), said
    reasons = {reason["device"]: reason["reason"] for reason in said.outcome["reasons"]}
    assert "x-pci-proxy-dev does not support migration" in reasons["vcpu0"], said
    assert "x-pci-proxy-dev" in reasons["port0"], said
    world.a.ticks_on()


def test_the_firmware_boots_from_the_same_disk_behind_vhost_user(devices: Devices, tmp_path: Path) -> None:
    """`--protocol` alone chooses. (Behind vfio-user the embedded machine's guest has it, in every test of that.)"""
    sector = (_BOOT + b"booted over vhost-user\n\0").ljust(510, b"\0") + b"\x55\xaa"
    (tmp_path / "disk.img").write_bytes(sector.ljust(1 << 20, b"\0"))
    path = devices.add("virtio_blk", "--option", f"image={tmp_path}/disk.img", protocol="vhost-user")
    said = tmp_path / "debug"
    devices.start(
        "-debugcon", f"file:{said}", "-global", "isa-debugcon.iobase=0x402",
        "-chardev", f"socket,id=disk,path={path}", "-device", "vhost-user-blk-pci,chardev=disk,num-queues=1",
        memory="64M",
    )  # fmt: skip
    eventually(lambda: "booted over vhost-user" in _text(said), "the boot sector runs")
