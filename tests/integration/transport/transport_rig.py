"""Real certificates, real connections of every kind, and threads that tests can wait for."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from migrate.transport import pki
from migrate.transport.channel import ByteChannel, PipeChannel, SocketChannel
from migrate.transport.control import accept_page, dial_page
from migrate.transport.preamble import SIZE, Preamble, decode
from migrate.transport.tls import Credentials
from migrate.transport.uri import TlsDestination

SESSION = bytes(range(16))

KINDS = ("unix", "tcp", "tls", "pipe")


def open_descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own
            pass
    return found


@dataclass(frozen=True)
class Hosts:
    """Two hosts of one CA, and every kind of stranger."""

    a: Credentials
    b: Credentials
    stranger: Credentials  #: of another CA that has the same name, trusting the right one
    expired: Credentials
    unborn: Credentials


def make_hosts(root: Path) -> Hosts:
    now = datetime.now(UTC)
    pki.init(root / "ca", "lab", now=now - timedelta(days=100))
    pki.init(root / "other", "lab")

    def issue(ca: str, name: str, extra: list[str] | None = None, **options: Any) -> Credentials:
        return pki.load(pki.issue(root / ca, name, extra or [], **options).directory, ["*"])

    a, b = issue("ca", "hosta"), issue("ca", "hostb", ["127.0.0.1", "localhost"])
    stranger = replace(issue("other", "hosta", ["127.0.0.1"]), ca=a.ca)
    expired = issue("ca", "old.example", ["127.0.0.1"], days=1, now=now - timedelta(days=5))
    unborn = issue("ca", "new.example", ["127.0.0.1"], days=1, now=now + timedelta(days=5))
    return Hosts(a, b, stranger, expired, unborn)


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run beside the test; `result(timeout)` gives the value or raises."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Server:
    """A listening TCP socket on loopback; each use takes one connection."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]

    def destination(self, name: str | None = None) -> TlsDestination:
        return TlsDestination("127.0.0.1", self.port, name)

    def take(self, work: Callable[[socket.socket], Any]) -> Future[Any]:
        """Accept one connection in a thread and give it to `work`."""

        def run() -> Any:
            sock, _ = self.sock.accept()
            return work(sock)

        return in_thread(run)

    def take_after_preamble(self, work: Callable[[socket.socket, Preamble], Any]) -> Future[Any]:
        return self.take(lambda sock: work(sock, decode(sock.recv(SIZE, socket.MSG_WAITALL))))


@contextmanager
def connected(kind: str, hosts: Hosts) -> Iterator[tuple[ByteChannel, ByteChannel]]:
    """Both ends of a channel of this kind."""
    if kind == "pipe":
        (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
        ours: Any = PipeChannel(ours_in, ours_out, label="b")
        theirs: Any = PipeChannel(theirs_in, theirs_out, label="a")
    elif kind == "unix":
        one, other = socket.socketpair()
        ours, theirs = SocketChannel(one, "unix", "b"), SocketChannel(other, "unix", "a")
    else:
        server = Server()
        if kind == "tcp":
            accepted = server.take(lambda sock: SocketChannel(sock, "tcp", "a"))
            ours = SocketChannel(socket.create_connection(("127.0.0.1", server.port)), "tcp", "b")
        else:
            accepted = server.take_after_preamble(
                lambda sock, first: accept_page(sock, first, hosts.b, timeout=20)
            )
            ours = dial_page(server.destination(), hosts.a, SESSION, 3, timeout=20)
        theirs = accepted.result(20)
        server.sock.close()
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


def wait_until_blocked(thread: threading.Thread) -> None:
    """Until the kernel says that the thread waits in a system call other than for the interpreter's lock."""
    futex = "202" if os.uname().machine == "x86_64" else "98"
    end = time.monotonic() + 20
    while time.monotonic() < end:
        task = Path(f"/proc/self/task/{thread.native_id}")
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        if state == "S" and (task / "syscall").read_text().split()[0] not in ("running", futex):
            return
        time.sleep(0.001)
    raise AssertionError("the thread never blocked")
