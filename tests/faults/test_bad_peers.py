"""Peers that talk garbage, with a certificate and without: a clear line, bounded memory, and the daemon serves on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.coordinator.link import Link
from migrate.errors import FerryError, TransportError
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.state import catalog
from migrate.transport.channel import Channel
from migrate.transport.preamble import Kind, Preamble, encode
from migrate.transport.stream import ControlStream
from tests.faults import mallory
from tests.faults.leftovers import Pen
from tests.faults.mallory import HUGE, header
from tests.faults.rig import MACHINE, Host, Trail, eventually, peak_bytes

Pair = tuple[Host, Host]
MIB = 1 << 20
#: A coordinator that serves has some 50 MiB, a daemon some 45. What a peer can make them hold comes on top: one frame and a
#: full inbox, each of them some MiB.
COORDINATOR_BYTES, DAEMON_BYTES = 160 * MIB, 90 * MIB


class Watch:
    """The most memory that any coordinator has had, until it is stopped."""

    def __init__(self, ground: Pen) -> None:
        self.peaks: dict[int, int] = {}
        self._ground = ground
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            for process in self._ground.processes():
                if "migrate.coordinator" in process.words:
                    with contextlib.suppress(OSError, AssertionError):
                        self.peaks[process.pid] = peak_bytes(process.pid)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self.peaks.values(), default=0)


@contextlib.contextmanager
def bounded(host: Host) -> Iterator[None]:
    """While this goes on, coordinators and the daemon stay small; then nothing of it is left, and the daemon still serves."""
    watch = Watch(host.pen)
    try:
        yield
        eventually(lambda: not host.processes("migrate.coordinator", "destination"), "no coordinator is left")
    finally:
        peak = watch.stop()
    assert 0 < peak < COORDINATOR_BYTES, f"{peak / MIB:.0f} MiB"
    assert peak_bytes(host.pid) < DAEMON_BYTES, f"{peak_bytes(host.pid) / MIB:.0f} MiB"
    eventually(lambda: host.machines() == [], "no machine is left")


def refused(a: Host, to: str) -> str:
    said = a.ferry("migrate", MACHINE, "--to", to, "--json")
    line = said.complaint(1)
    assert (said.outcome["outcome"], said.outcome["running_on"]) == ("aborted", "source"), said
    a.ticks_on(5)
    return line


# -- destinations that are none ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server that reads a little, says this to everybody, and closes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(64)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "does not speak TLS"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "does not speak TLS"),
        (random.Random(1).randbytes(4096), "TLS"),
        (b"", "closed the connection"),
    ],
    ids=["http", "ssh", "noise", "nothing"],
)
def test_a_destination_that_is_no_vmferry_is_one_clear_line(here: Pair, answer: bytes, said: str) -> None:
    a, _ = here
    with answering(answer) as port:
        assert said in refused(a, f"tls://127.0.0.1:{port}?name=hostb")


def test_a_destination_by_command_that_prints_a_banner_is_one_clear_line(here: Pair) -> None:
    a, _ = here
    assert "vmferry's protocol" in refused(a, "exec:echo Welcome to hostb. Please behave.; cat >/dev/null")


@pytest.mark.parametrize(
    ("garbage", "said"),
    [
        (header(frames.Kind.CONTROL, HUGE), f"claims {HUGE} bytes"),
        (header(frames.Kind.PAGES, 4096) + bytes(4096), "page frames"),
        (b"VMF1" + b"\xff" * 60, "checksum"),
        (random.Random(2).randbytes(256), "a frame begins with"),
        (frames.encode_control(b"\xc1" * 100), "cannot be read"),
        (frames.encode_control(m.encode(m.Running(0, 0))), "RUNNING"),
    ],
    ids=["4-GiB", "pages", "checksum", "noise", "no-message", "out-of-turn"],
)
def test_a_destination_with_a_certificate_that_talks_garbage_is_given_up_and_the_guest_goes_on(
    here: Pair, keys: dict[str, Path], garbage: bytes, said: str
) -> None:
    a, _ = here
    watch = Watch(a.pen)

    async def talk(stream: ControlStream) -> None:
        await stream.write(garbage, timeout=10)
        with contextlib.suppress(FerryError):
            while True:  # until the other side has had enough
                await stream.read_exactly(1, timeout=30)

    async def play() -> str:
        async with mallory.destination(keys["mallory"], talk) as port:
            return await asyncio.to_thread(refused, a, f"tls://127.0.0.1:{port}?name=mallory")

    try:
        assert said in mallory.run(play)
    finally:
        peak = watch.stop()
    assert 0 < peak < COORDINATOR_BYTES, f"{peak / MIB:.0f} MiB"


# -- clients without a certificate -------------------------------------------------------------------------------------------


def connect(host: Host) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", host.port), timeout=30)
    sock.settimeout(30)
    return sock


def closed(sock: socket.socket) -> bytes:
    """What it says until it closes."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(4096):
            said += data
    return said


