"""A network function behind vhost-user: frames out, frames in, and what a stop leaves where it was."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vhost_front_end import (
    GET_BASE,
    GET_PROTOCOL,
    LOG_ALL,
    PROTOCOL,
    SEND_RARP,
    SET_PROTOCOL,
    FrontEnd,
    Refused,
)
from virtio_driver import EVENT_IDX, INDIRECT_DESC, VERSION_1, Ring
from virtio_rig import make_memory

from devices.vhost_net import VhostUserNet
from devices.virtio.net import RX, TX
from migrate.errors import DeviceRefused, UsageError

ACCEPTED = VERSION_1 | EVENT_IDX | INDIRECT_DESC
HEADER = bytes(10) + b"\1\0"
BUFFER = 2048


class Net:
    """The device, a front end with both rings, and the far end of its port."""

    def __init__(self, directory: Path) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(directory / "switch"))
        listener.listen(1)
        path = str(directory / "vhost")
        self.device = VhostUserNet("net0", {"vhost_user": path, "peer": str(directory / "switch")})
        self.port, _ = listener.accept()
        self.port.settimeout(5)
        listener.close()
        with self.device.lock:
            self.device.start(0)
            self.device.leave_p2p()
        self.memory = make_memory()
        self.front = FrontEnd(path, self.memory)
        self.front.realize(2)
        self.rings: list[Ring] = []
        self.heads: dict[int, int] = {}

    def run(self, features: int = ACCEPTED) -> None:
        self.front.features(features | PROTOCOL)
        self.front.table()
        for number, base in ((RX, 0x10000), (TX, 0x20000)):
            self.rings.append(Ring(self.front.guest, base, 8, event_idx=bool(features & EVENT_IDX)))
            self.front.start(number, self.rings[number])

    def offer_buffers(self, count: int) -> None:
        for number in range(count):
            at = 0x40000 + number * BUFFER
            head = self.rings[RX].chain([(at, 12, True), (at + 12, BUFFER - 12, True)])
            self.heads[head] = at
            self.rings[RX].offer(head)
        os.eventfd_write(self.front.kicks[RX], 1)

    def received(self, count: int) -> list[bytes]:
        """So many frames with their headers, as the driver finds them."""
        found: list[bytes] = []
        deadline = time.monotonic() + 5
        while len(found) < count:
            for head, written in self.rings[RX].returned():
                found.append(self.front.guest.read(self.heads[head], written))
            assert time.monotonic() < deadline, f"{len(found)} of {count} frames"
            time.sleep(0.001)
        return found

    def send(self, frame: bytes, header: bytes = HEADER) -> None:
        guest = self.front.guest
        guest.write(0x60000, header)
        guest.write(0x61000, frame)
        self.rings[TX].offer(
            self.rings[TX].chain([(0x60000, len(header), False), (0x61000, len(frame), False)])
        )
        os.eventfd_write(self.front.kicks[TX], 1)

    def close(self) -> None:
        self.front.close()
        self.device.close()
        assert self.device.server.ended(5)
        self.port.close()
        self.memory.close()


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    net = Net(tmp_path)
    yield net
    net.close()


def test_a_frame_goes_out_as_the_driver_gave_it(net: Net) -> None:
    net.run()
    net.send(b"hello, network")
    assert net.port.recv(9000) == b"hello, network"


def test_frames_come_in_order_each_behind_a_header(net: Net) -> None:
    net.run()
    net.offer_buffers(3)
    for number in range(3):
        net.port.send(b"frame %d" % number)
    assert net.received(3) == [HEADER + b"frame %d" % number for number in range(3)]


def test_a_driver_of_old_has_a_shorter_header(net: Net) -> None:
    net.run(0)
    net.offer_buffers(1)
    net.port.send(b"x")
    assert net.received(1) == [bytes(10) + b"x"]
    net.send(b"y", bytes(10))
    assert net.port.recv(9000) == b"y"


def test_frames_wait_in_the_port_while_there_is_no_buffer(net: Net) -> None:
    net.run()
    for number in range(4):
        net.port.send(b"%d" % number)
    time.sleep(0.05)
    net.offer_buffers(2)
    assert [frame[12:] for frame in net.received(2)] == [b"0", b"1"]
    net.offer_buffers(2)
    assert [frame[12:] for frame in net.received(2)] == [b"2", b"3"]


def test_a_frame_that_fits_no_buffer_is_dropped_and_the_next_is_not(net: Net) -> None:
    net.run()
    net.offer_buffers(2)
    net.port.send(bytes(BUFFER))
    net.port.send(b"small")
    found = net.received(2)
    assert found == [b"", HEADER + b"small"]


def test_a_stop_takes_nothing_that_it_does_not_deliver_and_another_goes_on(net: Net) -> None:
    net.run()
    net.offer_buffers(4)
    net.port.send(b"before")
    net.received(1)
    state = struct.Struct("=II")
    assert state.unpack(net.front.ask(GET_BASE, state.pack(RX, 0))) == (RX, 1)
    net.port.send(b"meanwhile")
    time.sleep(0.05)
    assert net.rings[RX].returned() == []
    net.front.start(RX, net.rings[RX], 1)
    assert net.received(1) == [HEADER + b"meanwhile"]


def test_what_it_writes_is_in_the_log(net: Net) -> None:
    net.run()
    fd = net.front.begin_log()
    net.front.features(ACCEPTED | PROTOCOL | LOG_ALL)
    net.offer_buffers(1)
    net.port.send(b"logged")
    net.received(1)
    bits = os.pread(fd, 4096, 0)
    assert {page for page in range(512) if bits[page // 8] >> page % 8 & 1} >= {
        0x40,
        net.rings[RX].used >> 12,
    }


def test_a_stopped_device_is_silent_and_says_so(net: Net) -> None:
    net.run()
    with net.device.lock:
        net.device.enter_p2p()
        assert "stopped" in net.device.not_serving()
    net.offer_buffers(1)
    net.port.send(b"later")
    time.sleep(0.05)
    assert net.rings[RX].returned() == []
    with net.device.lock:
        net.device.leave_p2p()
        assert net.device.not_serving() == ""
    assert net.received(1) == [HEADER + b"later"]


@pytest.mark.parametrize("buffers", [0, 2])
def test_a_switch_that_was_started_again_is_found_again_and_nothing_spins_until_then(
    net: Net, tmp_path: Path, buffers: int
) -> None:
    net.run()
    net.offer_buffers(buffers)
    net.port.close()
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    net.send(b"into the void")
    (tmp_path / "switch").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "switch"))
        listener.listen(1)
        listener.settimeout(5)
        net.port, _ = listener.accept()
    net.port.settimeout(5)
    if not buffers:
        net.offer_buffers(1)
    net.port.send(b"here again")
    assert net.received(1) == [HEADER + b"here again"]
    net.send(b"out again")
    assert net.port.recv(9000) == b"out again"


#: As RFC 903 has it, from and for the guest, and as short as a frame may be.
RARP = bytes.fromhex(
    "ffffffffffff 525400abcd01 8035 0001 0800 06 04 0003 525400abcd01 00000000 525400abcd01 00000000"
)
_MAC = bytes.fromhex("525400abcd01 0000")


def test_the_guests_address_is_announced_to_its_network(net: Net) -> None:
    net.run()
    net.front.tell(SEND_RARP, _MAC)
    assert net.port.recv(9000) == RARP.ljust(60, b"\0")


def test_it_is_not_announced_before_the_guest_may_run_here(net: Net) -> None:
    with net.device.lock:
        net.device.enter_p2p()
    net.front.tell(SEND_RARP, _MAC)
    net.port.settimeout(0.2)
    with pytest.raises(TimeoutError):
        net.port.recv(9000)
    with net.device.lock:
        net.device.leave_p2p()
        net.device.enter_p2p()
        net.device.leave_p2p()
    assert net.port.recv(9000)[:42] == RARP
    with pytest.raises(TimeoutError):  # once
        net.port.recv(9000)


@pytest.mark.parametrize("payload", [_MAC[:6], _MAC + b"\0", b""])
def test_an_announcement_of_another_size_is_refused(net: Net, payload: bytes) -> None:
    with pytest.raises(Refused):
        net.front.tell(SEND_RARP, payload)


def test_an_announcement_that_was_not_agreed_on_is_refused(net: Net) -> None:
    net.front.send(SET_PROTOCOL, struct.pack("=Q", net.front.ask_u64(GET_PROTOCOL) & ~(1 << 2)))
    with pytest.raises(Refused):
        net.front.tell(SEND_RARP, _MAC)


@pytest.mark.parametrize("size", [0, 12])
def test_what_is_no_frame_stops_its_ring_alone(net: Net, size: int) -> None:
    net.run()
    net.send(b"", bytes(size) or b"\0")
    time.sleep(0.05)
    net.offer_buffers(1)
    net.port.send(b"still")
    assert net.received(1) == [HEADER + b"still"]


def test_its_state_is_what_was_negotiated(net: Net) -> None:
    net.run()
    state = net.device.save()
    assert state == {"features": ACCEPTED}
    net.device.check(state)
    with pytest.raises(DeviceRefused, match="does not offer"):
        net.device.check({"features": 1 << 5})


def test_without_somebody_to_take_frames_it_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nobody takes frames"):
        VhostUserNet("net0", {"vhost_user": str(tmp_path / "v"), "peer": str(tmp_path / "none")})
    with pytest.raises(UsageError, match="needs a peer"):
        VhostUserNet("net0", {"vhost_user": str(tmp_path / "v")})
