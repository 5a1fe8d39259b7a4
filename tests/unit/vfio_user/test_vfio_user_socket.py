"""Client and server over a real socket: round trips, deadlines, peers that vanish, come back or misbehave."""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vfio_user_backend import MemoryBackend, open_descriptors

from devices.protocols.channel import receive
from devices.protocols.vfio_user import messages as m
from devices.protocols.vfio_user import version as v
from devices.protocols.vfio_user.client import Client, RequestRefused
from devices.protocols.vfio_user.server import Server
from migrate.errors import DeviceGone, DeviceRefused, DeviceTimeout, UsageError


class Serving:
    def __init__(self, path: Path) -> None:
        self.backend = MemoryBackend()
        self.path = str(path)
        self.server = Server(self.path, self.backend)
        self.server.start()

    def client(self, timeout: float = 5.0) -> Client:
        return Client.connect(self.path, device="dev0", timeout=timeout)

    def raw(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.connect(self.path)
        return sock

    def until_the_client_is_gone(self) -> None:
        """A new client is served only after the old one's session was closed; and that one is gone as well, its socket too."""
        self.client().close()
        deadline = time.monotonic() + 5
        while self.server._connection is not None and time.monotonic() < deadline:
            time.sleep(0.001)


@pytest.fixture
def serving(short_dir: Path) -> Iterator[Serving]:
    serving = Serving(short_dir / "s")
    yield serving
    serving.server.close()


def reply(sock: socket.socket) -> m.Header:
    data = b""
    while len(data) < m.HEADER_SIZE:
        more = sock.recv(m.HEADER_SIZE - len(data))
        if not more:
            raise EOFError
        data += more
    header = m.Header._make(m.HEADER.unpack(data))
    rest = header.size - m.HEADER_SIZE
    while rest:
        rest -= len(sock.recv(rest))
    return header


def test_registers_memory_and_interrupts_cross_the_socket(serving: Serving) -> None:
    memory, eventfd = os.memfd_create("x"), os.eventfd(0)
    with serving.client() as client:
        assert client.server == v.OURS
        assert client.info() == m.DeviceInfo(m.DeviceFlags.RESET, 3, 3)
        assert client.region_info(0).size == 4096
        assert client.irq_info(0).count == 1
        client.region_write(0, 8, 4, 0x11223344)
        assert client.region_read(0, 8, 4) == 0x11223344
        assert client.region_read(0, 10, 1) == 0x22
        client.dma_map(0x100000, 0x2000, memory)
        assert serving.backend.windows == {0x100000: 0x2000}
        client.dma_unmap(0x100000, 0x2000)
        client.set_irq_eventfd(0, eventfd)
        os.eventfd_write(serving.backend.eventfds[0, 0], 5)
        assert os.eventfd_read(eventfd) == 5
        client.trigger_irq(0)
        assert serving.backend.triggered == [(0, 0)]
        client.reset()
        assert serving.backend.resets == 1
        client.set_irq_eventfd(0, None)
        assert not serving.backend.eventfds
    os.close(memory)
    os.close(eventfd)


def test_the_largest_access_passes_and_a_larger_one_is_refused(short_dir: Path) -> None:
    serving = Serving(short_dir / "s")
    big = type(serving.backend.regions[0])(2 << 20)
    serving.backend.regions = (big, *serving.backend.regions[1:])
    serving.backend.bytes[0] = bytearray(big.size)
    data = os.urandom(m.MAX_DATA)
    with serving.client() as client:
        client.write_bytes(0, 4096, data)
        assert client.read_bytes(0, 4096, m.MAX_DATA) == data
        with pytest.raises(RequestRefused, match="EINVAL"):
            client.read_bytes(0, 0, m.MAX_DATA + 1)
        assert client.region_read(0, 4096, 1) == data[0]
    serving.server.close()


def test_an_error_reply_names_device_command_and_errno_and_the_connection_goes_on(serving: Serving) -> None:
    with serving.client() as client:
        serving.backend.refuse = errno.EBUSY
        with pytest.raises(RequestRefused, match=r"dev0: vfio-user REGION_READ: .*EBUSY") as caught:
            client.region_read(0, 0, 1)
        assert caught.value.errno == errno.EBUSY
        serving.backend.refuse = 0
        assert client.region_read(0, 0, 1) == 0


def test_a_client_that_vanishes_is_followed_by_the_next_and_the_state_is_kept(serving: Serving) -> None:
    memory, eventfd = os.memfd_create("x"), os.eventfd(0)
    first = serving.client()
    first.region_write(0, 0, 8, 0xABCDEF)
    first.dma_map(0, 4096, memory)
    first.set_irq_eventfd(0, eventfd)
    first._socket.close()  # as if it had been killed
    with serving.client() as second:
        assert serving.backend.windows == {}
        assert not serving.backend.eventfds
        assert second.region_read(0, 0, 8) == 0xABCDEF
        second.dma_map(0, 4096, memory)
    os.close(memory)
    os.close(eventfd)


def test_a_second_client_waits_its_turn_and_its_deadline_says_so(serving: Serving) -> None:
    with serving.client() as first:
        with pytest.raises(DeviceTimeout, match="another client is connected"):
            serving.client(timeout=0.05)
        assert first.region_read(0, 0, 1) == 0


def test_a_device_that_hangs_misses_the_deadline_and_its_late_answer_is_nobody_elses(
    serving: Serving,
) -> None:
    client = serving.client(timeout=0.05)
    with serving.backend.lock:
        before = time.monotonic()
        with pytest.raises(DeviceTimeout, match=r"dev0: no answer to vfio-user REGION_READ within 0\.05 s"):
            client.region_read(0, 0, 1)
        assert time.monotonic() - before < 2
    serving.backend.bytes[0][0:3] = b"\x0a\x0b\x0c"
    client.timeout = 5.0
    client._set_timeout(5.0)
    assert [client.region_read(0, at, 1) for at in (1, 2, 0)] == [0x0B, 0x0C, 0x0A]
    client.close()


def test_a_server_that_ends_is_told_as_gone(serving: Serving) -> None:
    client = serving.client()
    serving.server.close()
    with pytest.raises(DeviceGone, match="dev0"):
        client.region_read(0, 0, 1)
    with pytest.raises(DeviceGone, match="nobody serves vfio-user"):
        serving.client(timeout=0.05)
    client.close()


class FakeDevice:
    """Accepts one client and answers VERSION, then every message as `answer(header, payload)` says."""

    def __init__(self, path: Path, answers: list[bytes]) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen()
        self.answers = answers
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection, self.listener:
            for answer in self.answers:
                if not receive(connection)[0]:
                    return
                connection.sendall(answer)
            receive(connection)


HELLO = m.message(1, m.Command.VERSION, v.Version(0, 1, v.OURS).encode(), m.REPLY)


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (
            m.message(9, m.Command.REGION_READ, m.ACCESS.pack(0, 0, 1) + b"x", m.REPLY),
            DeviceRefused,
            "something else",
        ),
        (
            m.message(2, m.Command.REGION_WRITE, m.ACCESS.pack(0, 0, 1) + b"x", m.REPLY),
            DeviceRefused,
            "something else",
        ),
        (m.message(2, m.Command.REGION_READ, m.ACCESS.pack(0, 0, 1) + b"x"), DeviceRefused, "something else"),
        (
            m.message(2, m.Command.REGION_READ, m.ACCESS.pack(0, 0, 2) + b"xy", m.REPLY),
            DeviceRefused,
            "1 bytes .* 2",
        ),
        (m.HEADER.pack(2, m.Command.REGION_READ, 2**32 - 1, m.REPLY, 0), DeviceRefused, "4294967295 bytes"),
        (HELLO[:20], DeviceTimeout, "within 0.1 s"),
    ],
)
def test_a_device_that_answers_wrongly_is_named_and_dropped(
    short_dir: Path, answer: bytes, error: type[Exception], text: str
) -> None:
    fake = FakeDevice(short_dir / "s", [HELLO, answer])
    client = Client.connect(str(short_dir / "s"), device="dev0", timeout=0.1)
    watched = os.dup(client.fileno())  # as a bridge does, to hear of the end
    with pytest.raises(error, match=text) as caught:
        client.region_read(0, 0, 1)
    assert getattr(caught.value, "device", "") == "dev0"
    with pytest.raises(DeviceGone):
        client.region_read(0, 0, 1)
    looks = select.poll()
    looks.register(watched, 0)
    seen = looks.poll(1000)
    os.close(watched)
    client.close()
    fake.thread.join()
    assert seen == [(watched, select.POLLHUP)]


