"""Memory without a descriptor: the server asks for it, over a twin socket or in line; and commands that are sent ahead."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vfio_user_backend import MemoryBackend, open_descriptors
from vfio_user_talk import EVERYTHING, Talk

from devices.protocols.channel import receive
from devices.protocols.vfio_user import client_link
from devices.protocols.vfio_user import messages as m
from devices.protocols.vfio_user import region_messages as r
from devices.protocols.vfio_user import version as v
from devices.protocols.vfio_user.client import Client, RequestRefused
from devices.protocols.vfio_user.framing import Assembler, Message
from devices.protocols.vfio_user.messages import Command
from devices.protocols.vfio_user.server import Server
from devices.protocols.vfio_user.shared_memory import SharedByMessage
from migrate.errors import DeviceGone, DeviceRefused, MemoryFault

PAGE = 4096
#: A write here has the device copy within the client's memory, of so many bytes, from the window's begin to its middle.
COPY = 0x800


class Copier(MemoryBackend):
    """A device that reaches the client's memory within a write to a register."""

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        if offset == COPY:
            self.copy(int.from_bytes(data, "little"))
        else:
            super().region_write(region, offset, data)

    def copy(self, size: int) -> None:
        ((address, memory),) = self.remote.items()
        try:
            memory.write(address + self.windows[address] // 2, memory.read(address, size))
        except MemoryFault as error:
            raise m.refused(errno.EFAULT, error.reason) from error


class Serving:
    def __init__(self, path: Path) -> None:
        self.backend = Copier()
        self.path = str(path)
        self.server = Server(self.path, self.backend)
        self.server.start()

    def client(self, twin: bool) -> Client:
        return Client.connect(self.path, device="dev0", twin=twin)

    def gone(self) -> None:
        deadline = time.monotonic() + 5
        while self.server._connection is not None and time.monotonic() < deadline:
            time.sleep(0.001)


@pytest.fixture
def serving(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr(client_link.ClientLink.__init__, "__defaults__", (0.3,))
    serving = Serving(short_dir / "s")
    yield serving
    serving.server.close()


both = pytest.mark.parametrize("twin", [True, False], ids=["twin", "inline"])


@both
def test_a_device_reads_and_writes_memory_that_it_cannot_map(serving: Serving, twin: bool) -> None:
    memory = bytearray(os.urandom(8 * PAGE))
    with serving.client(twin) as client:
        assert client.server.twin_socket == twin
        client.dma_share(0x10000, memory)
        client.region_write(0, COPY, 4, 4 * PAGE)
        assert memory[4 * PAGE :] == memory[: 4 * PAGE]
        client.region_write(0, 8, 4, 0x1234)
        assert client.region_read(0, 8, 4) == 0x1234
        client.dma_unmap(0x10000, 8 * PAGE)
        assert serving.backend.windows == serving.backend.remote == {}


@both
def test_the_largest_transfers_go_in_pieces_that_the_client_takes(
    serving: Serving, twin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "devices.protocols.vfio_user.connection.OURS", v.OURS._replace(max_data_xfer_size=1000)
    )
    asked: list[int] = []
    original = SharedByMessage.answer

    def answer(self: SharedByMessage, message: Message) -> bytes | None:
        asked.append(m.DMA.unpack_from(message.payload)[1])
        return original(self, message)

    monkeypatch.setattr(SharedByMessage, "answer", answer)
    memory = bytearray(os.urandom(4 * PAGE))
    with serving.client(twin) as client:
        client.dma_share(0, memory)
        client.region_write(0, COPY, 4, 2500)
    assert memory[2 * PAGE : 2 * PAGE + 2500] == memory[:2500]
    assert asked == [1000, 1000, 500] * 2


@both
def test_a_device_may_ask_from_a_thread_of_its_own_while_the_client_is_busy_with_it(
    serving: Serving, twin: bool
) -> None:
    memory = bytearray(b"abcd" + bytes(2 * PAGE - 4))
    done = threading.Event()

    def work() -> None:
        for _ in range(100):
            with serving.backend.lock:
                serving.backend.copy(4)
        done.set()

    with serving.client(twin) as client:
        client.dma_share(0, memory)
        thread = threading.Thread(target=work)
        thread.start()
        while not done.is_set():
            client.region_write(0, 0, 4, 7)
            assert client.region_read(0, 0, 4) == 7
        thread.join()
    assert memory[PAGE : PAGE + 4] == b"abcd"


def test_in_line_a_client_answers_between_calls_when_it_is_told_to(serving: Serving) -> None:
    memory = bytearray(b"abcd" + bytes(2 * PAGE - 4))
    with serving.client(twin=False) as client:
        client.dma_share(0, memory)

        def work() -> None:
            with serving.backend.lock:
                serving.backend.copy(4)

        thread = threading.Thread(target=work)
        thread.start()
        assert client.serve(0.2) == 2
        thread.join()
        assert client.region_read(0, 0, 4) == 0
    assert memory[PAGE : PAGE + 4] == b"abcd"


@both
def test_memory_that_may_only_be_read_is_not_written(serving: Serving, twin: bool) -> None:
    memory = bytearray(b"abcd" + bytes(2 * PAGE - 4))
    with serving.client(twin) as client:
        client.dma_share(0, memory, writable=False)
        with pytest.raises(RequestRefused, match="EFAULT"):
            client.region_write(0, COPY, 4, 4)
        assert client.region_read(0, 0, 4) == 0
    assert memory[PAGE:] == bytes(PAGE)


@both
def test_a_client_that_vanishes_leaves_nothing_and_the_next_one_is_served(
    serving: Serving, twin: bool
) -> None:
    before = open_descriptors()
    for _ in range(3):
        client = serving.client(twin)
        client.dma_share(0, bytearray(2 * PAGE))
        client._socket.shutdown(socket.SHUT_RDWR)
        client.close()
        serving.gone()
        assert serving.backend.windows == serving.backend.remote == {}
    assert open_descriptors() <= before


def hello(twin: bool) -> bytes:
    capabilities = EVERYTHING._replace(twin_socket=twin)
    return m.message(1, Command.VERSION, v.Version(0, 1, capabilities).encode())


class Raw:
    """A client that does as it likes."""

    def __init__(self, serving: Serving, twin: bool) -> None:
        self.main = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.main.settimeout(5)
        self.main.connect(serving.path)
        self.assembler = Assembler()
        self.twin = self.main
        self.main.sendall(hello(twin))
        reply = self.next()
        version = v.Version.decode(reply.payload)
        assert version.capabilities.twin_socket == twin
        if twin:
            assert version.capabilities.twin_fd_index == 0
            self.twin = socket.socket(fileno=reply.take_fd())
            self.twin.settimeout(5)
        self.twin_assembler = self.assembler if not twin else Assembler()
        self.main.sendall(m.message(2, Command.DMA_MAP, m.DmaMap(3, 0, 0, 2 * PAGE).encode()))
        assert self.next().header.error == 0

    def next(self) -> Message:
        return self._next(self.main, self.assembler)

    def asked(self) -> Message:
        return self._next(self.twin, self.twin_assembler)

    @staticmethod
    def _next(sock: socket.socket, assembler: Assembler) -> Message:
        while (message := assembler.next()) is None:
            data, fds, truncated = receive(sock)
            if not data:
                raise EOFError
            assembler.feed(data, fds, truncated)
        return message

    def until_the_end(self) -> None:
        while True:
            self.next()

    def send_and_read_to_the_end(self, data: bytes) -> None:
        self.main.sendall(data)
        self.until_the_end()

    def copy(self, number: int = 3) -> None:
        self.main.sendall(
            m.message(number, Command.REGION_WRITE, m.ACCESS.pack(COPY, 0, 4) + struct.pack("=I", 4))
        )

    def close(self) -> None:
        self.main.close()
        self.twin.close()


def answered_with(
    payload: bytes, *, flags: int = m.REPLY, ident: int | None = None, error: int = 0
) -> Callable[[Message], bytes]:
    def answer(asked: Message) -> bytes:
        number = asked.header.id if ident is None else ident
        return m.HEADER.pack(number, asked.header.command, 16 + len(payload), flags, error) + payload

    return answer


@both
@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        (answered_with(m.DMA.pack(0, 4) + b"abc"), False),
        (answered_with(m.DMA.pack(0, 3) + b"abc"), False),
        (answered_with(m.DMA.pack(8, 4) + b"abcd"), False),
        (answered_with(b""), False),
        (answered_with(b"", flags=m.REPLY | m.ERROR, error=errno.EINVAL), False),
        (answered_with(m.DMA.pack(0, 4) + b"abcd", ident=999), True),
        (lambda asked: m.HEADER.pack(asked.header.id, 11, 2**32 - 1, m.REPLY, 0), True),
        (lambda asked: b"", True),
    ],
    ids=["short", "other count", "other address", "empty", "error", "other id", "four gigabytes", "silence"],
)
def test_a_client_that_answers_wrongly_costs_its_device_one_access_or_its_connection(
    serving: Serving, twin: bool, answer: Callable[[Message], bytes], lost: bool
) -> None:
    raw = Raw(serving, twin)
    raw.copy()
    raw.twin.sendall(answer(raw.asked()))
    if lost:
        with pytest.raises((EOFError, ConnectionResetError)):
            raw.until_the_end()
    else:
        assert raw.next().header.error == errno.EFAULT
        raw.main.sendall(m.message(4, Command.REGION_READ, m.ACCESS.pack(0, 0, 1)))
        assert raw.next().header.error == 0
    raw.close()
    serving.gone()
    with serving.client(twin) as client:
        assert client.region_read(0, 0, 4) == 0


