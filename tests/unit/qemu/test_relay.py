"""QEMU's channel through ours: every byte, in order, both ways; what does not belong is refused; nothing waits for ever."""

from __future__ import annotations

import gc
import hashlib
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import DeviceGone, FerryError, RemoteProtocolError
from migrate.protocol import frames
from migrate.protocol.frames import Kind
from migrate.qemu import relay
from migrate.qemu.relay import RelayIn, RelayOut, back_of
from migrate.transport.channel import SocketChannel


class Road:
    """A source's relay and a destination's, joined by sockets; test plays both QEMUs."""

    def __init__(self, directory: Path, count: int) -> None:
        self.failures: queue.Queue[FerryError] = queue.Queue()
        pairs = [socket.socketpair() for _ in range(count)]
        self.near = [SocketChannel(one, "unix", "near") for one, _ in pairs]
        self.far = [SocketChannel(other, "unix", "far") for _, other in pairs]
        self.out = RelayOut(directory / "out", self.near, self.failures.put)
        self.into = RelayIn(self.failures.put, self._back)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(directory / "in"))
        self.listener.listen(count)
        self.listener.settimeout(10)
        self.into.listen(directory / "in", count)
        self.out.start()

    def join(self) -> None:
        for index, channel in enumerate(self.far):
            self.into.join(index, channel)

    def _back(self, frame: bytes) -> None:
        header = frames.decode_header(frame[: frames.HEADER_SIZE])
        self.out.take_back(*back_of(header, frame[frames.HEADER_SIZE :]))

    def connect(self) -> socket.socket:
        """The source's QEMU makes a connection."""
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(self.out.path))
        made.settimeout(10)
        return made

    def accept(self) -> socket.socket:
        """The destination's QEMU gets one."""
        made, _ = self.listener.accept()
        made.settimeout(10)
        return made

    def close(self) -> None:
        self.out.close()
        self.into.close()
        self.listener.close()


@pytest.fixture
def road(tmp_path: Path) -> Iterator[Road]:
    road = Road(tmp_path, 1)
    yield road
    road.close()


def read(sock: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        data = sock.recv(size - len(found))
        assert data, f"the end after {len(found)} of {size} bytes"
        found += data
    return found


def test_every_byte_passes_in_order_and_answers_come_back(road: Road) -> None:
    road.join()
    source = road.connect()
    data = os.urandom(5_000_000)
    sending = threading.Thread(target=source.sendall, args=(data,))
    sending.start()
    destination = road.accept()
    assert read(destination, len(data)) == data
    sending.join()
    destination.sendall(b"PONG")
    assert read(source, 4) == b"PONG"
    road.out.guest_stopped()
    source.sendall(b"the end")
    source.close()
    assert read(destination, 7) == b"the end"
    assert destination.recv(1) == b""
    assert road.out.ended.wait(5)
    assert road.into.digests(5) == tuple(road.out.digests)
    assert road.failures.empty()
    destination.close()


def test_what_passes_after_the_stop_is_digested_and_what_passed_before_is_not(road: Road) -> None:
    road.join()
    source = road.connect()
    source.sendall(b"live")
    destination = road.accept()
    assert read(destination, 4) == b"live"
    time.sleep(0.05)
    road.out.guest_stopped()
    source.sendall(b"still")
    source.close()
    read(destination, 5)
    assert road.into.digests(5) == (hashlib.sha256(b"still").digest(),)
    destination.close()


def test_connections_are_made_in_qemus_order_and_none_before_its_first_bytes(tmp_path: Path) -> None:
    """7.2 tells its main channel by nothing but the order, and hangs in its main loop until a connection has bytes."""
    road = Road(tmp_path, 3)
    road.join()
    main, one, two = road.connect(), road.connect(), road.connect()
    two.sendall(b"2")
    one.sendall(b"1")
    road.listener.settimeout(0.2)
    with pytest.raises(TimeoutError):
        road.listener.accept()
    road.listener.settimeout(10)
    main.sendall(b"0")
    assert [read(road.accept(), 1) for _ in range(3)] == [b"0", b"1", b"2"]
    for each in (main, one, two):
        each.close()
    road.close()


def test_a_source_that_closes_early_is_no_end_of_the_stream(
    road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "LAST_WORDS_SECONDS", 0.05)
    road.join()
    source = road.connect()
    source.sendall(b"half")
    destination = road.accept()
    read(destination, 4)
    source.close()
    assert "closed its migration's channel early" in str(road.failures.get(timeout=5))
    destination.settimeout(0.2)
    with pytest.raises(TimeoutError):
        destination.recv(1)
    assert road.into.digests(0.1) is None
    destination.close()


def test_a_destination_that_takes_nothing_more_is_told_of_after_its_last_words(
    road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "LAST_WORDS_SECONDS", 0.05)
    road.join()
    source = road.connect()
    source.sendall(b"x")
    destination = road.accept()
    read(destination, 1)
    destination.close()
    for _ in range(20):
        source.sendall(b"y" * 4096)
        time.sleep(0.01)
        if not road.failures.empty():
            break
    assert isinstance(road.failures.get(timeout=5), DeviceGone)
    source.close()


def test_a_qemu_that_never_connects_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "CONNECT_SECONDS", 0.1)
    road = Road(tmp_path, 2)
    road.connect()
    assert "made 1 of 2 connections" in str(road.failures.get(timeout=5))
    road.close()


