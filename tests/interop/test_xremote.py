"""Our client drives a device in a real QEMU of the type `x-remote`: an LSI SCSI controller, its DMA, and where its state goes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from devices.bridges.qemu.monitor import Monitor
from devices.protocols.mpqemu.client import Client
from devices.protocols.mpqemu.messages import Sysmem
from migrate.errors import DeviceGone, DeviceTimeout
from migrate.memory.memfd import create_memfd
from migrate.qemu import stream
from tests.faults.rig import eventually
from tests.interop.qemu_world import QEMU

pytestmark = [
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
    pytest.mark.timeout(60),
]

_SIZE = 16 << 20
_MEMORY, _PORTS = 0xE000_0000, 0xC000
#: Registers of the 53C895A: interrupt status, a scratch register, and where its program is; and the bit "a DMA interrupt".
_ISTAT, _SCRATCH_A, _DSP, _DIP = 0x14, 0x34, 0x2C, 0x01


class Remote:
    """QEMU with one controller and one disk, and a client of it."""

    def __init__(
        self, stack: ExitStack, directory: Path, name: str, *words: str, timeout: float = 5.0
    ) -> None:
        ours, theirs = socket.socketpair()
        image = directory / "disk.img"
        if not image.exists():
            image.write_bytes(bytes(1 << 20))
        command = [
            QEMU, "-machine", "x-remote", "-nodefaults", "-display", "none", "-device", "lsi53c895a,id=lsi0",
            "-drive", f"id=d,file={image},format=raw,if=none,file.locking=off",
            "-device", "scsi-hd,drive=d,bus=lsi0.0,scsi-id=0",
            "-object", f"x-remote-object,id=r,devid=lsi0,fd={theirs.fileno()}",
            "-qmp", f"unix:{directory}/{name}.qmp,server=on,wait=off", *words,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        self.client = Client(ours, name, timeout)
        stack.callback(self.client.close)
        self.monitor = Monitor("qemu", lambda *_: None, lambda: None)
        stack.callback(self.monitor.close)
        self.monitor.connect(f"{directory}/{name}.qmp", alive=lambda: self.process.poll() is None)
        # What comes before QEMU's main loop runs is undone by the reset with which its start ends.
        self.monitor.execute("query-status")

    def moved(self) -> bool:
        status = self.monitor.execute("query-migrate").get("status")
        assert status != "failed"
        return bool(status == "completed")

    def place(self) -> None:
        """As a guest's firmware does."""
        self.client.config_write(0x10, 4, _PORTS)
        self.client.config_write(0x14, 4, _MEMORY)
        self.client.config_write(0x04, 2, 0x0007)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def test_it_is_configured_and_its_registers_are_where_its_bars_say(stack: ExitStack, tmp_path: Path) -> None:
    remote = Remote(stack, tmp_path, "lsi0")
    client = remote.client
    assert client.config_read(0, 4) == 0x0012_1000
    client.config_write(0x14, 4, 0xFFFF_FFFF)
    assert client.config_read(0x14, 4) == 0xFFFF_FC00
    remote.place()
    client.bar_write(_MEMORY + _SCRATCH_A, 4, 0x1234_5678)
    assert client.bar_read(_MEMORY + _SCRATCH_A, 4) == 0x1234_5678
    assert client.bar_read(_PORTS + _SCRATCH_A, 2, memory=False) == 0x5678
    client.reset()
    assert client.config_read(0, 4) == 0x0012_1000


def test_it_reads_and_writes_the_memory_that_is_shared_with_it(stack: ExitStack, tmp_path: Path) -> None:
    """A program of the controller's own, in guest memory: move 64 bytes from there to there, and interrupt."""
    remote = Remote(stack, tmp_path, "lsi0")
    memory = create_memfd("guest", _SIZE)
    stack.callback(os.close, memory)
    remote.client.share_memory([Sysmem(0, _SIZE, 0)], [memory])
    remote.place()
    os.pwrite(memory, struct.pack("<IIIII", 0xC000_0040, 0x2000, 0x3000, 0x9808_0000, 0), 0x1000)
    os.pwrite(memory, bytes(range(64)), 0x2000)
    interrupt, resample = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    remote.client.connect_irq(interrupt, resample)
    remote.client.bar_write(_MEMORY + _DSP, 4, 0x1000)
    eventually(lambda: bool(remote.client.bar_read(_MEMORY + _ISTAT, 1) & _DIP), "the program ends")
    assert os.pread(memory, 64, 0x3000) == bytes(range(64))
    os.close(interrupt)
    os.close(resample)