@both
def test_the_specifications_short_count_in_the_reply_to_a_write_is_understood(
    serving: Serving, twin: bool
) -> None:
    raw = Raw(serving, twin)
    raw.copy()
    raw.twin.sendall(answered_with(m.DMA.pack(0, 4) + b"abcd")(raw.asked()))
    asked = raw.asked()
    assert (asked.header.command, bytes(asked.payload)) == (Command.DMA_WRITE, m.DMA.pack(PAGE, 4) + b"abcd")
    raw.twin.sendall(answered_with(struct.pack("=QI", PAGE, 4))(asked))
    assert raw.next().header.error == 0
    raw.close()
    serving.gone()


def test_in_line_what_came_together_with_a_reply_is_answered_in_the_next_call(short_dir: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(short_dir / "s"))
    listener.listen()
    answered: list[int] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            assembler = Assembler()
            replies = [v.Version(0, 1, v.OURS).encode(), b"", m.ACCESS.pack(0, 0, 1) + b"x"]
            for number, payload in enumerate(replies, 1):
                reply = m.message(number, (1, Command.DMA_MAP, 9)[number - 1], payload, m.REPLY)
                Raw._next(connection, assembler)
                if number == 3:
                    # Only now, and before the reply: a device that waits for its memory.
                    answered.append(Raw._next(connection, assembler).header.id)
                asked = m.message(77, Command.DMA_READ, m.DMA.pack(0, 4)) if number == 2 else b""
                connection.sendall(reply + asked)

    thread = threading.Thread(target=serve)
    thread.start()
    with Client.connect(str(short_dir / "s"), timeout=2) as client:
        client.dma_share(0, bytearray(PAGE))
        assert client.region_read(0, 0, 1) == ord("x")
    thread.join()
    assert answered == [77]