def frame(stream: int, data: bytes) -> bytes:
    return frames.encode_relay(stream, len(data)) + data


@pytest.mark.parametrize(
    "sent",
    [
        frame(1, b"for another"),
        frame(7, b""),
        frames.encode_header(Kind.MARK, 12) + bytes(12),
        frames.encode_header(Kind.RELAY, 2) + bytes(2),
        b"garbage that is no frame at all",
    ],
    ids=["another's bytes", "another's end", "a frame of pages", "a head cut off", "garbage"],
)
def test_what_does_not_belong_on_a_channel_is_refused(road: Road, sent: bytes) -> None:
    road.join()
    road.near[0].send(sent.ljust(64, b"\0"))
    assert isinstance(road.failures.get(timeout=5), RemoteProtocolError)


def test_nothing_follows_the_end_of_a_connection(road: Road) -> None:
    take = road.into.take
    header = frames.decode_header(frame(0, b"x")[:16])
    with pytest.raises(RemoteProtocolError):
        take(frames.Header(Kind.PAGES, 8), bytes(8))
    accepted: list[socket.socket] = []
    threading.Thread(target=lambda: accepted.append(road.accept()), daemon=True).start()
    take(header, frame(0, b"x")[16:])
    take(frames.Header(Kind.RELAY, 4), bytes(4))
    with pytest.raises(RemoteProtocolError):
        take(header, frame(0, b"x")[16:])


@pytest.mark.parametrize("size", [0, relay.BACK_BYTES + 1])
def test_what_comes_back_is_bounded(size: int) -> None:
    data = frames.encode_relay(0, size) + bytes(size)
    with pytest.raises(RemoteProtocolError, match="came back"):
        back_of(frames.decode_header(data[:16]), data[16:])


def test_nothing_comes_back_for_a_connection_that_has_no_return_path(road: Road) -> None:
    with pytest.raises(RemoteProtocolError, match="no return path"):
        road.out.take_back(0, b"early")
    road.connect()
    with pytest.raises(RemoteProtocolError, match="no return path"):
        road.out.take_back(1, b"multifd")


def test_closing_leaves_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    gc.collect()  # what other tests have left to it
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    road = Road(tmp_path, 2)
    road.join()
    main, other = road.connect(), road.connect()
    main.sendall(b"a")
    there = road.accept()
    road.close()
    for each in (main, other, there):
        each.close()
    for channel in road.far:
        channel.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads
