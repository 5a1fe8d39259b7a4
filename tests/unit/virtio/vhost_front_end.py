"""A front end of vhost-user for tests, written from the specification: a socket, a memory of its own, rings in it."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from virtio_driver import EVENT_IDX, INDIRECT_DESC, VERSION_1, Answer, DiskQueue, Guest, Ring
from virtio_rig import make_memory

from devices.vhost_blk import VhostUserBlk
from migrate.memory.memfd import create_memfd
from migrate.memory.region import GuestMemory

MIB = 1 << 20
#: Where this front end says that it has guest memory mapped; nobody looks there.
USER = 0x7F00_0000_0000
LOG_ALL, PROTOCOL = 1 << 26, 1 << 30
FLUSH = 1 << 9
ACCEPTED = VERSION_1 | EVENT_IDX | INDIRECT_DESC | FLUSH
#: Requests by number (docs/interop/vhost-user.rst, "Front-end message types").
GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE, SET_LOG_BASE = 1, 2, 3, 5, 6
SET_NUM, SET_ADDR, SET_BASE, GET_BASE, SET_KICK, SET_CALL, SET_ERR = 8, 9, 10, 11, 12, 13, 14
GET_PROTOCOL, SET_PROTOCOL, GET_QUEUES, ENABLE, SEND_RARP, GET_CONFIG = 15, 16, 17, 18, 19, 24
GET_INFLIGHT, SET_INFLIGHT, MAX_SLOTS, ADD_REG, REM_REG, SET_STATE_FD, CHECK_STATE = (
    31,
    32,
    36,
    37,
    38,
    42,
    43,
)


class Refused(Exception):
    """The back end acknowledged a request with an error."""


class FrontEnd:
    def __init__(self, path: str, memory: GuestMemory) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(path)
        self.memory = memory
        self.guest = Guest(memory)
        self.kicks: list[int] = []
        self.calls: list[int] = []
        self.log: int | None = None
        self.inflight: int | None = None

    # -- messages --------------------------------------------------------------------------------------------------------------

    def send(self, request: int, payload: bytes = b"", fds: list[int] | None = None, flags: int = 1) -> None:
        data = struct.pack("=III", request, flags, len(payload)) + payload
        socket.send_fds(self.socket, [data], fds or [])

    def reply(self, request: int) -> tuple[bytes, list[int]]:
        head, fds, _, _ = socket.recv_fds(self.socket, 12, 8)
        if not head:
            raise ConnectionResetError
        number, flags, size = struct.unpack("=III", head)
        assert (number, flags) == (request, 5)
        return self.socket.recv(size, socket.MSG_WAITALL), list(fds)

    def ask(self, request: int, payload: bytes = b"", fds: list[int] | None = None) -> bytes:
        self.send(request, payload, fds)
        return self.reply(request)[0]

    def ask_u64(self, request: int) -> int:
        return struct.unpack("=Q", self.ask(request))[0]

    def tell(self, request: int, payload: bytes = b"", fds: list[int] | None = None) -> None:
        """With need_reply: returns once it is done."""
        self.send(request, payload, fds, flags=9)
        if struct.unpack("=Q", self.reply(request)[0])[0]:
            raise Refused(request)

    def tell_u64(self, request: int, value: int, fds: list[int] | None = None) -> None:
        self.tell(request, struct.pack("=Q", value), fds)

    # -- what QEMU does --------------------------------------------------------------------------------------------------------

    def realize(self, queues: int) -> None:
        assert self.ask_u64(GET_FEATURES) & PROTOCOL
        self.send(SET_PROTOCOL, struct.pack("=Q", self.ask_u64(GET_PROTOCOL)))
        assert self.ask_u64(GET_QUEUES) == queues
        self.tell(SET_OWNER)
        for number in range(queues):
            self.kicks.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self.calls.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self.tell_u64(SET_CALL, number, [self.calls[number]])

    def table(self) -> None:
        region = self.memory.regions[0]
        entry = struct.pack("=IIQQQQ", 1, 0, region.gpa, region.size, USER, region.offset)
        self.tell(SET_MEM_TABLE, entry, [region.fd])

    def start(self, number: int, ring: Ring, base: int = 0) -> None:
        state = struct.Struct("=II")
        self.tell(SET_NUM, state.pack(number, ring.size))
        self.tell(SET_BASE, state.pack(number, base))
        self.addresses(number, ring)
        self.tell_u64(SET_KICK, number, [self.kicks[number]])
        self.tell(ENABLE, state.pack(number, 1))

    def addresses(self, number: int, ring: Ring, flags: int = 0) -> None:
        self.tell(
            SET_ADDR,
            struct.pack(
                "=IIQQQQ",
                number,
                flags,
                USER + ring.descriptors,
                USER + ring.used,
                USER + ring.available,
                ring.used,
            ),
        )

    def stop(self, number: int) -> int:
        """How far the ring has come."""
        self.tell(ENABLE, struct.pack("=II", number, 0))
        ring, base = struct.unpack("=II", self.ask(GET_BASE, struct.pack("=II", number, 0)))
        assert ring == number
        return base

    def begin_log(self) -> int:
        """A new dirty log, as for a migration that begins; its descriptor."""
        if self.log is not None:
            os.close(self.log)
        self.log = create_memfd("log", 4096)
        assert self.ask(SET_LOG_BASE, struct.pack("=QQ", 4096, 0), [self.log]) == bytes(8)
        return self.log

    def features(self, features: int) -> None:
        self.tell_u64(SET_FEATURES, features)

    def keep_inflight(self, queues: int, entries: int) -> None:
        self.send(GET_INFLIGHT, struct.pack("=QQHH4x", 0, 0, queues, entries))
        payload, [fd] = self.reply(GET_INFLIGHT)
        self.inflight = fd
        self.tell(SET_INFLIGHT, payload, [fd])

    def close(self) -> None:
        self.socket.close()
        for fd in [*self.kicks, *self.calls, *(fd for fd in (self.log, self.inflight) if fd is not None)]:
            os.close(fd)


class Bench:
    """A device on an image, a front end that has negotiated, and guest memory."""

    def __init__(self, directory: Path, *, queues: int = 1, threads: bool = True, **options: str) -> None:
        self.image = directory / "disk.img"
        if not self.image.exists():
            self.image.write_bytes(bytes(MIB))
        self.path = str(directory / "vhost.sock")
        self.memory = make_memory()
        self.threads, self.count, self.options = threads, queues, options
        self.device = self.make_device()
        self.front = FrontEnd(self.path, self.memory)
        self.front.realize(queues)

    def make_device(self) -> VhostUserBlk:
        words = {"image": str(self.image), "vhost_user": self.path, "queues": str(self.count)}
        device = VhostUserBlk("disk0", words | self.options)
        if not self.threads:
            for runner in device.runners:
                runner._thread = threading.current_thread()
        with device.lock:
            device.start(0)
            device.leave_p2p()
        return device

    def run(self, *, size: int = 8, features: int = ACCEPTED) -> list[DiskQueue]:
        self.front.features(features | PROTOCOL)
        self.front.table()
        queues = []
        for number in range(self.count):
            base = 0x10000 + 0x80000 * number
            ring = Ring(self.front.guest, base, size, event_idx=bool(features & EVENT_IDX))
            queues.append(DiskQueue(ring, base + 0x10000))
            self.front.start(number, ring)
        return queues

    def kick(self, number: int = 0) -> None:
        os.eventfd_write(self.front.kicks[number], 1)

    def close(self) -> None:
        self.front.close()
        self.close_device()
        self.memory.close()

    def close_device(self) -> None:
        self.device.close()
        assert self.device.server.ended(5.0)


def answered(bench: Bench, queue: DiskQueue, count: int = 1, seconds: float = 10.0) -> list[Answer]:
    """So many answers, waited for as a driver does."""
    found: list[Answer] = []
    deadline = time.monotonic() + seconds
    while len(found) < count:
        found += queue.answers()
        assert time.monotonic() < deadline, f"{len(found)} of {count} answers"
        time.sleep(0.001)
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