def test_in_line_commands_that_were_sent_ahead_wait_and_keep_their_order(serving: Serving) -> None:
    raw = Raw(serving, twin=False)
    raw.copy(3)
    for number in range(4, 40):
        raw.main.sendall(
            m.message(number, Command.REGION_WRITE, m.ACCESS.pack(number, 0, 1) + bytes([number]))
        )
    raw.main.sendall(m.message(40, Command.REGION_READ, m.ACCESS.pack(4, 0, 36)))
    raw.main.sendall(answered_with(m.DMA.pack(0, 4) + b"abcd")(raw.asked()))
    raw.main.sendall(answered_with(m.DMA.pack(PAGE, 4))(raw.asked()))
    seen = [raw.next() for _ in range(38)]
    assert [one.header.id for one in seen] == list(range(3, 41))
    assert not any(one.header.error for one in seen)
    assert bytes(seen[-1].payload[16:]) == bytes(range(4, 40))
    raw.close()
    serving.gone()


def test_in_line_a_client_cannot_send_ahead_without_end(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_link, "MAX_AHEAD", 10_000)
    monkeypatch.setattr(client_link.ClientLink.__init__, "__defaults__", (60.0,))
    raw = Raw(serving, twin=False)
    raw.copy()
    raw.asked()
    ahead = m.message(5, Command.REGION_READ, m.ACCESS.pack(0, 0, 1)) * 5000
    with pytest.raises((EOFError, ConnectionError)):
        raw.send_and_read_to_the_end(ahead)
    raw.close()
    serving.gone()


