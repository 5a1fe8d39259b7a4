"""The device's side of multi-process QEMU's protocol, with a peer that plays QEMU: good, wrong and hostile."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.kit import Device, RegionInfo
from devices.kit.mpqemu import MpqemuBackend
from devices.kit.runtime import Runtime
from devices.protocols.mpqemu import messages as m
from devices.protocols.mpqemu.client import Client
from devices.protocols.mpqemu.messages import BarAccess, Command, ConfigAccess, Sysmem
from devices.protocols.mpqemu.server import Server
from devices.rtc import Rtc
from devices.uart16550 import Uart16550
from devices.virtio_blk import VirtioBlk
from migrate.errors import DeviceRefused, DeviceTimeout, UsageError
from migrate.memory.memfd import create_memfd
from migrate.state.lifecycle import DeviceState

_PORT = 0xC000


class Peer(Client):
    """QEMU's end of the connection; it can also say what QEMU never would."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        super().__init__(self.socket, "dev0", 5.0)

    def say(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        if fds:
            socket.send_fds(self.socket, [data], list(fds))
        else:
            self.socket.sendall(data)

    def settle(self) -> None:
        """Until all that was sent is carried out."""
        self.config_read(0, 2)

    def place(self) -> None:
        """As firmware does with the ports of a uart."""
        self.config_write(0x10, 4, _PORT)
        self.config_write(0x04, 2, 1)

    def port(self, offset: int) -> int:
        return self.bar_read(_PORT + offset, 1, memory=False)

    def set_port(self, offset: int, value: int) -> None:
        self.bar_write(_PORT + offset, 1, value, memory=False)

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


def test_qemu_learns_the_size_of_a_bar_by_writing_ones(uart: Rig) -> None:
    peer = uart.peer()
    assert peer.config_read(0x00, 4) == 0x0002_1B36
    peer.config_write(0x10, 4, 0xFFFF_FFFF)
    found = peer.config_read(0x10, 4)
    assert found & 1  # ports
    assert ~(found & 0xFFFF_FFF0) + 1 & 0xFFFF_FFFF == 16  # QEMU's arithmetic: no less than 16
    peer.config_write(0x28, 4, 0xFFFF_FFFF)
    assert peer.config_read(0x28, 4) == 0


def test_registers_are_where_the_bar_says_and_only_while_it_is_decoded(uart: Rig, tmp_path: Path) -> None:
    peer = uart.peer()
    peer.config_write(0x10, 4, _PORT)
    peer.set_port(7, 0x5A)
    assert peer.port(7) == 0xFF  # nobody answers
    peer.config_write(0x04, 2, 1)
    assert peer.port(7) == 0
    peer.set_port(7, 0x5A)
    assert peer.port(7) == 0x5A
    assert peer.bar_read(_PORT + 7, 1, memory=True) == 0xFF
    assert peer.port(8) == 0xFF
    assert peer.bar_read(_PORT + 7, 2, memory=False) == 0xFFFF  # half of it is nobody's
    for byte in b"hi\n":
        peer.set_port(0, byte)
    assert (tmp_path / "out").read_bytes() == b"hi\n"


def test_a_reset_is_one_of_the_device_and_of_its_function(uart: Rig) -> None:
    peer = uart.peer()
    peer.place()
    peer.set_port(3, 0x1B)
    peer.reset()
    assert peer.config_read(0x04, 2) == 0
    assert peer.config_read(0x10, 4) == 1
    assert isinstance(uart.device, Uart16550)
    assert uart.device.lcr == 0


def test_an_interrupt_is_signalled_through_the_eventfd(uart: Rig) -> None:
    peer = uart.peer()
    peer.place()
    interrupt, resample = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
    peer.connect_irq(interrupt, resample)
    peer.set_port(1, 0x02)  # transmitter empty: at once
    assert os.eventfd_read(interrupt) == 1
    os.close(interrupt)
    os.close(resample)


def test_a_device_that_stands_still_answers_with_ones(uart: Rig) -> None:
    peer = uart.peer()
    peer.place()
    uart.runtime.set_state(DeviceState.RUNNING_P2P)
    uart.runtime.set_state(DeviceState.STOP)
    assert peer.port(7) == 0xFF


def test_a_device_that_fails_is_answered_for(uart: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU waits for every answer, and the whole guest with it."""
    peer = uart.peer()
    peer.place()
    monkeypatch.setattr(uart.device, "read", lambda *_: 1 // 0)
    assert peer.port(7) == 0xFF
    monkeypatch.undo()
    assert peer.port(7) == 0
    monkeypatch.setattr(uart.device, "reset", lambda: 1 // 0)
    peer.socket.close()
    monkeypatch.undo()
    assert uart.peer().config_read(0, 2) == 0x1B36


def test_a_function_of_its_own_is_shown_as_it_is(disk: Rig) -> None:
    peer = disk.peer()
    assert peer.config_read(0x00, 4) == 0x1042_1AF4
    peer.config_write(0x10, 4, 0xFFFF_FFFF)
    assert peer.config_read(0x10, 4) == 0xFFFF_8000
    peer.config_write(0x10, 4, 0xE000_0000)
    peer.config_write(0x04, 2, 2)
    assert peer.bar_read(0xE000_0000 + 0x12, 2) == 2  # num_queues of the common configuration


def test_memory_is_what_was_said_last(disk: Rig) -> None:
    peer = disk.peer()
    peer.settle()
    first, second = create_memfd("one", 1 << 20), create_memfd("two", 1 << 20)
    os.pwrite(first, b"first", 0)
    os.pwrite(second, b"second", 4096)
    before = len(os.listdir("/proc/self/fd"))
    peer.share_memory([Sysmem(0, 1 << 20, 0)], [first])
    peer.settle()
    assert disk.device.memory.read(0, 5) == b"first"
    kept = disk.device.memory.windows[0]
    peer.share_memory([Sysmem(0, 1 << 20, 0), Sysmem(1 << 32, 8192, 4096)], [first, second])
    peer.settle()
    assert kept in disk.device.memory.windows  # what is as it was stays mapped
    assert disk.device.memory.read(1 << 32, 6) == b"second"
    peer.share_memory([], [])
    peer.settle()
    assert disk.device.memory.windows == ()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(first)
    os.close(second)


def _dropped_without_a_trace(rig: Rig, data: bytes, fds: tuple[int, ...] = ()) -> None:
    peer = rig.peer()
    peer.settle()
    before = len(os.listdir("/proc/self/fd"))
    peer.say(data, fds)
    peer.socket.shutdown(socket.SHUT_WR)
    assert peer.is_dropped()
    peer.socket.close()
    after = rig.peer()  # the next one is served
    after.settle()
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
        ([Sysmem(0, 8192, 100)], one),
        ([Sysmem(0, 8192, 0)], (sealed,) * 9),
    ]
    for regions, fds in wrong:
        _dropped_without_a_trace(disk, m.encode_sysmem(regions), fds)
    os.close(sealed)
    os.close(plain)


def test_the_end_of_qemu_is_the_end_of_power(uart: Rig) -> None:
    peer = uart.peer()
    peer.place()
    peer.set_port(3, 0x1B)
    peer.socket.close()
    assert uart.peer().config_read(0x04, 2) == 0
    assert isinstance(uart.device, Uart16550)
    assert uart.device.lcr == 0


def test_a_device_that_is_no_pci_function_says_so(tmp_path: Path) -> None:
    class Plain(Device):
        type = "rtc"
        regions = (RegionInfo(16),)

    with pytest.raises(UsageError, match="no PCI function"):
        MpqemuBackend(Plain("plain0"), Runtime(Plain("plain0")))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("display", "--socket", "SOCKET", "--protocol", "mpqemu"), "no PCI function"),
        (("rtc", "--protocol", "mpqemu"), "without --socket"),
        (("virtio_blk", "--protocol", "vhost-user", "--option", "image=x"), "without --socket"),
        (("rtc", "--socket", "SOCKET", "--protocol", "mpqemu", "--migration", "vfio-user"), "over vfio-user only"),
        (("uart16550", "--socket", "SOCKET", "--protocol", "vhost-user"), "invalid choice"),
    ],
)  # fmt: skip
def test_a_process_that_cannot_speak_so_says_why(tmp_path: Path, words: tuple[str, ...], why: str) -> None:
    module, *rest = (word.replace("SOCKET", f"{tmp_path}/s") for word in words)
    command = [
        sys.executable,
        "-m",
        f"devices.{module}",
        "--id",
        "dev0",
        "--bus",
        "unix:path=/nowhere",
        *rest,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert why in done.stderr.splitlines()[-1]


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


# -- the client, with a device that is not one of ours --------------------------------------------------------------------------


def test_an_answer_byte_by_byte_does_not_outlast_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    client = Client(ours, "slow0", 0.3)
    done = threading.Event()

    def drip() -> None:
        theirs.recv(100)
        for byte in m.encode_ret(7):
            if done.wait(0.05):
                return
            theirs.send(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    began = time.monotonic()
    with pytest.raises(DeviceTimeout, match=r"0\.3 s") as late:
        client.config_read(0, 4)
    assert time.monotonic() - began < 1.0
    assert late.value.device == "slow0"
    done.set()
    thread.join()
    client.close()
    theirs.close()


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_ones() -> None:
    ours, theirs = socket.socketpair()
    client = Client(ours, "slow0", 0.2)
    with pytest.raises(DeviceTimeout):
        client.config_read(0, 4)
    late = m.encode_ret(7)
    theirs.send(late[:20])
    with pytest.raises(DeviceTimeout):
        client.config_read(0, 4)  # which is not sent as long as the first is owed its answer
    theirs.send(late[20:])
    threading.Timer(0.05, lambda: theirs.send(m.encode_ret(9))).start()
    assert client.config_read(0, 4) == 9
    client.close()
    theirs.close()


@pytest.mark.parametrize(
    "answer",
    [
        m.HEADER.pack(Command.BAR_READ, 8) + bytes(8),
        m.HEADER.pack(Command.RET, 4) + bytes(4),
        m.encode_ret(None),
    ],
    ids=["no answer", "four bytes", "no value"],
)
def test_an_answer_that_is_none_is_refused(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    client = Client(ours, "odd0", 1.0)
    theirs.send(answer)
    with pytest.raises(DeviceRefused) as odd:
        client.config_read(0, 4)
    assert odd.value.device == "odd0"
    client.close()
    theirs.close()


def test_more_memory_than_a_message_holds_is_refused_before_it_is_sent() -> None:
    ours, theirs = socket.socketpair()
    client = Client(ours, "dev0", 1.0)
    with pytest.raises(m.BadMessage, match="9 regions"):
        client.share_memory([Sysmem(n << 20, 4096, 0) for n in range(9)], [0] * 9)
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    client.close()
    theirs.close()