def test_its_state_leaves_it_running_and_is_loaded_by_another_that_waits(
    stack: ExitStack, tmp_path: Path
) -> None:
    """QMP stop, migrate, cont: what a bridge to such a process stands on."""
    path = tmp_path / "stream"
    here = Remote(stack, tmp_path, "here")
    here.place()
    here.client.bar_write(_MEMORY + _SCRATCH_A, 4, 0xFE44_2211)
    here.monitor.execute("stop")
    here.monitor.execute("migrate", {"uri": f"exec:cat > {path}"})
    eventually(here.moved, "it is saved")
    here.monitor.execute("cont")
    assert here.monitor.execute("query-status")["running"]
    here.client.bar_write(_MEMORY + _SCRATCH_A, 4, 1)
    eventually(lambda: _shown(path).complaint is None, "all of it has come through cat")
    found = _shown(path)
    assert found.stopped_at == path.stat().st_size
    assert any("lsiscsi" in section.name for section in found.sections)

    there = Remote(stack, tmp_path, "there", "-incoming", "defer")
    there.monitor.execute("migrate-incoming", {"uri": f"exec:cat {path}"})
    eventually(there.moved, "it is loaded")
    assert there.client.config_read(0x14, 4) == _MEMORY
    assert there.client.bar_read(_MEMORY + _SCRATCH_A, 4) == 0xFE44_2211
    assert here.client.bar_read(_MEMORY + _SCRATCH_A, 4) == 1


def _shown(path: Path) -> stream.StreamSummary:
    """As `ferry blob` reads it."""
    with path.open("rb") as file:
        return stream.read(file)


def test_what_comes_before_its_main_loop_runs_is_answered_and_undone() -> None:
    """By the reset with which QEMU's start ends: so whoever drives one asks its monitor something first."""
    ours, theirs = socket.socketpair()
    command = [
        QEMU,
        "-machine",
        "x-remote",
        "-nodefaults",
        "-display",
        "none",
        "-device",
        "lsi53c895a,id=lsi0",
    ]
    with subprocess.Popen(
        [*command, "-object", f"x-remote-object,id=r,devid=lsi0,fd={theirs.fileno()}"],
        pass_fds=[theirs.fileno()],
    ) as process:
        theirs.close()
        client = Client(ours, "lsi0", 10.0)
        client.config_write(0x14, 4, _MEMORY)
        eventually(lambda: client.config_read(0x14, 4) == 0, "it is undone", 10.0)
        client.close()
        process.kill()


def test_one_that_hangs_and_one_that_is_gone_are_told_apart_in_time(stack: ExitStack, tmp_path: Path) -> None:
    """There is no heartbeat: a deadline for every call is one."""
    remote = Remote(stack, tmp_path, "lsi0", timeout=0.5)
    remote.client.config_read(0, 4)
    os.kill(remote.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(DeviceTimeout, match="has not answered") as hangs:
        remote.client.config_read(0, 4)
    assert hangs.value.device == "lsi0"
    assert time.monotonic() - began < 2.0
    with pytest.raises(DeviceTimeout):
        remote.client.config_read(0x10, 4)
    os.kill(remote.process.pid, signal.SIGCONT)
    # The late answers are theirs who asked, and nobody else's.
    assert remote.client.config_read(0x3D, 1) == 0x01
    assert remote.client.config_read(0, 4) == 0x0012_1000
    gone = Remote(stack, tmp_path, "lsi1")
    gone.client.config_read(0, 4)
    gone.process.kill()
    gone.process.wait()
    with pytest.raises(DeviceGone):
        gone.client.config_read(0, 4)
