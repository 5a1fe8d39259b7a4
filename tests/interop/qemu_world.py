"""Two hosts, a Linux guest in QEMU with disks of ours behind vhost-user, and what the guest and its disks say afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from datetime import datetime
from itertools import pairwise
from typing import Any, Final

import pytest

from migrate.cli.demo.linux import console, image, initramfs
from migrate.errors import UsageError
from tests.faults.leftovers import Pen
from tests.faults.rig import MACHINE, Host, Running, Said, Trail, eventually, keys_for

QEMU: Final = os.environ.get("FERRY_QEMU", "qemu-system-x86_64")
MEMORY: Final = "131080K"
BLOCKS: Final = 64
#: What the guest does all the while: ticks, 8 MiB that it rewrites, and a disk of which it uses 4 MiB.
GUEST: Final = "tick=20 dirty=8 rate=32 disk={disks} diskmb=4 pause=4"
CONSOLE: Final = (
    "socket,id=console,path={dir}/serial.sock,server=on,wait=off,logfile={dir}/console.out,logappend=on"
)


def missing() -> str:
    """Why no guest can be started here; "" if one can."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed: apt-get install qemu-system-x86"
    try:
        initramfs.find_kernel()
    except UsageError as error:
        return str(error)
    return ""


needs_qemu = pytest.mark.skipif(bool(missing()), reason=missing())


