"""A Linux guest in a real QEMU, with a network function of ours behind vhost-user, moved between two hosts while it talks."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cli.demo.linux import initramfs
from tests.faults.leftovers import Pen, pen
from tests.faults.rig import MACHINE, Host, eventually, two_hosts
from tests.interop.qemu_world import CONSOLE, MEMORY, QEMU, needs_qemu

pytestmark = [needs_qemu, pytest.mark.timeout(180)]

_SOURCE = Path(__file__).parent / "net_guest.c"
MAC = bytes.fromhex("5254 00ab cd01")
PEER = bytes.fromhex("0200 0000 0001")
TYPE, RARP = bytes.fromhex("88b5"), bytes.fromhex("8035")
#: QEMU's fields of a fake RARP (RFC 903), as a switch wants to see it: a request from and for the guest, to everybody.
ANNOUNCED = b"\xff" * 6 + MAC + RARP + bytes.fromhex("0001 0800 06 04 0003") + (MAC + bytes(4)) * 2


class Switch:
    """What a host's network functions are plugged into: answers each of the guest's frames with itself, and notes what came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.numbers: list[int] = []
        self.wrong: list[bytes] = []
        self.announced: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(4)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                port, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(port,), daemon=True).start()

    def _serve(self, port: socket.socket) -> None:
        with port, contextlib.suppress(OSError):  # its device was killed
            while frame := port.recv(65536):
                self._heard(frame)
                if frame[12:14] == TYPE:
                    port.send(MAC + PEER + frame[12:])

    def _heard(self, frame: bytes) -> None:
        if frame[12:14] == RARP:
            self.announced.append(frame)
        if frame[12:14] == TYPE:  # else IPv6 of the guest's kernel
            number = int.from_bytes(frame[14:22], "little")
            self.numbers.append(number)
            if frame != b"\xff" * 6 + MAC + body(number):
                self.wrong.append(frame)

    def clear(self) -> None:
        """What comes from now on."""
        self.numbers, self.wrong, self.announced = [], [], []

    def has_heard_of_the_guest(self) -> bool:
        return ANNOUNCED in [frame[:42] for frame in self.announced]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def body(number: int) -> bytes:
    """From its type on, as net_guest.c makes it."""
    size = 60 + number * 37 % 1455
    data = TYPE + number.to_bytes(8, "little")
    return data + bytes((number * 31 + at * 7) & 0xFF for at in range(22, size))


class World:
    def __init__(self, ground: Pen) -> None:
        program, archive = ground.directory / "program", ground.directory / "initramfs"
        subprocess.run(["gcc", "-O1", "-static", "-o", str(program), str(_SOURCE)], check=True)
        kernel = initramfs.find_kernel()
        modules = initramfs.MODULES + initramfs.NET_MODULES
        archive.write_bytes(initramfs.build(kernel, program.read_bytes(), modules))
        self.command = [
            QEMU, "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot",
            "-kernel", str(kernel.image), "-initrd", str(archive), "-append", initramfs.APPEND,
            "-chardev", CONSOLE, "-serial", "chardev:console",
        ]  # fmt: skip
        self.switches = [Switch(ground.directory / f"switch{side}") for side in (0, 1)]
        self.toml = ground.directory / "machine.toml"
        self.toml.write_text(
            f'[machine]\nname = "{MACHINE}"\nmemory = "{MEMORY}"\n[qemu]\ncommand = {json.dumps(self.command)}\n'
            f'[[device]]\nid = "net0"\ntype = "vhost-user-net"\n'
            f'options = {{ mac = "{MAC.hex(":")}" }}\n'
        )

    def host_toml(self, side: int) -> str:
        words = [sys.executable, "-m", "devices.vhost_net", "--option", f"peer={self.switches[side].path}"]
        return (
            f"[qemu.{MACHINE}]\ncommand = {json.dumps(self.command)}\n"
            f"[device.vhost-user-net]\ncommand = {json.dumps(words)}\n"
        )


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[World, Host, Host]]:
    with pen() as ground:
        world = World(ground)
        with two_hosts(ground, [world.host_toml(side) for side in (0, 1)]) as (a, b):
            yield world, a, b
            for switch in world.switches:
                switch.close()


def counts(host: Host) -> list[dict[str, int]]:
    """What the guest has said on this host."""
    path = host.directory / "machines" / MACHINE / "console.out"
    said = path.read_bytes() if path.exists() else b""
    return [
        {key.decode(): int(value) for key, value in re.findall(rb"(\w+)=(\d+)", line)}
        for line in re.findall(rb"^net sent=.* strange=\d+\r?\n", said, re.MULTILINE)
    ]


def talks(host: Host, switch: Switch) -> dict[str, int]:
    """The guest is heard by this host's switch, and hears it. Returns what it says of that."""
    lines, frames = len(counts(host)), len(switch.numbers)
    eventually(lambda: len(switch.numbers) > frames + 200, f"200 frames come out on {host.name}")
    eventually(lambda: len(counts(host)) > lines + 2, f"the guest says how it goes on {host.name}")
    one, following = counts(host)[-2:]
    assert following["echoed"] > one["echoed"]
    return following


def test_a_guest_talks_on_while_it_goes_there_and_back(world: tuple[World, Host, Host]) -> None:
    its, a, b = world
    said = a.ferry("run", str(its.toml), "--fresh")
    assert said.code == 0, said
    eventually(lambda: counts(a), "the guest is up")
    talks(a, its.switches[0])
    for here, there, left, entered in ((a, b, *its.switches), (b, a, *its.switches[::-1])):
        entered.clear()
        said = here.ferry("migrate", MACHINE, "--to", there.tls, "--downtime", "2000", "--verify", "--json")
        assert (said.code, said.outcome["running_on"]) == (0, "destination"), said
        assert said.outcome["verified"] == {"ram": True, "devices": True}, said
        guest = talks(there, entered)
        # Out on one host at a time, each once and in order; the driver's frames are in memory, so none is missing either.
        assert [*left.numbers, *entered.numbers] == [*range(left.numbers[0], entered.numbers[-1] + 1)]
        assert (guest["bad"], guest["strange"]) == (0, 0)
        eventually(entered.has_heard_of_the_guest, "the guest's address is announced")
        assert left.wrong == entered.wrong == []


def test_a_guest_whose_move_is_taken_back_at_the_last_moment_talks_on_where_it_was(
    world: tuple[World, Host, Host],
) -> None:
    its, a, b = world
    for switch in its.switches:
        switch.clear()
    moving = a.begin("migrate", MACHINE, "--to", b.tls, "--downtime", "5000", "--hold", "ready")
    moving.until("held", at="ready")
    assert a.ferry("cancel", MACHINE).code == 0
    said = moving.end()
    assert (said.code, said.outcome["running_on"]) == (1, "source"), said
    guest = talks(a, its.switches[0])
    out = its.switches[0].numbers
    assert out == [*range(out[0], out[-1] + 1)]  # its rings went on where they had stopped
    assert its.switches[1].numbers == its.switches[0].wrong == []
    assert (guest["bad"], guest["strange"]) == (0, 0)