def test_a_window_without_a_descriptor_has_no_offset_and_no_flag_that_wants_one(serving: Serving) -> None:
    raw = Raw(serving, twin=True)
    for flags, offset in ((3, PAGE), (7, 0), (11, 0), (19, 0)):
        raw.main.sendall(m.message(5, Command.DMA_MAP, m.DmaMap(flags, offset, 1 << 20, PAGE).encode()))
        assert raw.next().header.error == errno.EINVAL
    raw.close()
    serving.gone()


def test_a_client_that_takes_no_data_has_no_memory_to_ask_for() -> None:
    talk = Talk(EVERYTHING._replace(max_data_xfer_size=0), link=object())  # type: ignore[arg-type]
    assert talk.ask(Command.DMA_MAP, m.DmaMap(3, 0, 0, PAGE).encode()) == errno.ENOTSUP


def test_a_window_that_overlaps_is_not_shared_and_the_one_before_it_still_is(serving: Serving) -> None:
    first = bytearray(b"abcd" + bytes(2 * PAGE - 4))
    with serving.client(twin=True) as client:
        client.dma_share(0, first)
        for address in (0, PAGE):
            with pytest.raises(RequestRefused, match="EEXIST"):
                client.dma_share(address, bytearray(2 * PAGE))
        client.region_write(0, COPY, 4, 4)
    assert first[PAGE : PAGE + 4] == b"abcd"


def test_a_window_with_a_descriptor_can_be_asked_for_by_messages_as_well(serving: Serving) -> None:
    def ask(client: Client) -> int:
        payload = m.DMA.pack(PAGE, 4)
        asked = Message(m.Header(1, Command.DMA_READ, 32, 0, 0), memoryview(payload), [])
        reply = client.shared.answer(asked)
        assert reply is not None
        return m.Header._make(m.HEADER.unpack_from(reply)).error

    fd = os.memfd_create("x")
    with serving.client(twin=False) as client:
        client.dma_map(0, 2 * PAGE, fd)
        assert ask(client) == errno.EINVAL
        client.dma_unmap(0, 2 * PAGE)
        client.dma_map(0, 2 * PAGE, fd, memory=bytearray(2 * PAGE))
        assert ask(client) == 0
        client.dma_unmap_all()
        assert ask(client) == errno.EINVAL
    os.close(fd)


# -- negotiation -------------------------------------------------------------------------------------------------------------------


