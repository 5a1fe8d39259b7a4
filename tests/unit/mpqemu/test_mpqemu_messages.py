"""The device's side of multi-process QEMU's protocol, with a peer that plays QEMU: good, wrong and hostile."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.kit import Device, RegionInfo
from devices.kit.mpqemu import MpqemuBackend
from devices.kit.runtime import Runtime
from devices.protocols.mpqemu import messages as m
from devices.protocols.mpqemu.messages import BarAccess, Command, ConfigAccess, Sysmem
from devices.protocols.mpqemu.server import Server
from devices.rtc import Rtc
from devices.uart16550 import Uart16550
from devices.virtio_blk import VirtioBlk
from migrate.errors import UsageError
from migrate.memory.memfd import create_memfd
from migrate.state.lifecycle import DeviceState

_PORT = 0xC000


class Peer:
    """QEMU's end of the connection."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(path)

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        if fds:
            socket.send_fds(self.socket, [data], list(fds))
        else:
            self.socket.sendall(data)

    def answer(self) -> int | None:
        """The value; None for an answer without one."""
        command, size = m.HEADER.unpack(self._exactly(m.HEADER.size))
        assert command == Command.RET
        return int(struct.unpack("=Q", self._exactly(size))[0]) if size else None

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            got = self.socket.recv(size - len(data))
            assert got, "the device has closed the connection"
            data += got
        return data

    def config(self, offset: int, size: int, value: int | None = None) -> int | None:
        command = Command.PCI_CFGREAD if value is None else Command.PCI_CFGWRITE
        self.send(m.encode_config(command, ConfigAccess(offset, value or 0, size)))
        return self.answer()

    def bar(self, address: int, size: int, value: int | None = None, *, memory: bool = False) -> int | None:
        command = Command.BAR_READ if value is None else Command.BAR_WRITE
        self.send(m.encode_bar(command, BarAccess(address, value or 0, size, memory)))
        return self.answer()

    def is_dropped(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


class Rig:
    def __init__(self, path: str, device: Device, *, start: bool = True) -> None:
        self.device = device
        self.runtime = Runtime(device)
        self.server = Server(path, MpqemuBackend(device, self.runtime))
        if start:
            self.runtime.start()
        self.server.start()
        self.path = path
        self.peers: list[Peer] = []

    def peer(self) -> Peer:
        self.peers.append(Peer(self.path))
        return self.peers[-1]

    def close(self) -> None:
        for peer in self.peers:
            peer.socket.close()
        self.server.close()
        self.device.close()


@pytest.fixture
def uart(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(f"{tmp_path}/s", Uart16550("port0", {"output": f"{tmp_path}/out"}))
    yield rig
    rig.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Rig]:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    rig = Rig(f"{tmp_path}/s", VirtioBlk("disk0", {"image": f"{tmp_path}/image"}))
    yield rig
    rig.close()


def _settle(rig: Rig) -> None:
    """Until all that was sent is carried out."""
    rig.peers[-1].config(0, 2)


def test_qemu_learns_the_size_of_a_bar_by_writing_ones(uart: Rig) -> None:
    peer = uart.peer()
    assert peer.config(0x00, 4) == 0x0002_1B36
    peer.config(0x10, 4, 0xFFFF_FFFF)
    found = peer.config(0x10, 4)
    assert found is not None
    assert found & 1  # ports
    assert ~(found & 0xFFFF_FFF0) + 1 & 0xFFFF_FFFF == 16  # QEMU's arithmetic: no less than 16
    peer.config(0x28, 4, 0xFFFF_FFFF)
    assert peer.config(0x28, 4) == 0


def test_registers_are_where_the_bar_says_and_only_while_it_is_decoded(uart: Rig, tmp_path: Path) -> None:
    peer = uart.peer()
    peer.config(0x10, 4, _PORT)
    assert peer.bar(_PORT + 7, 1, 0x5A) == m.REFUSED
    peer.config(0x04, 2, 1)
    assert peer.bar(_PORT + 7, 1, 0x5A) == 0
    assert peer.bar(_PORT + 7, 1) == 0x5A
    assert peer.bar(_PORT + 7, 1, memory=True) == m.REFUSED
    assert peer.bar(_PORT + 8, 1) == m.REFUSED
    assert peer.bar(_PORT + 7, 2) == m.REFUSED  # half of it is nobody's
    for byte in b"hi\n":
        peer.bar(_PORT, 1, byte)
    assert (tmp_path / "out").read_bytes() == b"hi\n"


def test_a_reset_is_one_of_the_device_and_of_its_function(uart: Rig) -> None:
    peer = uart.peer()
    peer.config(0x10, 4, _PORT)
    peer.config(0x04, 2, 1)
    peer.bar(_PORT + 3, 1, 0x1B)
    peer.send(m.encode(Command.DEVICE_RESET))
    assert peer.answer() is None
    assert peer.config(0x04, 2) == 0
    assert peer.config(0x10, 4) == 1
    assert isinstance(uart.device, Uart16550)
    assert uart.device.lcr == 0


def test_an_interrupt_is_signalled_through_the_eventfd(uart: Rig) -> None:
    peer = uart.peer()
    peer.config(0x10, 4, _PORT)
    peer.config(0x04, 2, 1)
    interrupt, resample = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
    peer.send(m.encode(Command.SET_IRQFD), (interrupt, resample))
    peer.bar(_PORT + 1, 1, 0x02)  # transmitter empty: at once
    assert os.eventfd_read(interrupt) == 1
    os.close(interrupt)
    os.close(resample)


def test_a_device_that_stands_still_answers_with_ones(uart: Rig) -> None:
    peer = uart.peer()
    peer.config(0x10, 4, _PORT)
    peer.config(0x04, 2, 1)
    uart.runtime.set_state(DeviceState.RUNNING_P2P)
    uart.runtime.set_state(DeviceState.STOP)
    assert peer.bar(_PORT + 7, 1) == m.REFUSED


def test_a_function_of_its_own_is_shown_as_it_is(disk: Rig) -> None:
    peer = disk.peer()
    assert peer.config(0x00, 4) == 0x1042_1AF4
    peer.config(0x10, 4, 0xFFFF_FFFF)
    assert peer.config(0x10, 4) == 0xFFFF_8000
    peer.config(0x10, 4, 0xE000_0000)
    peer.config(0x04, 2, 2)
    assert peer.bar(0xE000_0000 + 0x12, 2, memory=True) == 2  # num_queues of the common configuration


def test_memory_is_what_was_said_last(disk: Rig) -> None:
    peer = disk.peer()
    _settle(disk)
    first, second = create_memfd("one", 1 << 20), create_memfd("two", 1 << 20)
    os.pwrite(first, b"first", 0)
    os.pwrite(second, b"second", 4096)
    before = len(os.listdir("/proc/self/fd"))
    peer.send(m.encode_sysmem([Sysmem(0, 1 << 20, 0)]), (first,))
    _settle(disk)
    assert disk.device.memory.read(0, 5) == b"first"
    kept = disk.device.memory.windows[0]
    two = [Sysmem(0, 1 << 20, 0), Sysmem(1 << 32, 8192, 4096)]
    peer.send(m.encode_sysmem(two), (first, second))
    _settle(disk)
    assert kept in disk.device.memory.windows  # what is as it was stays mapped
    assert disk.device.memory.read(1 << 32, 6) == b"second"
    peer.send(m.encode_sysmem([]))
    _settle(disk)
    assert disk.device.memory.windows == ()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(first)
    os.close(second)


def _dropped_without_a_trace(rig: Rig, data: bytes, fds: tuple[int, ...] = ()) -> None:
    peer = rig.peer()
    peer.config(0, 2)
    before = len(os.listdir("/proc/self/fd"))
    peer.send(data, fds)
    peer.socket.shutdown(socket.SHUT_WR)
    assert peer.is_dropped()
    peer.socket.close()
    after = rig.peer()  # the next one is served
    assert after.config(0x00, 2) is not None
    assert len(os.listdir("/proc/self/fd")) <= before
    assert rig.device.memory.windows == ()
    after.socket.close()


BAD = {
    "an unknown command": m.HEADER.pack(99, 0),
    "a command of nobody's": m.HEADER.pack(Command.RET, 8) + bytes(8),
    "a size that would be an allocation": m.HEADER.pack(Command.SYNC_SYSMEM, 1 << 60),
    "too short a message": m.HEADER.pack(Command.BAR_READ, 8) + bytes(8),
    "an end within a message": m.HEADER.pack(Command.BAR_READ, 24) + bytes(5),
    "three bytes of configuration": m.encode_config(Command.PCI_CFGREAD, ConfigAccess(0, 0, 3)),
    "beyond the configuration": m.encode_config(Command.PCI_CFGWRITE, ConfigAccess(254, 0, 4)),
    "sixteen bytes of a BAR": m.encode_bar(Command.BAR_READ, BarAccess(0, 0, 16, True)),
    "an interrupt without descriptors": m.encode(Command.SET_IRQFD),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_a_message_ends_the_connection(disk: Rig, what: str) -> None:
    _dropped_without_a_trace(disk, BAD[what])


def test_memory_that_cannot_be_is_refused_and_no_descriptor_stays(disk: Rig) -> None:
    sealed, plain = create_memfd("sealed", 8192), os.memfd_create("plain")
    os.truncate(plain, 8192)
    one = (sealed,)
    wrong: list[tuple[list[Sysmem], tuple[int, ...]]] = [
        ([Sysmem(0, 8192, 0)], (plain,)),
        ([Sysmem(0, 1 << 40, 0)], one),
        ([Sysmem(0, 8192, -4096)], one),
        ([Sysmem(0, 0, 0)], one),
        ([Sysmem((1 << 64) - 4096, 8192, 0)], one),
        ([Sysmem(0, 8192, 0), Sysmem(4096, 8192, 0)], (sealed, sealed)),
        ([Sysmem(0, 8192, 0)], (sealed,) * 9),
    ]
    for regions, fds in wrong:
        _dropped_without_a_trace(disk, m.encode_sysmem(regions), fds)
    os.close(sealed)
    os.close(plain)


def test_the_end_of_qemu_is_the_end_of_power(uart: Rig) -> None:
    peer = uart.peer()
    peer.config(0x10, 4, _PORT)
    peer.config(0x04, 2, 1)
    peer.bar(_PORT + 3, 1, 0x1B)
    peer.socket.close()
    after = uart.peer()
    assert after.config(0x04, 2) == 0
    assert isinstance(uart.device, Uart16550)
    assert uart.device.lcr == 0


def test_a_device_that_is_no_pci_function_says_so(tmp_path: Path) -> None:
    class Plain(Device):
        type = "rtc"
        regions = (RegionInfo(16),)

    with pytest.raises(UsageError, match="no PCI function"):
        MpqemuBackend(Plain("plain0"), Runtime(Plain("plain0")))


def test_such_a_device_says_that_it_cannot_be_moved() -> None:
    device = Rtc("rtc0")
    assert device.obstacle() == ""
    MpqemuBackend(device, Runtime(device))
    assert "x-pci-proxy-dev" in device.obstacle()


@given(st.binary(max_size=300))
def test_no_bytes_of_a_header_are_more_than_an_error(data: bytes) -> None:
    if len(data) < m.HEADER.size:
        return
    try:
        command, size = m.header_of(data)
    except m.BadMessage:
        return
    assert size == m.SHAPES[command][0]


def test_accesses_of_two_threads_do_not_mix(uart: Rig) -> None:
    """The bus reads the state while QEMU writes registers."""
    peer = uart.peer()
    peer.config(0x10, 4, _PORT)
    peer.config(0x04, 2, 1)
    seen: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            with uart.device.lock:
                seen.append(uart.device.save()["scr"])  # type: ignore[arg-type]

    thread = threading.Thread(target=look)
    thread.start()
    for value in range(200):
        peer.bar(_PORT + 7, 1, value)
        assert peer.bar(_PORT + 7, 1) == value
    done.set()
    thread.join()
    assert seen == sorted(seen)