def test_strangers_that_talk_garbage_are_dropped_at_once_and_the_log_says_who(here: Pair) -> None:
    _, b = here
    noise = random.Random(3)
    for _ in range(100):
        with connect(b) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(noise.randbytes(1000))
            closed(sock)
    with connect(b) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: hostb\r\nAccept: */*\r\n\r\n")
        closed(sock)
    eventually(lambda: "it speaks HTTP" in b.log.read_text(), "the log says that somebody spoke HTTP")
    assert b.processes("migrate.coordinator") == []  # none was worth a process
    assert "Traceback" not in b.log.read_text()
    assert peak_bytes(b.pid) < DAEMON_BYTES


def test_many_slow_strangers_do_not_keep_a_migration_out(here: Pair) -> None:
    a, b = here
    first = encode(Preamble(Kind.CONTROL, 0, bytes(16)))
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(connect(b)) for _ in range(100)
        ]  # more than may owe their preamble at once
        for sock in slow:
            sock.sendall(first[:5])
        said = a.ferry("migrate", MACHINE, "--to", b.tls, "--downtime", "5000")
        assert said.code == 0, said
        for sock in slow:
            closed(sock)  # every one is sent away in the end
    b.ticks_on()
    assert peak_bytes(b.pid) < DAEMON_BYTES
    assert b.ferry("migrate", MACHINE, "--to", a.tls, "--downtime", "5000").code == 0


def test_a_stranger_with_a_right_preamble_and_no_tls_ends_with_its_coordinator(here: Pair) -> None:
    _, b = here
    with bounded(b):
        for garbage in (b"\x16\x03\x01" + b"\xff" * 2000, random.Random(4).randbytes(2000)):
            with connect(b) as sock:
                sock.sendall(encode(Preamble(Kind.CONTROL, 0, os.urandom(16))) + garbage)
                closed(sock)
        with connect(b) as sock:  # pages for a session that is not here
            sock.sendall(encode(Preamble(Kind.PAGE, 0, os.urandom(16))) + b"\xff" * 2000)
            closed(sock)
    assert "a page channel came for a session that is not here" in b.log.read_text()


def test_a_client_of_another_ca_is_turned_away_and_both_logs_say_so(here: Pair, ground: Pen) -> None:
    from tests.faults.rig import keys_for

    _, b = here
    stranger = keys_for(ground, "hosta", ca="foreign")["hosta"]

    async def call() -> None:
        await mallory.Caller(b, stranger, "0" * 32).control()

    with pytest.raises(TransportError, match="another CA"):
        mallory.run(call)
    eventually(lambda: "another CA" in b.log.read_text(), "the daemon's log says so too")
    assert b.machines() == []


# -- clients with a certificate ----------------------------------------------------------------------------------------------


def test_a_client_with_a_certificate_that_claims_a_4_gib_frame_is_cut_off(
    here: Pair, keys: dict[str, Path]
) -> None:
    _, b = here

    async def before_hello() -> None:
        stream = await mallory.Caller(b, keys["mallory"], os.urandom(16).hex()).control()
        await stream.write(header(frames.Kind.CONTROL, HUGE), timeout=10)
        await flood(stream)

    async def after_hello() -> None:
        async with mallory.greeted(b, keys["mallory"]) as (_, link):
            await link.stream.write(header(frames.Kind.PAGES, HUGE), timeout=10)
            await flood(link.stream)  # type: ignore[arg-type]

    async def flood(stream: ControlStream) -> None:
        """More than the bound on memory, if only it were taken."""
        with contextlib.suppress(FerryError):
            for _ in range(COORDINATOR_BYTES // MIB):
                await stream.write(bytes(MIB), timeout=5)
            pytest.fail("everything was taken")
        await stream.close()

    with bounded(b):
        mallory.run(before_hello)
        mallory.run(after_hello)
    assert f"claims {HUGE} bytes" in b.log.read_text()


@pytest.mark.parametrize(
    ("garbage", "said"),
    [
        (header(frames.Kind.PAGES, HUGE), f"claims {HUGE} bytes"),
        (header(frames.Kind.CONTROL, 64), "a CONTROL frame came among pages"),
        (b"noise" * 1000, "a frame begins with"),
    ],
    ids=["4-GiB", "control", "noise"],
)
def test_a_page_channel_that_talks_garbage_ends_the_migration(
    here: Pair, keys: dict[str, Path], garbage: bytes, said: str
) -> None:
    _, b = here

    async def play() -> None:
        async with mallory.greeted(b, keys["mallory"]) as (caller, link):
            channel = await mallory.started(caller, link)
            sending = asyncio.create_task(asyncio.to_thread(flood, channel))
            # Told at once, in the middle of a round that does not end.
            with pytest.raises(FerryError, match=said):
                await link.receive(timeout=30)
            channel.abort()
            await sending
            channel.close()

    def flood(channel: Channel) -> None:
        with contextlib.suppress(FerryError):
            channel.send(garbage)
            for _ in range(2 * COORDINATOR_BYTES // MIB):
                channel.send(bytes(MIB))
            pytest.fail("everything was taken")

    with bounded(b):
        mallory.run(play)


def test_pages_outside_the_guests_memory_are_refused(here: Pair, keys: dict[str, Path]) -> None:
    import numpy as np

    _, b = here
    gpas, sizes = np.array([mallory.REGION], np.uint64), np.array([4096], np.uint64)
    frame = frames.encode_table(frames.Kind.PAGES, 1, gpas, sizes) + bytes(4096)

    async def play() -> None:
        async with mallory.greeted(b, keys["mallory"]) as (caller, link):
            channel = await mallory.started(caller, link)
            await asyncio.to_thread(channel.send, frame)
            with pytest.raises(FerryError, match="memory"):
                await link.receive(timeout=30)
            channel.close()

    with bounded(b):
        mallory.run(play)


def test_marks_of_rounds_without_end_are_cut_off(here: Pair, keys: dict[str, Path]) -> None:
    import numpy as np

    _, b = here
    none = np.array([], np.uint64)

    async def play() -> None:
        async with mallory.greeted(b, keys["mallory"]) as (caller, link):
            channel = await mallory.started(caller, link)
            marks = b"".join(frames.encode_table(frames.Kind.MARK, n, none, none) for n in range(1, 1000))
            await asyncio.to_thread(channel.send, marks)
            with pytest.raises(FerryError, match="never begun"):
                await link.receive(timeout=30)
            channel.close()

    with bounded(b):
        mallory.run(play)


def test_a_flood_that_a_device_is_too_slow_for_waits_on_the_wire_and_not_in_memory(
    here: Pair, keys: dict[str, Path]
) -> None:
    _, b = here
    schema = catalog.load("display").at(1)
    display = m.DeviceEntry(
        id="display0", type="display", protocol="vfio-user", versions=(1,), digest=schema.digest, tracker="none",
        opaque=False, gpa=0xD000_0000, irq=1, vectors=1, options={}, disks=(),
    )  # fmt: skip

    async def play() -> None:
        async with mallory.greeted(b, keys["mallory"]) as (caller, link):
            channel = await mallory.started(caller, link, devices=(display,))
            pid = await asyncio.to_thread(b.pid_of, "display0", "mallory")
            os.kill(pid, signal.SIGSTOP)
            chunk = frames.encode_control(m.encode(m.Chunk("display0", bytes(m.MAX_CHUNK))))
            with pytest.raises(TransportError, match="taken nothing"):
                await flood(link, chunk)
            channel.close()

    async def flood(link: Link, chunk: bytes) -> None:
        for _ in range(4 * COORDINATOR_BYTES // len(chunk)):
            await link.stream.write(chunk, timeout=2.0)

    with bounded(b):
        mallory.run(play)


def test_a_manifest_that_asks_for_more_memory_than_there_is_is_refused(
    here: Pair, keys: dict[str, Path]
) -> None:
    _, b = here

    async def play() -> m.Message:
        async with mallory.greeted(b, keys["mallory"]) as (caller, link):
            await link.send(m.Manifest("mallory", caller.job, 1, False, (m.RegionEntry(0, 1 << 46),), (), ()))
            return await link.receive(timeout=30)

    with bounded(b):
        answer = mallory.run(play)
    assert isinstance(answer, m.Refuse)
    assert "free" in answer.reasons[0].reason


def test_a_certificate_does_not_let_anybody_end_or_replace_a_machine_that_runs(
    here: Pair, keys: dict[str, Path]
) -> None:
    a, _ = here

    async def play() -> m.Message:
        async with mallory.greeted(a, keys["mallory"]) as (caller, link):
            await link.send(
                m.Manifest(MACHINE, caller.job, 99, False, (m.RegionEntry(0, mallory.REGION),), (), ())
            )
            return await link.receive(timeout=30)

    answer = mallory.run(play)
    assert isinstance(answer, m.Refuse)
    assert "is on that host already" in answer.reasons[0].reason
    assert a.state() == "running"
    a.ticks_on()


def test_silence_after_tls_does_not_hold_a_coordinator_for_long(here: Pair, keys: dict[str, Path]) -> None:
    _, b = here

    async def play() -> float:
        stream = await mallory.Caller(b, keys["mallory"], os.urandom(16).hex()).control()
        began = time.monotonic()
        with contextlib.suppress(FerryError):
            await stream.read_exactly(1, timeout=50)
        await stream.close()
        return time.monotonic() - began

    with bounded(b):
        assert mallory.run(play) < 40


def test_after_all_of_that_the_same_daemons_serve_a_migration_there_and_back(here: Pair) -> None:
    a, b = here
    for host in here:
        assert host.log.read_text().count("event=ready") == 1, "none was started again"
        assert "Traceback" not in host.log.read_text()
    trail = Trail(a, b)
    for source, target in ((a, b), (b, a)):
        said = source.ferry("migrate", MACHINE, "--to", target.tls, "--downtime", "5000")
        assert said.code == 0, said
        source.becomes("")
        trail.goes(target)
        target.ticks_on()
    trail.check()