def test_a_device_of_another_version_is_refused(short_dir: Path) -> None:
    other = m.message(1, m.Command.VERSION, v.Version(1, 0).encode(), m.REPLY)
    fake = FakeDevice(short_dir / "s", [other])
    with pytest.raises(DeviceRefused, match=r"version 1\.0"):
        Client.connect(str(short_dir / "s"), timeout=1)
    fake.thread.join()


def test_a_peer_that_claims_four_gigabytes_is_answered_einval_and_dropped(serving: Serving) -> None:
    with serving.raw() as sock:
        sock.sendall(m.HEADER.pack(3, m.Command.REGION_WRITE, 2**32 - 1, 0, 0))
        header = reply(sock)
        assert (header.id, header.flags, header.error) == (3, m.REPLY | m.ERROR, errno.EINVAL)
        assert sock.recv(1) == b""
    serving.until_the_client_is_gone()


def test_a_peer_that_talks_garbage_is_dropped_and_the_next_client_is_served(serving: Serving) -> None:
    with serving.raw() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while True:
            try:
                reply(sock)
            except (EOFError, ConnectionResetError):
                break
    serving.until_the_client_is_gone()


def test_a_message_in_single_bytes_and_two_in_one_are_both_understood(serving: Serving) -> None:
    hello = m.message(1, m.Command.VERSION, v.Version(0, 1).encode())
    read = m.message(2, m.Command.REGION_READ, m.ACCESS.pack(0, 0, 1))
    with serving.raw() as sock:
        for byte in hello:
            sock.sendall(bytes([byte]))
        assert reply(sock).id == 1
        sock.sendall(read + read)
        assert (reply(sock).id, reply(sock).id) == (2, 2)


