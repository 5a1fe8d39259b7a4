"""The stage with QEMU on it: a Linux guest on a disk of ours behind vhost-user, moved with the same scenarios as the embedded one.

The guest's ticks, and what it finds corrupt, come out of QEMU's own serial port; our other devices are there beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from migrate.cli.demo.hosts import DemoHost
from migrate.cli.demo.linux import console, image, initramfs
from migrate.cli.demo.stage import MACHINE, Console, Event, Stage
from migrate.errors import FerryError, Phase, UsageError

#: QEMU 7.2 under TCG loses guest writes where RAM is a multiple of 256 KiB, so the guest has a little more (docs/qemu.md).
MEMORY: Final = "262152K"
#: Of the guest's ticks, ms; what it dirties in one without --dirty-rate, pages.
_TICK_MS: Final = 20
_PAGES: Final = 128


def binary() -> str:
    """QEMU's program: $FERRY_QEMU, or that of this host's architecture. :raises UsageError: it is not there."""
    name = os.environ.get("FERRY_QEMU", "qemu-system-x86_64")
    found = shutil.which(name)
    if found is None:
        raise UsageError(
            f"{name} is not installed", remedy="apt-get install qemu-system-x86, or name one with FERRY_QEMU"
        )
    return found


def command(directory: Path, words: str) -> list[str]:
    """What starts the Linux guest; its initramfs is made in `directory`. :param words: the guest's own.

    :raises UsageError: QEMU or a kernel is not on this host.
    """
    kernel = initramfs.find_kernel()
    archive = directory / "initramfs"
    archive.write_bytes(initramfs.build(kernel))
    return [
        binary(), "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot",
        "-kernel", str(kernel.image), "-initrd", str(archive), "-append", f"{initramfs.APPEND} {words}",
        "-chardev", "socket,id=console,path={dir}/serial.sock,server=on,wait=off,logfile={dir}/console.out,logappend=on",
        "-serial", "chardev:console",
    ]  # fmt: skip


@dataclass(slots=True)
class QemuStage(Stage):
    console: Console = console
    executes: bytes = b"qemu-system"
    command: list[str] = field(default_factory=list)

    def output(self, host: DemoHost) -> Path:
        return host.output(MACHINE, "console")

    def machine_toml(self) -> str:
        return (
            f'[machine]\nname = "{MACHINE}"\nmemory = "{self.options.memory or MEMORY}"\n\n'
            f"[qemu]\ncommand = {json.dumps(self.command)}\n\n"
            f'[[device]]\nid = "disk0"\ntype = "vhost-user-blk"\nimage = "{self.image}"\n\n'
            '[[device]]\nid = "uart0"\ntype = "uart16550"\n\n'
            '[[device]]\nid = "rtc0"\ntype = "rtc"\n\n'
            '[[device]]\nid = "display0"\ntype = "display"\n'
        )

    def configure(self, destination: str) -> None:
        self.command = command(self.directory, self.cmdline())
        super(QemuStage, self).configure(destination)
        for host in (self.source, self.destination):
            with (host.directory / "host.toml").open("a") as file:
                file.write(f"[qemu.{MACHINE}]\ncommand = {json.dumps(self.command)}\n")

    def cmdline(self) -> str:
        rate, pages = self.options.dirty_rate, _PAGES
        if rate == "max":
            pages = 4096
        elif rate:
            from migrate.machine.config import parse_size

            pages = 0 if rate == "0" else max(1, parse_size(rate, "--dirty-rate") // 4096 * _TICK_MS // 1000)
        return f"tick={_TICK_MS} rate={pages} disk=1 diskmb=8"

    async def judge(self, outcome: Event) -> Event:
        """And the disk, looked at from outside: every block whole, every write that the guest was told would last there."""
        judged = await super(QemuStage, self).judge(outcome)
        said = b"".join(_bytes(self.output(host)) for host in (self.source, self.destination))
        report = image.check(self.image)
        lost = report.lost(console.last_synced(said), 128)
        if report.wrong or lost:
            raise FerryError(
                f"the disk is not what the guest wrote: {'; '.join(report.wrong) or f'blocks {lost} are lost'}",
                phase=Phase.RUNNING,
                remedy="this is a defect of vmferry: keep the logs and report it",
            )
        judged["disk"] = {"blocks": len(report.generations), "wrong": 0, "lost": 0}
        return judged


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
