"""A bridge to an x-remote QEMU in this process, and the VMM's client before it, with the controller driven through both."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from devices.bridges.models import command_of
from devices.bridges.xremote.bridge import Bridge
from devices.bridges.xremote.command import BUILT_IN
from devices.bridges.xremote.front import Front
from devices.bridges.xremote.remote import Remote
from devices.kit.runtime import Runtime
from devices.protocols.vfio_user.client import Client
from devices.protocols.vfio_user.server import Server
from devices.virtio.backing import Image
from migrate.memory.memfd import create_memfd
from tests.faults.rig import eventually
from tests.interop.qemu_world import QEMU
from tests.interop.scripts import Controller, read

SIZE = 64 << 20
CONFIG = 7
SECTORS = 8192
BIG = read(0, SECTORS)  # takes QEMU several steps
#: The controller's script RAM: a BAR whose every byte can be written and read back.
RAM = 2
#: Besides the built-in one, other functions of QEMU's that have an INTx.
MODELS = {
    **BUILT_IN,
    **{
        name: (QEMU, "-device", f"{name},id={{id}}")
        for name in (
            "e1000",
            "virtio-scsi-pci",
            "mptsas1068",
            "rtl8139",
            "pci-serial",
            "secondary-vga",
            "ich9-ahci",
        )
    },
    "nvme": (
        QEMU,
        "-drive",
        "file={image},id=n,if=none,format=raw,file.locking=off",
        "-device",
        "nvme,id={id},drive=n,serial=1",
    ),
}
NAME = "scsi0"


class Bridged:
    def __init__(
        self, directory: Path, image: Path, *, incoming: bool = False, model: str = "lsi53c895a"
    ) -> None:
        directory.mkdir()
        self.ends: list[str] = []
        options = {"model": model, **({"image": str(image)} if "{image}" in " ".join(MODELS[model]) else {})}
        words = command_of(MODELS, options, {"id": NAME}, "x-remote")
        self.remote = Remote(NAME, words, str(directory / "qmp"), directory / "qemu.log", self.ends.append)
        locked = Image(str(image), read_only=False) if "image" in options else None
        self.bridge = Bridge(NAME, self.remote, model, locked, incoming=incoming)
        self.runtime = Runtime(self.bridge, tracker="compare")
        self._server = Server(str(directory / "vmm"), Front(self.bridge))
        self._server.start()
        self._path = str(directory / "vmm")
        self.memory = create_memfd("guest", SIZE)
        self.runtime.attach_memory(0, SIZE, os.dup(self.memory), 0)
        self.interrupt = os.eventfd(0, os.EFD_NONBLOCK)
        self.connect()
        self.controller = Controller(self, self.memory)
        if incoming:
            self.go("RESUMING")

    def connect(self) -> None:
        """A VMM comes."""
        self.vmm = Client.connect(self._path, device=NAME)
        self.vmm.dma_map(0, SIZE, self.memory)
        self.vmm.set_irq_eventfd(0, self.interrupt, 0)

    def read(self, offset: int) -> int:
        return self.vmm.region_read(0, offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.vmm.region_write(0, offset, 1, value)

    def go(self, state: str) -> None:
        self.runtime.set_state(state)

    def power_on(self) -> None:
        """As a machine does, and its firmware."""
        self.go("RUNNING")
        self.vmm.region_write(CONFIG, 0x04, 2, 0x0007)
        self.controller.open()

    def interrupted(self) -> bool:
        try:
            os.eventfd_read(self.interrupt)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self.vmm.close()
        self._server.close()
        self.bridge.close()
        self.bridge.memory.attached.close()
        for fd in (self.memory, self.interrupt):
            os.close(fd)


Make = Callable[..., Bridged]


def move(source: Bridged, destination: Bridged) -> int:
    """As the coordinators do it; bytes of the stream. Guest memory goes along."""
    source.go("PRE_COPY")
    destination.runtime.check_incoming(source.runtime.save_as(1))
    source.go("STOP_COPY")
    size = carry(source, destination)
    for at in range(0, SIZE, 1 << 20):
        os.pwrite(destination.memory, os.pread(source.memory, 1 << 20, at), at)
    destination.runtime.stage(source.runtime.save_as(1))
    destination.runtime.apply()
    destination.go("STOP")
    return size


def carry(source: Bridged, destination: Bridged, most: int = 16 << 20) -> int:
    streamed, size = source.bridge.streamed, 0
    assert streamed is not None
    while True:
        chunk, left = streamed.read_chunk(most)
        destination.runtime.take_chunk(chunk)
        size += len(chunk)
        if not left:
            return size


@contextmanager
def bridges() -> Iterator[Make]:
    """Bridges over one image. No process and no descriptor of theirs is left."""
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    image = directory / "disk.img"
    image.write_bytes(b"".join(struct.pack("<I", sector) * 128 for sector in range(SECTORS)))
    before = len(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        made: list[Bridged] = []

        def one(**fields: object) -> Bridged:
            made.append(Bridged(directory / str(len(made)), image, **fields))  # type: ignore[arg-type]
            stack.callback(made[-1].close)
            return made[-1]

        yield one
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, "no descriptor is left")
    shutil.rmtree(directory)


def sectors(data: bytes) -> list[int]:
    return [struct.unpack_from("<I", data, at)[0] for at in range(0, len(data), 512)]


def slow(bridged: Bridged, bytes_a_second: int) -> None:
    limits = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    assert bridged.remote._monitor is not None
    bridged.remote._monitor.execute(
        "block_set_io_throttle", {"device": f"{NAME}-disk", "bps": bytes_a_second, **limits}
    )


def chunks_of(here: Bridged) -> list[bytes]:
    assert here.bridge.streamed is not None
    sent, left = [], 1
    while left:
        chunk, left = here.bridge.streamed.read_chunk(4096)
        sent.append(chunk)
    return sent
