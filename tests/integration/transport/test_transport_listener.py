"""Where a host is reached: what it binds, whom it hands on, and how long it waits for those who say nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transport_rig import SESSION, Hosts, Server

from migrate.errors import LocalProtocolError, UsageError
from migrate.transport import listener as listener_module
from migrate.transport.control import accept_control, accept_page, dial_control, dial_page
from migrate.transport.listener import Arrival, Listener, listen
from migrate.transport.preamble import SIZE, Kind, Preamble, encode
from migrate.transport.tls import Credentials
from migrate.transport.uri import ListenAddress, TlsDestination, UnixDestination, parse_listen

PAGE = Preamble(Kind.PAGE, 5, SESSION)


def with_listener(
    address: ListenAddress,
    work: Callable[[Listener, asyncio.Queue[Arrival]], Awaitable[None]],
    credentials: Credentials | None = None,
) -> None:
    async def run() -> None:
        arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        async with asyncio.timeout(60):
            listener = await listen(address, arrivals.put, credentials)
            try:
                await work(listener, arrivals)
            finally:
                await listener.close()

    asyncio.run(run())


def connect(path: str, data: bytes = b"") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.sendall(data)
    sock.settimeout(20)
    return sock


async def ended(sock: socket.socket) -> bool:
    try:
        return await asyncio.to_thread(sock.recv, 1) == b""
    except ConnectionResetError:
        return True
    finally:
        sock.close()


def test_an_arrival_has_its_preamble_and_a_socket_from_which_no_further_byte_was_read(
    directory: Path,
) -> None:
    async def work(_: Listener, arrivals: asyncio.Queue[Arrival]) -> None:
        client = connect(path, encode(PAGE) + b"what follows")
        arrival = await arrivals.get()
        assert arrival.first == PAGE
        assert arrival.kind == "unix"
        assert f"process {os.getpid()}" in arrival.remote
        assert arrival.sock.getblocking()
        assert not arrival.sock.get_inheritable()
        assert arrival.sock.recv(100) == b"what follows"
        arrival.sock.close()
        client.close()

    path = f"{directory}/s"
    with_listener(UnixDestination(path), work)


def test_a_preamble_in_pieces_is_put_together(directory: Path) -> None:
    async def work(_: Listener, arrivals: asyncio.Queue[Arrival]) -> None:
        client = connect(path)
        for byte in encode(PAGE):
            client.sendall(bytes([byte]))
            await asyncio.sleep(0)
        arrival = await arrivals.get()
        assert arrival.first == PAGE
        arrival.sock.close()
        client.close()

    path = f"{directory}/s"
    with_listener(UnixDestination(path), work)


@pytest.mark.parametrize(
    ("garbage", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: hostb:4789\r\n\r\n", "speaks HTTP"),
        pytest.param(os.urandom(64), "not a vmferry", id="noise"),
        (b"VMF", "after 3 of"),
    ],
)
def test_garbage_is_dropped_with_one_line_and_the_next_is_served(
    directory: Path, garbage: bytes, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(_: Listener, arrivals: asyncio.Queue[Arrival]) -> None:
        client = connect(path, garbage)
        client.shutdown(socket.SHUT_WR)
        assert await ended(client)
        good = connect(path, encode(PAGE))
        (await arrivals.get()).sock.close()
        good.close()

    path = f"{directory}/s"
    with caplog.at_level(logging.WARNING):
        with_listener(UnixDestination(path), work)
    (record,) = caplog.records
    assert words in record.getMessage()
    assert "\n" not in record.getMessage()
    assert record.exc_info is None


def test_those_who_say_nothing_are_dropped_and_hold_up_others_no_longer_than_the_deadline(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener_module, "MAX_HALF_OPEN", 3)
    monkeypatch.setattr(listener_module, "PREAMBLE_SECONDS", 0.5)

    async def work(listener: Listener, arrivals: asyncio.Queue[Arrival]) -> None:
        silent = [connect(path, encode(PAGE)[:count]) for count in (0, 7, 31)]
        while len(listener._served) < 3:
            await asyncio.sleep(0)
        good = connect(path, encode(PAGE))
        for _ in range(50):
            await asyncio.sleep(0)
        assert arrivals.empty()
        assert len(listener._served) == 3  # the bound: the good one waits in the kernel's queue
        arrival = await arrivals.get()
        assert arrival.first == PAGE
        arrival.sock.close()
        good.close()
        for sock in silent:
            assert await ended(sock)

    path = f"{directory}/s"
    with_listener(UnixDestination(path), work)
    assert sorted(record.getMessage().partition("only ")[2][:2].strip() for record in caplog.records) == [
        "0",
        "31",
        "7",
    ]


def test_a_port_in_use_is_a_usage_error_that_names_it_and_says_how_to_find_its_owner(
    server: Server, hosts: Hosts
) -> None:
    with pytest.raises(UsageError, match=f"port {server.port} is in use already") as caught:
        asyncio.run(listen(TlsDestination("127.0.0.1", server.port), no_callback, hosts.b))
    assert "ss -ltnp" in caught.value.remedy


async def no_callback(arrival: Arrival) -> None:
    raise AssertionError


def test_an_address_that_is_not_ours_and_a_directory_that_is_not_there_are_usage_errors(
    directory: Path, hosts: Hosts
) -> None:
    with pytest.raises(UsageError, match="no such address"):
        asyncio.run(listen(TlsDestination("192.0.2.1", 0), no_callback, hosts.b))
    with pytest.raises(UsageError, match="no such directory"):
        asyncio.run(listen(UnixDestination(f"{directory}/none/s"), no_callback))


def test_tls_needs_credentials_and_an_allow_list_before_it_binds(server: Server, hosts: Hosts) -> None:
    address = TlsDestination("127.0.0.1", server.port)  # taken: binding first would be another error
    with pytest.raises(UsageError, match="needs certificates"):
        asyncio.run(listen(address, no_callback))
    with pytest.raises(UsageError, match="no list of hosts"):
        asyncio.run(listen(address, no_callback, replace(hosts.b, allow=frozenset())))


def test_localhost_with_a_port_of_the_kernels_choice_is_one_port(hosts: Hosts) -> None:
    async def work(listener: Listener, arrivals: asyncio.Queue[Arrival]) -> None:
        (port,) = {address.port for address in listener.addresses if isinstance(address, TlsDestination)}
        assert port
        for address in listener.addresses:
            assert isinstance(address, TlsDestination)
            with socket.create_connection((address.host, port)) as client:
                client.sendall(encode(PAGE))
                arrival = await arrivals.get()
                assert arrival.kind == "tls"
                assert arrival.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                arrival.sock.close()

    with_listener(parse_listen("tls://localhost:0"), work, hosts.b)


def test_a_unix_socket_is_its_owners_alone_and_goes_with_the_listener(directory: Path) -> None:
    async def work(listener: Listener, _: asyncio.Queue[Arrival]) -> None:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert listener.addresses == [UnixDestination(path)]

    path = f"{directory}/s"
    before = os.umask(0)
    try:
        with_listener(UnixDestination(path), work)
    finally:
        os.umask(before)
    assert not os.path.exists(path)


def test_a_stale_socket_file_is_replaced_but_a_live_one_and_a_plain_file_are_not(directory: Path) -> None:
    stale, live, plain = (f"{directory}/{name}" for name in ("stale", "live", "plain"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(stale)
    Path(plain).write_text("precious")

    async def work(listener: Listener, arrivals: asyncio.Queue[Arrival]) -> None:
        client = connect(stale, encode(PAGE))
        (await arrivals.get()).sock.close()
        client.close()

    with_listener(UnixDestination(stale), work)

    with socket.socket(socket.AF_UNIX) as other:
        other.bind(live)
        other.listen(0)
        with pytest.raises(UsageError, match="another process listens"):
            asyncio.run(listen(UnixDestination(live), no_callback))
        # its queue is full now, and it is still alive
        with pytest.raises(UsageError, match="another process listens"):
            asyncio.run(listen(UnixDestination(live), no_callback))
    with pytest.raises(UsageError, match="no socket"):
        asyncio.run(listen(UnixDestination(plain), no_callback))
    assert Path(plain).read_text() == "precious"


def test_closing_leaves_a_file_that_is_anothers(directory: Path) -> None:
    async def work(_: Listener, __: asyncio.Queue[Arrival]) -> None:
        os.unlink(path)
        another()

    def another() -> None:
        Path(path).write_text("another's")

    path = f"{directory}/s"
    with_listener(UnixDestination(path), work)
    assert Path(path).read_text() == "another's"


@pytest.mark.parametrize("error", [LocalProtocolError("no such session"), ValueError("a bug")])
def test_a_connection_that_the_callback_refuses_is_closed_and_the_next_is_served(
    directory: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    async def refuse(arrival: Arrival) -> None:
        seen.append(arrival.first.index)
        raise error

    async def run() -> None:
        listener = await listen(UnixDestination(path), refuse)
        for index in (1, 2):
            assert await ended(connect(path, encode(Preamble(Kind.PAGE, index, SESSION))))
        await listener.close()

    path = f"{directory}/s"
    asyncio.run(run())
    assert seen == [1, 2]
    assert len(caplog.records) == 2
    assert str(error) in caplog.text


def test_closing_drops_those_who_have_not_spoken_yet(directory: Path) -> None:
    async def run() -> None:
        listener = await listen(UnixDestination(path), no_callback)
        waiting, queued = connect(path, b"VMF"), connect(path)
        while len(listener._served) < 2:
            await asyncio.sleep(0)
        await listener.close()
        assert await ended(waiting)
        assert await ended(queued)

    path = f"{directory}/s"
    asyncio.run(run())


def test_a_control_stream_and_a_page_channel_come_in_through_one_listener(hosts: Hosts) -> None:
    async def work(listener: Listener, arrivals: asyncio.Queue[Arrival]) -> None:
        address = listener.addresses[0]
        control = asyncio.create_task(dial_control(address, hosts.a, SESSION, timeout=20))
        arrival = await arrivals.get()
        assert arrival.first == Preamble(Kind.CONTROL, 0, SESSION)
        theirs = await accept_control(arrival.sock, arrival.first, hosts.b, timeout=20)
        ours = await control

        page = asyncio.create_task(asyncio.to_thread(dial_page, address, hosts.a, SESSION, 5, timeout=20))
        arrival = await arrivals.get()
        assert arrival.first == PAGE
        their_page = await asyncio.to_thread(accept_page, arrival.sock, arrival.first, hosts.b, timeout=20)
        our_page = await page
        assert their_page.peer == theirs.peer == "hosta"

        async with ours, theirs:
            await ours.write(b"manifest", timeout=5)
            assert await theirs.read_exactly(8, timeout=5) == b"manifest"
            our_page.send(bytes(SIZE))
            their_page.recv_into(memoryview(bytearray(SIZE)))
        our_page.close()
        their_page.close()

    with_listener(parse_listen("tls://127.0.0.1:0"), work, hosts.b)
