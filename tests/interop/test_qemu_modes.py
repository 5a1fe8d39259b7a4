"""Two disks of ours under one QEMU, whose devices' states go by its own dbus-vmstate; and our devices with no ferry at all."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from migrate.bus import Bus, PrivateBus, discover
from migrate.cli.demo.linux import console, initramfs
from tests.faults.leftovers import pen
from tests.faults.rig import eventually
from tests.interop.qemu_world import CONSOLE, GUEST, MEMORY, QEMU, World, needs_qemu, word_for

pytestmark = [needs_qemu, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with pen() as ground:
        world = World(ground, disks=2, state="qemu")
        yield world
        world.close()


def test_two_back_ends_under_load_share_one_log_and_lose_no_page(world: World) -> None:
    """Both write guest memory all the while; states go by QEMU, whose destination loads them before it says so."""
    here, there = world.ready()
    for connections in ("1", "2"):
        world.moves(here, there, "--connections", connections)
        world.runs_on(there, here)
        here, there = there, here
    world.guest_is_whole(here)
    assert b"CORRUPT" not in world.said()


def test_a_save_that_would_fail_in_qemus_hands_is_found_before_the_stop(world: World) -> None:
    world.run()
    text = world.toml.read_text()
    faulty = word_for("devices.faulty", "rtc", "--fail", "save")
    world.toml.write_text(
        text.replace('type = "rtc"\n', f'type = "rtc"\ncommand = {faulty!r}\n'.replace("'", '"'))
    )
    world.a.clear()
    assert world.a.ferry("run", str(world.toml), "--fresh").code == 0
    world.a.ticks_on()
    said = world.move(world.a, world.b)
    assert said.code == 1, said
    assert said.outcome["reasons"][0]["device"] == "rtc0", said
    world.runs_on(world.a, world.b)


# -- no ferry at all ------------------------------------------------------------------------------------------------------------


class Plain:
    """One QEMU as anybody would start it, with our device processes on a bus of their own."""

    def __init__(self, directory: Path, image: Path, archive: Path, kernel: Path, *, incoming: bool) -> None:
        directory.mkdir()
        self.directory, self.image = directory, image
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.qmp = QMPClient(directory.name)
        self.private = PrivateBus(directory / "bus")
        self.command = [
            QEMU, "-machine", "q35,memory-backend=m", "-accel", "tcg", "-m", MEMORY, "-nodefaults", "-display", "none",
            "-object", f"memory-backend-memfd,id=m,size={MEMORY},share=on", "-no-reboot", "-kernel", str(kernel),
            "-initrd", str(archive), "-append", f"{initramfs.APPEND} {GUEST.format(disks=1)}",
            "-chardev", CONSOLE.replace("{dir}", str(directory)), "-serial", "chardev:console",
            "-chardev", f"socket,id=c,path={directory}/vhost,reconnect=1", "-device", "vhost-user-blk-pci,chardev=c",
            "-qmp", f"unix:{directory}/qmp,server=on,wait=off", *(["-incoming", "defer"] if incoming else []),
        ]  # fmt: skip

    def start_device(self, module: str, name: str, *options: str) -> None:
        words = [item for option in options for item in ("--option", option)]
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", module, "--id", name, "--bus", self.private.address, *words]
        )

    def start_disk(self) -> None:
        self.start_device(
            "devices.vhost_blk", "disk0", f"vhost_user={self.directory}/vhost", f"image={self.image}"
        )

    def start_qemu(self, words: list[str]) -> None:
        self.processes["qemu"] = subprocess.Popen([*self.command, *words])

    async def start(self) -> None:
        await self.private.start()
        self.start_disk()
        self.start_device("devices.uart16550", "uart0", f"output={self.directory}/uart.out")
        self.start_device("devices.rtc", "rtc0")
        self.bus = await Bus.connect(self.private.address)
        async with asyncio.timeout(30):
            while len(await discover(self.bus)) < 3:
                await asyncio.sleep(0.02)
        words = ["-object", f"dbus-vmstate,id=dv,addr={self.private.address}"]
        self.start_qemu(words)
        async with asyncio.timeout(30):
            while True:
                try:
                    await self.qmp.connect(f"{self.directory}/qmp")
                    return
                except Exception:
                    await asyncio.sleep(0.05)

    async def ask(self, command: str, **arguments: Any) -> Any:
        return await asyncio.wait_for(self.qmp.execute(command, arguments or None), 10)

    def said(self) -> bytes:
        path = self.directory / "console.out"
        return path.read_bytes() if path.exists() else b""

    def ask_guest(self) -> dict[str, int]:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(f"{self.directory}/serial.sock")
            line.settimeout(30)
            line.sendall(b"check\n")
            said = b""
            while not (found := re.search(rb"checked (.*)\n", said)):
                said += line.recv(65536)
        return {key.decode(): int(value) for key, value in re.findall(rb"(\w+)=(\d+)", found[1])}

    async def stop(self) -> None:
        await self.qmp.disconnect()
        for process in self.processes.values():
            process.kill()
            process.wait()
        await self.bus.close()
        await self.private.stop()


async def _plain(directory: Path) -> None:
    kernel = initramfs.find_kernel()
    archive, image = directory / "initramfs", directory / "disk.img"
    archive.write_bytes(initramfs.build(kernel))
    with image.open("wb") as file:
        file.truncate(16 << 20)
    source = Plain(directory / "a", image, archive, kernel.image, incoming=False)
    destination = Plain(directory / "b", image, archive, kernel.image, incoming=True)
    try:
        for side in (source, destination):
            await side.start()
        await asyncio.to_thread(
            eventually, lambda: console.last_synced(source.said()) > 80, "the guest works"
        )
        for side in (source, destination):
            capabilities = [{"capability": "return-path", "state": True}]
            await side.ask("migrate-set-capabilities", capabilities=capabilities)
        saved = await (await discover(source.bus))["uart0"].save()
        await destination.ask("migrate-incoming", uri=f"unix:{directory}/m")
        await source.ask("migrate", uri=f"unix:{directory}/m")
        async with asyncio.timeout(60):
            while (status := (await source.ask("query-migrate"))["status"]) not in ("completed", "failed"):
                await asyncio.sleep(0.05)
        assert status == "completed"
        before = console.last_synced(source.said())
        await asyncio.to_thread(
            eventually,
            lambda: console.last_synced(destination.said()) > before + 40,
            "its disk is written there",
        )
        assert await (await discover(destination.bus))["uart0"].save() == saved
        # kill -9 of the disk under load: QEMU connects to the next process, which goes on where that one was.
        destination.processes["disk0"].kill()
        destination.processes["disk0"].wait()
        before = console.last_synced(destination.said())
        destination.start_disk()
        await asyncio.to_thread(
            eventually,
            lambda: console.last_synced(destination.said()) > before + 40,
            "a new process serves the disk",
        )
        answer = await asyncio.to_thread(destination.ask_guest)
        assert answer["corrupt"] == 0
        assert answer["blocks"] == 64
        report = console.read(source.said(), destination.said(), 0)
        assert (report.corrupt, report.missed) == (0, 0)
    finally:
        for side in (source, destination):
            await side.stop()


def test_our_devices_move_between_two_plain_qemus_and_a_disk_that_is_killed_is_served_by_the_next() -> None:
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    try:
        asyncio.run(_plain(directory))
    finally:
        shutil.rmtree(directory)


# -- adopted ---------------------------------------------------------------------------------------------------------------------


async def _started(plain: Plain) -> None:
    await plain.start()
    await asyncio.to_thread(eventually, lambda: console.last_synced(plain.said()) > 40, "the guest works")
    await plain.qmp.disconnect()  # its monitor takes one client


def test_a_qemu_that_runs_is_adopted_let_go_of_adopted_again_and_moved(world: World) -> None:
    a, b = world.a, world.b
    for host in world.hosts:
        host.clear()
        host.carried_by = "qemu"
    directory = world.pen.directory / "plain"
    kernel = initramfs.find_kernel()
    image = world.pen.directory / "storage" / "adopted.img"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    archive = world.pen.directory / "initramfs"
    plain = Plain(directory, image, archive, kernel.image, incoming=False)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(_started(plain))
        b.write_toml([word.replace("disk=2", "disk=1") for word in world.command])
        b.restart()
        words = ["adopt", "web1", "--qmp", f"{directory}/qmp", "--bus", plain.private.address, "--fresh"]
        said = a.ferry(*words)
        assert said.code == 0, said
        said = a.ferry("check", "web1", "--to", b.tls)
        assert said.code == 3, said
        assert "its image is not known" in " ".join(said.out + said.err)
        assert a.ferry("stop", "web1").code == 0
        before = console.last_tick(directory / "console.out")
        eventually(
            lambda: console.last_tick(directory / "console.out") > before + 10, "it runs on, let go of"
        )
        said = a.ferry(*words, "--image", f"disk0={image}")
        assert said.code == 0, said
        said = a.ferry("check", "web1", "--to", b.tls)
        assert said.code == 3, said
        assert "QEMU has a dbus-vmstate of its own" in " ".join(said.out + said.err)
        assert a.ferry("stop", "web1").code == 0
        assert a.ferry(*words, "--image", f"disk0={image}", "--state", "qemu").code == 0
        assert a.state() == "running"
        said = world.move(a, b, "--verify")
        assert said.code == 2, said
        assert "this one was adopted" in said.err[0]
        said = world.move(a, b)
        assert said.code == 0, said
        b.ticks_on()
        eventually(lambda: plain.processes["qemu"].poll() is not None, "the QEMU that was left has ended")
        world.guest_is_whole(b)
        report = console.read(plain.said(), b.console(), 0)
        assert (report.corrupt, report.missed) == (0, 0)
    finally:
        for process in plain.processes.values():
            process.kill()
            process.wait()
        loop.run_until_complete(plain.bus.close())
        loop.run_until_complete(plain.private.stop())
        loop.close()