class QemuHost(Host):
    """As a Host; its guests speak on QEMU's serial port."""

    carried_by = "ferry"  #: `state` of the [qemu] tables

    def console(self, name: str = MACHINE) -> bytes:
        path = self.directory / "machines" / name / "console.out"
        return path.read_bytes() if path.exists() else b""

    def ticks(self) -> int:
        return console.last_tick(self.directory / "machines" / MACHINE / "console.out")

    def ticks_on(self, more: int = 15) -> None:
        start = self.ticks()
        eventually(lambda: self.ticks() >= start + more, f"{more} ticks on {self.name}")

    def ask_guest(self, name: str = MACHINE) -> dict[str, int]:
        """Have the guest verify all of its memory and read back all that it ever wrote."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.directory / "machines" / name / "serial.sock"))
            line.settimeout(30)
            line.sendall(b"check\n")
            said = b""
            while not (found := re.search(rb"checked (.*)\n", said)):
                said += line.recv(65536)
        return {key.decode(): int(value) for key, value in re.findall(rb"(\w+)=(\d+)", found[1])}

    def tell_guest(self, word: str, name: str = MACHINE) -> None:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.directory / "machines" / name / "serial.sock"))
            line.sendall(word.encode() + b"\n")
            time.sleep(0.2)

    def qemu(self) -> int:
        """The pid of the machine's QEMU."""
        [process] = [one for one in self.processes(QEMU) if "-S" in one.words]
        return process.pid

    def write_toml(self, command: list[str], more: str = "") -> None:
        """Its host.toml; read anew for each machine that arrives, but for its [qemu], which a daemon reads when it starts."""
        self.directory.mkdir(exist_ok=True)
        (self.directory / "host.toml").write_text(
            f'images = ["{self.pen.directory}/storage"]\n[qemu.{MACHINE}]\n'
            f'state = "{self.carried_by}"\ncommand = {json.dumps(command)}\n{more}'
        )

    def rings(self, device: str = "disk0") -> list[tuple[datetime, bool]]:
        """When rings of a disk started (True) and stopped here."""
        log = (self.directory / "machines" / MACHINE / f"{device}.log").read_text()
        return [
            (datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f"), what == "started")
            for when, what in re.findall(r"time=(\S+ \S+) .* event=ring-(started|stopped)", log)
        ]


class World:
    """hosta and hostb, and one machine. `close` proves that nothing is left."""

    def __init__(
        self, pen: Pen, *, disks: int = 1, state: str = "ferry", disk_command: list[str] | None = None
    ) -> None:
        self.pen = pen
        self.disks, self.state = disks, state
        self.memory = (
            MEMORY if disks == 1 else "196616K"
        )  # each disk's process in the guest has a buffer of 32 MiB
        self.disk_command = disk_command
        keys = keys_for(pen, "hosta", "hostb")
        (pen.directory / "storage").mkdir()
        self.images = [pen.directory / "storage" / f"disk{number}.img" for number in range(disks)]
        archive = pen.directory / "initramfs"
        self.kernel = initramfs.find_kernel()
        archive.write_bytes(initramfs.build(self.kernel))
        self.command = [
            QEMU, "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot",
            "-kernel", str(self.kernel.image), "-initrd", str(archive),
            "-append", f"{initramfs.APPEND} {GUEST.format(disks=disks)}",
            "-chardev", CONSOLE, "-serial", "chardev:console",
        ]  # fmt: skip
        self.a = QemuHost(pen, "hosta", keys=keys["hosta"])
        self.b = QemuHost(pen, "hostb", keys=keys["hostb"])
        self.hosts = (self.a, self.b)
        for host in self.hosts:
            host.carried_by = state
            host.write_toml(self.command)
            host.start()
        self.toml = pen.directory / "machine.toml"

    def write_machine(
        self, *, memory: str = "", command: list[str] | None = None, devices: bool = True
    ) -> None:
        own = f"command = {json.dumps(self.disk_command)}\n" if self.disk_command else ""
        disks = "".join(
            f'[[device]]\nid = "disk{number}"\ntype = "vhost-user-blk"\nimage = "{path}"\n{own}'
            for number, path in enumerate(self.images)
        )
        self.toml.write_text(
            f'[machine]\nname = "{MACHINE}"\nmemory = "{memory or self.memory}"\n'
            f'[qemu]\ncommand = {json.dumps(command or self.command)}\nstate = "{self.state}"\n{disks}'
            + (
                '[[device]]\nid = "rtc0"\ntype = "rtc"\n[[device]]\nid = "uart0"\ntype = "uart16550"\n'
                if devices
                else ""
            )
        )

    def run(self, **more: Any) -> Trail:
        """The machine anew on hosta, alone and with empty disks, at work; what it says from now on."""
        for host in self.hosts:
            host.revive()
            host.clear()
            (host.directory / "machines" / MACHINE / "console.out").unlink(missing_ok=True)
        for path in self.images:
            path.unlink(missing_ok=True)
            with path.open("wb") as file:
                file.truncate(16 << 20)
        self.write_machine(**more)
        said = self.a.ferry("run", str(self.toml), "--fresh")
        assert said.code == 0, said
        self.a.ticks_on()
        return Trail(self.a, self.b)

    def ready(self) -> tuple[QemuHost, QemuHost]:
        """Where the machine runs, and the other host; on hosta anew where it runs nowhere."""
        for here, there in (self.hosts, self.hosts[::-1]):
            here.revive()
            there.revive()
            if here.state() == "running" and not there.state():
                here.ticks_on(3)
                return here, there
        self.run()
        return self.hosts

    # -- moving it -----------------------------------------------------------------------------------------------------------

    def begin(self, here: Host, there: Host, *words: str) -> Running:
        return here.begin("migrate", MACHINE, "--to", there.tls, "--downtime", "2000", *words)

    def move(self, here: Host, there: Host, *words: str) -> Said:
        return here.ferry("migrate", MACHINE, "--to", there.tls, "--downtime", "2000", "--json", *words)

    def moves(self, here: Host, there: Host, *words: str) -> dict[str, Any]:
        """It must; both memories and all state equal, byte for byte. The outcome."""
        said = self.move(here, there, "--verify", *words)
        assert said.code == 0, said
        outcome = said.outcome
        assert outcome["outcome"] == "completed", outcome
        assert outcome["verified"] == {"ram": True, "devices": True}
        return outcome

    # -- what must be true afterwards ------------------------------------------------------------------------------------------

    def runs_on(self, here: QemuHost, there: QemuHost) -> None:
        """Here and nowhere else, with its disk."""
        here.becomes("running")
        here.ticks_on()
        before = len(console.SYNCED.findall(here.console()))
        eventually(
            lambda: len(console.SYNCED.findall(here.console())) > before,
            f"the disk is written on {here.name}",
        )
        there.is_still()

    def guest_is_whole(self, host: QemuHost) -> int:
        """The guest's own word: every page, and every block that it ever wrote. Returns up to which generation its disk lasts."""
        answer = host.ask_guest()
        assert answer["corrupt"] == 0
        assert answer["pages"] == 8 * 256
        assert answer["blocks"] == BLOCKS or answer["synced"] < BLOCKS
        return answer["synced"]

    def said(self) -> bytes:
        return b"".join(host.console() for host in self.hosts)

    def disk_is_whole(self, synced: int) -> None:
        """Seen from outside, of a machine that is stopped or gone: all blocks whole, every acknowledged write there.

        :param synced: what the guest said last. Not read off one host's output: a line that was cut within its number when the
            guest left, and another when it came back, make a number that nobody said.
        """
        report = image.check(self.images[0])
        assert report.wrong == [], report.wrong
        assert synced
        lost = {block: report.generations.get(block, 0) for block in report.lost(synced, BLOCKS)}
        assert lost == {}, (
            f"lost {lost} of {synced} that were acknowledged; the image's last is {max(report.generations.values())}"
        )

    def one_disk_at_a_time(self) -> None:
        """No ring of the disk ran on both hosts at any instant, by the logs of both."""
        spans = []
        for host in self.hosts:
            began: datetime | None = None
            for when, started in host.rings():
                if started:
                    began = when
                elif began is not None:
                    spans.append((began, when, host.name))
                    began = None
            if began is not None:
                spans.append((began, datetime.max, host.name))
        spans.sort()
        for first, second in pairwise(spans):
            assert first[1] <= second[0] or first[2] == second[2], f"{first} and {second}"

    def close(self) -> None:
        for host in self.hosts:
            host.close()
        assert (left := self.pen.at_work()) == [], left


def word_for(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def go_on(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