def test_of_what_both_share_no_more_is_answered_than_was_proposed() -> None:
    agreed = v.agree(v.Capabilities(max_msg_fds=1, max_dma_maps=3, pgsizes=4096 | 1 << 21))
    assert agreed == v.Capabilities(m.MAX_FDS, m.MAX_DATA, 3, 4096, write_multiple=False)
    assert v.agree(EVERYTHING).write_multiple


def test_a_client_that_maps_no_pages_of_ours_is_refused_and_let_go() -> None:
    talk = Talk(None)
    payload = v.Version(0, 1, v.Capabilities(pgsizes=1 << 21)).encode()
    assert talk.ask(Command.VERSION, payload) == errno.EINVAL
    assert talk.session.over


def test_the_number_of_windows_that_was_agreed_on_is_held() -> None:
    talk = Talk(EVERYTHING._replace(max_dma_maps=2))
    results = [
        talk.ask(Command.DMA_MAP, m.DmaMap(3, 0, n * PAGE, PAGE).encode(), [os.memfd_create("x")])
        for n in range(3)
    ]
    assert results == [b"", b"", errno.ENOSPC]
    talk.session.close()


@pytest.mark.parametrize(
    "twin", ['{"supported":1}', "[]", '{"fd_index":-1}', '{"supported":true,"fd_index":"0"}']
)
def test_a_twin_socket_that_is_described_wrongly_is_refused(twin: str) -> None:
    data = f'{{"capabilities":{{"twin_socket":{twin}}}}}'.encode()
    with pytest.raises(m.RequestError):
        v.Version.decode(struct.pack("=HH", 0, 1) + data + b"\0")


@pytest.mark.parametrize(
    ("proposed", "index", "count"), [(True, -1, 1), (True, 1, 1), (True, 0, 0), (False, 0, 1)]
)
def test_a_server_whose_twin_socket_does_not_fit_together_is_left(
    short_dir: Path, proposed: bool, index: int, count: int
) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(short_dir / "s"))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            receive(connection)
            capabilities = v.OURS._replace(twin_socket=True, twin_fd_index=index)
            reply = m.message(1, Command.VERSION, v.Version(0, 1, capabilities).encode(), m.REPLY)
            made = socket.socketpair()
            socket.send_fds(connection, [reply], [made[0].fileno()] * count)
            for one in made:
                one.close()
            connection.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(DeviceRefused, match="twin socket"):
        Client.connect(str(short_dir / "s"), timeout=2, twin=proposed)
    thread.join()


# -- what a server may ask of a client ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "payload", "expected"),
    [
        (Command.DMA_READ, m.DMA.pack(PAGE, 4), 0),
        (Command.DMA_WRITE, m.DMA.pack(PAGE, 4) + b"abcd", 0),
        (Command.DMA_READ, m.DMA.pack(0, 4), errno.EINVAL),
        (Command.DMA_READ, m.DMA.pack(2 * PAGE - 2, 4), errno.EINVAL),
        (Command.DMA_READ, m.DMA.pack(2**64 - 1, 4), errno.EINVAL),
        (Command.DMA_READ, m.DMA.pack(PAGE, 2**63), errno.EINVAL),
        (Command.DMA_READ, m.DMA.pack(PAGE, 4) + b"x", errno.EINVAL),
        (Command.DMA_READ, b"", errno.EINVAL),
        (Command.DMA_WRITE, m.DMA.pack(PAGE, 4) + b"abc", errno.EINVAL),
        (Command.DMA_WRITE, m.DMA.pack(8 * PAGE, 4) + b"abcd", errno.EPERM),
        (Command.DEVICE_RESET, b"", errno.ENOTSUP),
        (99, b"", errno.ENOTSUP),
    ],
)
def test_a_client_gives_what_it_has_shared_and_nothing_else(
    number: int, payload: bytes, expected: int
) -> None:
    shared, memory, fixed = SharedByMessage(), bytearray(PAGE), bytes(PAGE)
    shared.add(PAGE, memoryview(memory), writable=True)
    shared.add(8 * PAGE, memoryview(fixed), writable=False)
    asked = Message(m.Header(5, number, 16 + len(payload), 0, 0), memoryview(payload), [os.memfd_create("x")])
    reply = shared.answer(asked)
    assert reply is not None
    header = m.Header._make(m.HEADER.unpack_from(reply))
    assert (header.id, header.command, header.error) == (5, number, expected)
    assert len(reply) == 16 if expected else len(reply) > 16
    silent = Message(m.Header(5, number, 16 + len(payload), m.NO_REPLY, 0), memoryview(payload), [])
    assert shared.answer(silent) is None