def test_descriptors_that_nobody_wants_and_far_too_many_of_them_are_closed(serving: Serving) -> None:
    before = open_descriptors()
    fds = array.array("i", [os.memfd_create("x") for _ in range(m.MAX_FDS + 1)])
    hello = m.message(1, m.Command.VERSION, v.Version(0, 1).encode())
    unmap = m.message(2, m.Command.DMA_UNMAP, m.DmaUnmap(m.UNMAP_ALL, 0, 0).encode())
    with serving.raw() as sock:
        sock.sendall(hello)
        reply(sock)
        for count, outcome in ((2, 0), (len(fds), errno.EINVAL), (1, 0)):
            sock.sendmsg([unmap], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds[:count])])
            assert reply(sock).error == outcome
        # Half a message with descriptors, and gone.
        sock.sendmsg([unmap[:20]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds[:3])])
    for fd in fds:
        os.close(fd)
    serving.until_the_client_is_gone()
    assert open_descriptors() <= before


def test_a_peer_that_does_not_read_replies_does_not_hold_the_devices_lock(serving: Serving) -> None:
    read = m.message(2, m.Command.REGION_READ, m.ACCESS.pack(0, 0, 4096))
    with serving.raw() as sock:
        sock.sendall(m.message(1, m.Command.VERSION, v.Version(0, 1).encode()))
        sock.setblocking(False)
        while True:
            try:
                sock.send(read * 64)
            except BlockingIOError:
                break
        # Both directions are full now: the server stands in its send, and the lock is free.
        assert serving.backend.lock.acquire(timeout=5)
        serving.backend.lock.release()


def test_only_the_user_of_the_process_may_connect(serving: Serving) -> None:
    assert stat.S_IMODE(os.stat(serving.path).st_mode) == 0o600


def test_the_socket_of_a_dead_process_is_replaced_and_a_living_ones_is_not(short_dir: Path) -> None:
    path = str(short_dir / "s")
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(path)
    dead.close()
    serving = Serving(short_dir / "s")
    with pytest.raises(UsageError, match="another process serves"):
        Server(path, MemoryBackend())
    serving.server.close()
    assert not os.path.exists(path)
    (short_dir / "s").write_text("precious")
    with pytest.raises(UsageError, match="is no socket"):
        Server(path, MemoryBackend())
    assert (short_dir / "s").read_text() == "precious"


@pytest.mark.parametrize("path", ["/tmp/" + "x" * 103, "/nowhere/at/all", ""])
def test_a_path_where_no_socket_can_be_is_one_clear_error(path: str) -> None:
    with pytest.raises(UsageError):
        Server(path, MemoryBackend())


def test_the_server_ends_at_once_with_a_client_connected_or_waiting(short_dir: Path) -> None:
    serving = Serving(short_dir / "s")
    client, waiting = serving.client(), serving.raw()
    serving.server.close()
    assert not serving.server._thread.is_alive()
    client.close()
    waiting.close()
