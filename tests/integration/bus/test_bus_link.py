"""The socket to a bus, against peers that are slow, hostile or no bus at all."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate.bus import Bus, Interface, Method, PrivateBus
from migrate.bus.link import Link, socket_path
from migrate.bus.messages import Fields, Kind, Message, encode_header
from migrate.errors import BusError, UsageError

PEER = "org.freedesktop.DBus.Peer"


def against(directory: Path, serve: Callable[[socket.socket], Awaitable[None]]) -> float:
    """Connect to a fake bus that behaves like `serve`; the seconds until BusError."""

    async def main() -> float:
        path = str(directory / "fake")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(path)
        listener.listen()
        loop = asyncio.get_running_loop()

        async def accept() -> None:
            peer, _ = await loop.sock_accept(listener)
            with peer:
                await serve(peer)

        task = asyncio.create_task(accept())
        started = loop.time()
        try:
            with pytest.raises(BusError):
                await Bus.connect(f"unix:path={path}", timeout=0.5)
            return loop.time() - started
        finally:
            task.cancel()
            listener.close()

    return asyncio.run(asyncio.wait_for(main(), 10))


def test_a_peer_that_hangs_up_during_authentication_is_an_error_at_once(short_dir: Path) -> None:
    async def hang_up(peer: socket.socket) -> None:
        await asyncio.get_running_loop().sock_recv(peer, 100)

    assert against(short_dir, hang_up) < 0.4


def test_a_peer_that_hangs_up_in_the_middle_of_a_word_is_an_error_at_once(short_dir: Path) -> None:
    async def hang_up(peer: socket.socket) -> None:
        await asyncio.get_running_loop().sock_recv(peer, 100)
        await asyncio.get_running_loop().sock_sendall(peer, b"OK 12")

    assert against(short_dir, hang_up) < 0.4


def test_a_peer_that_says_nothing_is_an_error_at_the_deadline(short_dir: Path) -> None:
    async def say_nothing(peer: socket.socket) -> None:
        await asyncio.Event().wait()

    assert 0.4 < against(short_dir, say_nothing) < 2


def test_a_peer_that_talks_without_end_does_not_fill_our_memory(short_dir: Path) -> None:
    async def talk(peer: socket.socket) -> None:
        while True:
            await asyncio.get_running_loop().sock_sendall(peer, b"x" * 1000)

    assert against(short_dir, talk) < 0.4


def test_a_peer_that_says_more_than_it_was_asked_is_an_error_at_once(short_dir: Path) -> None:
    async def chat(peer: socket.socket) -> None:
        await asyncio.get_running_loop().sock_recv(peer, 100)
        await asyncio.get_running_loop().sock_sendall(peer, b"OK 1234\r\nAGREE_UNIX_FD\r\nmore")
        await asyncio.Event().wait()

    assert against(short_dir, chat) < 0.4


def test_a_peer_that_claims_a_message_of_four_gibibytes_is_cut_off(short_dir: Path) -> None:
    async def claim(peer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for answer in (b"OK 1234\r\n", b"AGREE_UNIX_FD\r\n"):
            await loop.sock_recv(peer, 1000)
            await loop.sock_sendall(peer, answer)
        await loop.sock_recv(peer, 1000)
        await loop.sock_sendall(peer, struct.pack("<cBBBIII", b"l", 2, 0, 1, 0xFFFFFFFF, 1, 8))
        while await loop.sock_recv(peer, 1000):
            pass

    assert against(short_dir, claim) < 0.4


@pytest.mark.parametrize("address", ["", "unix", "tcp:host=127.0.0.1,port=1", "unix:tmpdir=/tmp", "/run/bus"])
def test_an_address_that_is_no_unix_socket_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="address"):
        asyncio.run(Bus.connect(address))


def test_a_path_too_long_for_a_socket_is_refused_with_both_lengths(short_dir: Path) -> None:
    socket_path("unix:path=/" + "x" * 106)
    with pytest.raises(UsageError, match=r"108 bytes.*107"):
        socket_path("unix:path=/" + "x" * 107)
    with pytest.raises(UsageError, match="107"):
        PrivateBus(short_dir / ("x" * 107))


def test_nobody_at_the_path_is_an_error_that_names_it(short_dir: Path) -> None:
    with pytest.raises(BusError, match="nobody"):
        asyncio.run(Bus.connect(f"unix:path={short_dir}/nobody"))


def message_with(body: bytes, fds: int) -> bytes:
    return (
        encode_header(Kind.SIGNAL, 1, len(body), Fields("/", "a.b", "C", unix_fds=fds, signature="ay")) + body
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 3)), min_size=1, max_size=6), st.data())
def test_messages_cut_anywhere_arrive_whole_and_with_their_own_descriptors(
    sent: list[tuple[bytes, int]], data: st.DataObject
) -> None:
    async def main() -> list[tuple[bytes, list[bytes]]]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        arrived: list[tuple[bytes, list[bytes]]] = []
        done = asyncio.Event()

        def take(message: Message) -> None:
            contents = [os.pread(fd, 100, 0) for fd in message.fds]
            assert not any(os.get_inheritable(fd) for fd in message.fds)
            message.close_fds()
            arrived.append((message.body, contents))
            if len(arrived) == len(sent):
                done.set()

        link = Link(ours)
        link.start(take, lambda why: pytest.fail(why))
        for number, (body, count) in enumerate(sent):
            fds = [memfd(f"{number}.{index}".encode()) for index in range(count)]
            frame = message_with(body, count)
            cuts = sorted(data.draw(st.sets(st.integers(1, len(frame) - 1), max_size=4)))
            # Descriptors travel with the first bytes of their message.
            for start, end in zip([0, *cuts], [*cuts, len(frame)], strict=True):
                socket.send_fds(theirs, [frame[start:end]], fds if not start else [])
                if data.draw(st.booleans()):
                    await asyncio.sleep(0)
            for fd in fds:
                os.close(fd)
        await asyncio.wait_for(done.wait(), 5)
        link.close()
        theirs.close()
        return arrived

    expected = [
        (body, [f"{number}.{index}".encode() for index in range(count)])
        for number, (body, count) in enumerate(sent)
    ]
    assert asyncio.run(main()) == expected


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def test_a_bus_that_takes_nothing_for_a_while_costs_no_message(on_bus: Callable[..., object]) -> None:
    async def scenario(private: PrivateBus) -> None:
        a, b = await Bus.connect(private.address), await Bus.connect(private.address)
        assert private.pid is not None
        os.kill(private.pid, signal.SIGSTOP)
        calls = [
            asyncio.ensure_future(b.call(a.unique_name, "/", PEER, "Ping", timeout=30)) for _ in range(5000)
        ]
        await asyncio.sleep(0)  # every call has been handed to the socket or its queue
        assert b._link._queue, "the socket took it all; the test shows nothing"
        os.kill(private.pid, signal.SIGCONT)
        assert await asyncio.gather(*calls) == [[]] * 5000
        await a.close()
        await b.close()

    on_bus(scenario)


def test_an_answer_s_descriptor_arrives_even_where_the_socket_was_full_and_it_is_closed_here(
    on_bus: Callable[..., object],
) -> None:
    async def scenario(private: PrivateBus) -> None:
        a, b = await Bus.connect(private.address), await Bus.connect(private.address)
        called, go_on = asyncio.Event(), asyncio.Event()

        async def give(_call: object) -> int:
            called.set()
            await go_on.wait()
            return memfd(b"content")

        a.export("/x", Interface("org.vmferry.T", [Method("Give", "", "h", [], ["fd"], give)]))
        call = asyncio.create_task(b.call(a.unique_name, "/x", "org.vmferry.T", "Give", timeout=30))
        await called.wait()
        assert private.pid is not None
        os.kill(private.pid, signal.SIGSTOP)
        while not a._link._queue:
            a.emit("/x", "org.vmferry.T", "Noise", "ay", [bytes(10000)])
        go_on.set()
        await asyncio.gather(*a._tasks)
        assert a._link._queue[-1][1], "the descriptor does not wait in the queue; the test shows nothing"
        os.close(os.memfd_create("takes the number that is free now"))
        os.kill(private.pid, signal.SIGCONT)
        (fd,) = await call
        assert os.pread(fd, 100, 0) == b"content"
        os.close(fd)
        await a.close()
        await b.close()

    on_bus(scenario)


def test_forty_descriptors_in_one_message_do_not_end_the_connection() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        arrived: asyncio.Queue[Message] = asyncio.Queue()
        link = Link(ours)
        link.start(arrived.put_nowait, lambda why: pytest.fail(why))
        fds = [memfd(str(number).encode()) for number in range(40)]
        socket.send_fds(theirs, [message_with(b"", 40)], fds)
        message = await arrived.get()
        assert [os.pread(fd, 10, 0) for fd in message.fds] == [str(number).encode() for number in range(40)]
        message.close_fds()
        for fd in fds:
            os.close(fd)
        link.close()
        theirs.close()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_participant_cannot_end_our_connection_with_a_field_of_its_own(
    on_bus: Callable[..., object],
) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus = await Bus.connect(private.address)
        hostile = await Bus.connect(private.address)
        known = encode_header(Kind.CALL, 900, 0, Fields("/", PEER, "Ping", destination=bus.unique_name))
        # A field with code 200: one holds a number, one an array.
        for extra in (
            bytes((200, 1, ord("t"), 0, 0, 0, 0, 0)) + bytes(8),
            bytes((200, 2, ord("a"), ord("u"), 0, 0, 0, 0)) + struct.pack("<II", 4, 7),
        ):
            (length,) = struct.unpack_from("<I", known, 12)
            fields = known[16 : 16 + length] + bytes(-length % 8) + extra
            hostile._link.send(known[:12] + struct.pack("<I", len(fields)) + fields + bytes(-len(fields) % 8))
        try:
            await hostile.call("org.freedesktop.DBus", "/", PEER, "Ping", timeout=5)
        finally:
            assert not bus.closed.is_set()
            assert await bus.pid_of(bus.unique_name) == os.getpid()
            await hostile.close()
            await bus.close()

    on_bus(scenario)