# -- commands sent ahead ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [True, False])
def test_many_accesses_are_sent_ahead_and_done_in_order(serving: Serving, multiple: bool) -> None:
    with serving.client(twin=False) as client:
        client.server = client.server._replace(write_multiple=multiple)
        writes = [r.Write(0, 8 * (n % 100), struct.pack("=Q", n)) for n in range(300)]
        assert client.write_many(writes) == 300
        read = client.read_many([(0, 8 * n, 8) for n in range(100)])
        assert [struct.unpack("=Q", one)[0] for one in read] == list(range(200, 300))
        with pytest.raises(RequestRefused, match="EINVAL"):
            client.read_many([(0, 0, 1), (0, 4096, 1), (0, 8, 1)])
        assert client.region_read(0, 8, 8) == 201


def test_large_replies_that_are_awaited_together_do_not_lock_both_sides(serving: Serving) -> None:
    with serving.client(twin=False) as client:
        client.write_bytes(0, 0, bytes(range(256)))
        read = client.read_many([(0, 0, 2048)] * 2000)
        assert len(read) == 2000
        assert read[-1][:256] == bytes(range(256))


def test_a_posted_write_is_done_before_the_next_call_returns(serving: Serving) -> None:
    with serving.client(twin=False) as client:
        for number in range(50):
            client.post_bytes(0, 0, bytes([number]))
            client.post_bytes(0, 9999, b"x")  # refused, and nobody hears of it
            assert client.region_read(0, 0, 1) == number


def test_regions_and_descriptors_cross_the_socket(serving: Serving) -> None:
    memory, bell = os.memfd_create("x"), os.eventfd(0)
    serving.backend.mappable[0] = r.RegionMemory(memory, PAGE, ((0, PAGE),))
    serving.backend.doorbells[0] = [r.IoEventfd(bell, 0, 4), r.IoEventfd(bell, 8, 4)]
    serving.backend.maskable = frozenset({2})
    with serving.client(twin=True) as client:
        mapped = client.region_memory(0)
        assert mapped is not None
        assert mapped[1:] == (PAGE, ((0, PAGE),))
        assert os.fstat(mapped[0]).st_ino == os.fstat(memory).st_ino
        os.close(mapped[0])
        assert client.region_memory(1) is None
        assert client.region_info(0).flags == 7
        first, second = client.io_fds(0)
        assert (first.fd, first.offset, second.offset) == (second.fd, 0, 8)
        os.eventfd_write(second.fd, 1)
        assert os.eventfd_read(bell) == 1
        os.close(first.fd)
        assert client.io_fds(1) == []
        client.mask_irq(2, 1)
        assert serving.backend.masked == {(2, 1)}
        client.mask_irq(2, 1, masked=False)
        client.mask_irq(2, 0)
        client.disable_irqs(2)
        assert serving.backend.masked == set()
    os.close(memory)
    os.close(bell)


def test_a_device_that_ends_is_told_as_gone_by_calls_sent_ahead(serving: Serving) -> None:
    client = serving.client(twin=True)
    serving.server.close()
    with pytest.raises(DeviceGone):
        client.read_many([(0, 0, 1)] * 3)
    client.close()
