"""Page channels of every kind: all bytes, in order, or an error that says why; and threads that can be woken."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from transport_rig import KINDS, Hosts, connected, in_thread, wait_until_blocked

from migrate.errors import ChannelClosed, TransportError
from migrate.transport import sockets
from migrate.transport.channel import IOV_MAX, SocketChannel

every_kind = pytest.mark.parametrize("kind", KINDS)


def received(channel: Any, size: int) -> Any:
    def work() -> bytearray:
        got = bytearray(size)
        channel.recv_into(memoryview(got))
        return got

    return in_thread(work)


@every_kind
@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [0, 5, 0],
        [4096] * (2 * IOV_MAX + 1),
        [256 << 10, 1, (256 << 10) - 1, (256 << 10) + 1, 4096],
        [9 << 20, 3, 5 << 20],
        [random.Random(7).choice((1, 511, 4096, 70_000, 300_000)) for _ in range(200)],
    ],
    ids=["one byte", "empty views", "more than IOV_MAX pages", "around the TLS chunk", "huge", "mixed"],
)
def test_all_bytes_of_all_views_arrive_in_order(kind: str, sizes: list[int], hosts: Hosts) -> None:
    data = memoryview(random.Random(len(sizes)).randbytes(sum(sizes)))
    views, start = [], 0
    for size in sizes:
        views.append(data[start : start + size])
        start += size
    with connected(kind, hosts) as (ours, theirs):
        arriving = received(theirs, len(data))
        ours.send_runs(views)
        ours.send(b"end")
        assert arriving.result(30) == data
        assert received(theirs, 3).result(30) == b"end"


@every_kind
def test_small_sends_and_large_reads_need_not_match(kind: str, hosts: Hosts) -> None:
    with connected(kind, hosts) as (ours, theirs):
        arriving = received(theirs, 1000)
        for number in range(100):
            ours.send(bytes([number]) * 10)
        assert arriving.result(30) == b"".join(bytes([number]) * 10 for number in range(100))


@every_kind
def test_a_peer_that_closes_before_the_view_is_full_is_a_closed_channel(kind: str, hosts: Hosts) -> None:
    with connected(kind, hosts) as (ours, theirs):
        arriving = received(theirs, 10)
        ours.send(b"12345")
        ours.close()
        with pytest.raises(ChannelClosed, match="closed the connection") as caught:
            arriving.result(30)
        assert caught.value.remedy


@every_kind
def test_sending_to_a_peer_that_closed_is_a_closed_channel(kind: str, hosts: Hosts) -> None:
    with connected(kind, hosts) as (ours, theirs):
        theirs.close()
        with pytest.raises(ChannelClosed):
            ours.send(bytes(64 << 20))


@every_kind
def test_no_progress_for_the_deadline_is_an_error_but_the_channel_is_not_called_closed(
    kind: str, hosts: Hosts
) -> None:
    with connected(kind, hosts) as (ours, _):
        ours.set_deadline(0.1)
        for stuck in (lambda: ours.recv_into(memoryview(bytearray(1))), lambda: ours.send(bytes(64 << 20))):
            with pytest.raises(TransportError, match="moved no byte") as caught:
                stuck()
            assert not isinstance(caught.value, ChannelClosed)


def blocked(work: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until_blocked(thread)
    return thread, raised


@every_kind
@pytest.mark.parametrize("direction", ["recv", "send"])
def test_abort_wakes_a_thread_that_is_blocked(kind: str, direction: str, hosts: Hosts) -> None:
    with connected(kind, hosts) as (ours, theirs):
        if direction == "recv":
            thread, raised = blocked(lambda: ours.recv_into(memoryview(bytearray(1))))
        else:
            # the kernel's buffers are full before the thread can block
            thread, raised = blocked(lambda: ours.send(bytes(64 << 20)))
        ours.abort()
        thread.join(20)
        assert not thread.is_alive()
        assert isinstance(raised[0], ChannelClosed)
        assert "given up by this side" in str(raised[0])
        ours.close()
        with pytest.raises(ChannelClosed):
            theirs.recv_into(memoryview(bytearray(65 << 20)))


@every_kind
def test_an_abort_before_the_call_counts_and_closing_twice_or_aborting_later_harms_nothing(
    kind: str, hosts: Hosts
) -> None:
    with connected(kind, hosts) as (ours, _):
        ours.abort()
        ours.abort()
        with pytest.raises(ChannelClosed, match="given up"):
            ours.recv_into(memoryview(bytearray(1)))
        with pytest.raises(ChannelClosed, match="given up"):
            ours.send(bytes(64 << 20))
        ours.close()
        ours.close()
        ours.abort()


CHILD = """
import socket, signal, sys
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.sendall(b"up")
signal.pause()
"""


def test_a_peer_that_is_killed_is_noticed_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(server.getsockname()[1])])
        sock, _ = server.accept()
        channel = SocketChannel(sock, "peer", "peer")
        channel.recv_into(memoryview(bytearray(2)))
        thread, raised = blocked(lambda: channel.recv_into(memoryview(bytearray(1))))
        child.send_signal(signal.SIGKILL)
        child.wait()
        thread.join(20)
        assert isinstance(raised[0], ChannelClosed)
        with pytest.raises(ChannelClosed):
            channel.send(bytes(64 << 20))
        channel.close()


def test_a_tcp_connection_notices_a_host_that_vanished_in_about_twenty_seconds() -> None:
    """The options that make it so; that they do was seen with a link taken down (see `sockets`)."""
    with socket.socket() as sock:
        sockets.tune(sock)
        option = lambda name: sock.getsockopt(socket.IPPROTO_TCP, name)  # noqa: E731
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert option(socket.TCP_NODELAY)
        probing = option(socket.TCP_KEEPIDLE) + option(socket.TCP_KEEPINTVL) * option(socket.TCP_KEEPCNT)
        assert probing == sockets.DEAD_PEER_SECONDS == 20
        assert option(socket.TCP_USER_TIMEOUT) == 20_000
