"""The asyncio control stream over every kind of channel: deadlines, cancels and ends."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from transport_rig import KINDS, SESSION, Hosts, Server, connected

from migrate.errors import ChannelClosed, TransportError, UsageError
from migrate.transport import control
from migrate.transport.channel import SocketChannel
from migrate.transport.control import accept_control, dial_control
from migrate.transport.preamble import SIZE, Kind, Preamble, encode
from migrate.transport.stream import ControlStream
from migrate.transport.uri import LocalDestination, UnixDestination

every_kind = pytest.mark.parametrize("kind", KINDS)
CONTROL = Preamble(Kind.CONTROL, 0, SESSION)


def talk(kind: str, hosts: Hosts, work: Callable[[ControlStream, ControlStream], Awaitable[None]]) -> None:
    """Run `work` with both ends of a stream."""

    async def run() -> None:
        async with asyncio.timeout(60), ControlStream(one) as ours, ControlStream(other) as theirs:
            await work(ours, theirs)

    with connected(kind, hosts) as (one, other):
        asyncio.run(run())


@every_kind
def test_messages_cross_in_both_directions_at_once(kind: str, hosts: Hosts) -> None:
    blob = os.urandom(5 << 20)

    async def send(stream: ControlStream) -> None:
        for size in (1, 16, 5 << 20, 0, 4096):
            await stream.write(memoryview(blob)[:size], timeout=10)

    async def receive(stream: ControlStream) -> None:
        for size in (1, 16, 5 << 20, 0, 4096):
            assert await stream.read_exactly(size, timeout=10) == blob[:size]

    async def work(ours: ControlStream, theirs: ControlStream) -> None:
        await asyncio.gather(send(ours), receive(theirs), send(theirs), receive(ours))

    talk(kind, hosts, work)


@every_kind
def test_pages_in_line_are_read_straight_into_memory_past_what_was_read_ahead(
    kind: str, hosts: Hosts
) -> None:
    pages = os.urandom(3 << 20)

    async def work(ours: ControlStream, theirs: ControlStream) -> None:
        got = bytearray(len(pages))
        sending = asyncio.create_task(ours.write(b"header" + pages + b"tail", timeout=10))
        assert await theirs.read_exactly(6, timeout=10) == b"header"
        await theirs.read_into(memoryview(got), timeout=10)
        assert got == pages
        assert await theirs.read_exactly(4, timeout=10) == b"tail"
        await sending

    talk(kind, hosts, work)


@every_kind
def test_a_read_that_times_out_or_is_cancelled_loses_no_byte(kind: str, hosts: Hosts) -> None:
    async def work(ours: ControlStream, theirs: ControlStream) -> None:
        await ours.write(b"abc", timeout=5)
        with pytest.raises(TransportError, match="has sent nothing for") as caught:
            await theirs.read_exactly(6, timeout=0.05)
        assert not isinstance(caught.value, ChannelClosed)
        await ours.write(b"de", timeout=5)
        reading = asyncio.create_task(theirs.read_exactly(6, timeout=10))
        while len(theirs._buffer) < 5:
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await ours.write(b"f", timeout=5)
        assert await theirs.read_exactly(6, timeout=5) == b"abcdef"

    talk(kind, hosts, work)


@every_kind
def test_a_write_that_is_cut_short_makes_later_writes_fail_and_not_mix(kind: str, hosts: Hosts) -> None:
    async def work(ours: ControlStream, theirs: ControlStream) -> None:
        with pytest.raises(TransportError, match="has taken nothing for"):
            await ours.write(bytes(64 << 20), timeout=0.05)
        with pytest.raises(ChannelClosed, match="cut short"):
            await ours.write(b"next", timeout=5)

    talk(kind, hosts, work)


@every_kind
def test_two_writers_do_not_mix(kind: str, hosts: Hosts) -> None:
    size = 3 << 20

    async def work(ours: ControlStream, theirs: ControlStream) -> None:
        writing = [asyncio.create_task(ours.write(letter * size, timeout=10)) for letter in (b"a", b"b")]
        got = [await theirs.read_exactly(size, timeout=10) for _ in writing]
        assert sorted(set(part) for part in got) == [{ord("a")}, {ord("b")}]
        await asyncio.gather(*writing)

    talk(kind, hosts, work)


@every_kind
def test_a_peer_that_closes_is_a_closed_channel_for_readers_and_writers(kind: str, hosts: Hosts) -> None:
    async def work(ours: ControlStream, theirs: ControlStream) -> None:
        reading = asyncio.create_task(ours.read_exactly(1, timeout=10))
        await asyncio.sleep(0)
        await theirs.close()
        with pytest.raises(ChannelClosed, match="closed the connection"):
            await reading
        with pytest.raises(ChannelClosed):
            await ours.write(bytes(64 << 20), timeout=10)

    talk(kind, hosts, work)


@every_kind
@pytest.mark.parametrize("how", ["close", "abort"])
def test_closing_or_aborting_wakes_our_own_reader_and_writer(kind: str, how: str, hosts: Hosts) -> None:
    async def work(ours: ControlStream, theirs: ControlStream) -> None:
        reading = asyncio.create_task(ours.read_exactly(1, timeout=30))
        writing = asyncio.create_task(ours.write(bytes(64 << 20), timeout=30))
        while not (ours._waiting[False] and ours._waiting[True]):
            await asyncio.sleep(0)
        if how == "abort":
            ours.abort()
        else:
            descriptors = ours._fds
            await ours.close()
            await ours.close()
            loop = asyncio.get_running_loop()  # which must not watch numbers that may be another's by now
            assert not loop.remove_reader(descriptors[False])
            assert not loop.remove_writer(descriptors[True])
        for task in (reading, writing):
            with pytest.raises(ChannelClosed, match="given up by this side"):
                await task
        with pytest.raises(ChannelClosed, match="given up by this side"):
            await ours.read_exactly(1, timeout=1)

    talk(kind, hosts, work)


@every_kind
def test_a_peer_that_never_pauses_does_not_starve_other_tasks(kind: str, hosts: Hosts) -> None:
    async def work(ours: ControlStream, theirs: ControlStream) -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(other())
        for _ in range(500):
            await ours.write(bytes(4096), timeout=10)
            await theirs.read_exactly(4096, timeout=10)
        others.cancel()
        assert turns >= 500

    talk(kind, hosts, work)


def test_a_unix_socket_carries_a_control_stream_after_its_preamble(directory: object) -> None:
    path = f"{directory}/s"

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen()
            ours = await dial_control(UnixDestination(path), None, SESSION, timeout=10)
            sock, _ = listening.accept()
        assert sock.recv(SIZE) == encode(CONTROL)
        theirs = await accept_control(sock, CONTROL, None, timeout=10)
        async with ours, theirs:
            assert (ours.peer, theirs.peer) == ("unix", "unix")
            await theirs.write(b"hello", timeout=5)
            assert await ours.read_exactly(5, timeout=5) == b"hello"

    asyncio.run(run())


def set_up_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "channel-setup"]


def join_set_up_threads() -> None:
    while threads := set_up_threads():  # one may start another, to close what came late
        threads[0].join(20)
        assert not threads[0].is_alive()


def test_a_dial_that_is_cancelled_returns_at_once_and_closes_what_comes_late(
    server: Server, hosts: Hosts
) -> None:
    async def run() -> None:
        dialling = asyncio.create_task(dial_control(server.destination(), hosts.a, SESSION, timeout=30))
        server.sock.setblocking(False)
        sock, _ = await asyncio.get_running_loop().sock_accept(server.sock)
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling
        assert set_up_threads()  # it still waits for the handshake
        first = await asyncio.get_running_loop().sock_recv(sock, SIZE)
        assert first == encode(CONTROL)
        sock.setblocking(True)
        theirs = await accept_control(sock, CONTROL, hosts.b, timeout=20)
        async with theirs:
            with pytest.raises(ChannelClosed, match="closed the connection"):
                await theirs.read_exactly(1, timeout=20)

    asyncio.run(run())
    join_set_up_threads()


def test_a_channel_that_comes_when_nobody_waits_any_more_is_closed(hosts: Hosts) -> None:
    go_on, closed = threading.Event(), threading.Event()

    class Watched(SocketChannel):
        def close(self) -> None:
            super().close()
            closed.set()

    one, other = socket.socketpair()

    def work() -> Watched:
        go_on.wait(20)
        return Watched(one, "unix", "late")

    async def run() -> None:
        with pytest.raises(TransportError, match="late: not connected within 0 s"):
            await control._in_thread(work, 0, "late")
        go_on.set()
        assert await asyncio.to_thread(closed.wait, 20)

    with other:
        asyncio.run(run())
        join_set_up_threads()


def test_a_dial_ends_by_its_deadline(server: Server, hosts: Hosts) -> None:
    with pytest.raises(TransportError, match="in time"):
        asyncio.run(dial_control(server.destination(), hosts.a, SESSION, timeout=0.2))
    join_set_up_threads()


def test_a_missing_socket_and_local_and_an_empty_host_are_refused_with_a_remedy(
    directory: object, hosts: Hosts
) -> None:
    for destination, words in (
        (UnixDestination(f"{directory}/none"), "no such socket"),
        (LocalDestination(), "cannot be used yet"),
    ):
        with pytest.raises((TransportError, UsageError), match=words) as caught:
            asyncio.run(dial_control(destination, None, SESSION, timeout=5))
        assert caught.value.remedy


def test_a_refused_peer_is_an_error_of_the_accepting_coroutine(server: Server, hosts: Hosts) -> None:
    async def run() -> None:
        dialling = asyncio.create_task(dial_control(server.destination(), hosts.a, SESSION, timeout=20))
        server.sock.setblocking(False)
        sock, _ = await asyncio.get_running_loop().sock_accept(server.sock)
        await asyncio.get_running_loop().sock_recv(sock, SIZE)
        sock.setblocking(True)
        with pytest.raises(TransportError, match="hosta is not allowed"):
            await accept_control(sock, CONTROL, replace(hosts.b, allow=frozenset({"hostc"})), timeout=20)
        with pytest.raises(TransportError, match="does not allow the name of our certificate"):
            await dialling

    asyncio.run(run())
