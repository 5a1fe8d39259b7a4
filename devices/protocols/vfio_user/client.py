"""A VMM's side of vfio-user: blocking calls, each with a deadline. Used by the vCPU process and by tests.

A call is one message and one reply: nothing is pipelined, so a guest's accesses keep their order. After a missed deadline
or a broken connection the client is of no use any more (a late reply could be taken for the next one): make a new one.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import NoReturn, Self

from devices.protocols.channel import READ_LARGE, READ_SIZE, check_path, receive
from devices.protocols.vfio_user.framing import Assembler, Message
from devices.protocols.vfio_user.messages import (
    ACCESS,
    ERROR,
    HEADER,
    HEADER_SIZE,
    REPLY,
    TYPE_MASK,
    UNMAP_ALL,
    Buffer,
    Command,
    DeviceInfo,
    DmaFlags,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    IrqSet,
    RegionInfo,
    SetIrqs,
    decode_data,
)
from devices.protocols.vfio_user.version import MAJOR, MINOR, OURS, Capabilities, Version
from migrate.errors import DeviceGone, DeviceRefused, DeviceTimeout, FerryError, Phase

#: Seconds for one call. A device answers in microseconds; while it is being saved, in milliseconds.
TIMEOUT = 5.0
_RETRY = 0.01
_TIMEVAL = struct.Struct("@ll")


class RequestRefused(DeviceRefused):
    """The device answered with an error; `errno` is its number (EBUSY: it is stopped)."""

    code = "VfioUserRefused"
    errno = 0


def _refusal(number: int, command: int, device: str) -> RequestRefused:
    error = RequestRefused(
        f"vfio-user {Command(command).name}: {os.strerror(number)} ({errno.errorcode.get(number, number)})",
        remedy="it is stopped: let it run first"
        if number == errno.EBUSY
        else "see the log of the device's process",
        phase=Phase.RUNNING,
        device=device,
    )
    error.errno = number
    return error


class Client:
    """One connection to one device. Calls may come from several threads; they take turns."""

    def __init__(self, connection: socket.socket, device: str, timeout: float) -> None:
        """Use `connect`."""
        self.device = device
        self.timeout = timeout
        self._socket = connection
        self._assembler = Assembler()
        self._lock = threading.Lock()
        self._id = 0
        self._dead: str | None = None
        self._shortened = False
        #: What the server can take.
        self.server = Capabilities()
        self._set_timeout(timeout)

    @classmethod
    def connect(cls, path: str, *, device: str = "", timeout: float = TIMEOUT) -> Self:
        """Connect to the device's socket and negotiate. Waits for the socket to appear, `timeout` seconds at most.

        :param device: the Id that errors name; by default the path.
        :param timeout: also the deadline of every call that follows.
        :raise DeviceGone: nobody serves there; DeviceTimeout: nobody answers (another client may be connected);
            DeviceRefused: the device speaks another version.
        """
        device = device or path
        deadline = time.monotonic() + timeout
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            while True:
                try:
                    connection.connect(check_path(path))
                    break
                except OSError as error:
                    if time.monotonic() >= deadline:
                        raise DeviceGone(
                            f"nobody serves vfio-user at {path}: {error.strerror}",
                            remedy="is the device's process running?",
                            phase=Phase.SETUP,
                            device=device,
                        ) from error
                time.sleep(_RETRY)
            client = cls(connection, device, timeout)
            client._negotiate()
        except BaseException:
            connection.close()
            raise
        return client

    def close(self) -> None:
        self._dead = self._dead or "this side has closed the connection"
        self._assembler.close()
        with contextlib.suppress(OSError):
            # Wakes a call that another thread is waiting in.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- calls ----------------------------------------------------------------------------------------------------------

    def info(self) -> DeviceInfo:
        """What the device has: numbers of regions and interrupts. Flags as DeviceFlags."""
        return DeviceInfo.decode(self._call(Command.DEVICE_GET_INFO, DeviceInfo().encode()))

    def region_info(self, index: int) -> RegionInfo:
        """Size in bytes and RegionFlags of one region."""
        return RegionInfo.decode(self._call(Command.DEVICE_GET_REGION_INFO, RegionInfo(index).encode()))

    def irq_info(self, index: int) -> IrqInfo:
        return IrqInfo.decode(self._call(Command.DEVICE_GET_IRQ_INFO, IrqInfo(index).encode()))

    def dma_map(self, address: int, size: int, fd: int, offset: int = 0, *, writable: bool = True) -> None:
        """Let the device reach `size` bytes of `fd` from `offset` on at guest physical `address`. `fd` stays the caller's."""
        flags = DmaFlags.READ | DmaFlags.WRITE if writable else DmaFlags.READ
        self._call(Command.DMA_MAP, DmaMap(flags, offset, address, size).encode(), (fd,))

    def dma_unmap(self, address: int, size: int) -> None:
        """Take back a window, named exactly as it was given. The device holds no reference when this returns."""
        self._call(Command.DMA_UNMAP, DmaUnmap(0, address, size).encode())

    def dma_unmap_all(self) -> None:
        self._call(Command.DMA_UNMAP, DmaUnmap(UNMAP_ALL, 0, 0).encode())

    def region_read(self, region: int, offset: int, size: int) -> int:
        """A load of `size` bytes, little-endian."""
        return int.from_bytes(self.read_bytes(region, offset, size), "little")

    def region_write(self, region: int, offset: int, size: int, value: int) -> None:
        """A store of `size` bytes, little-endian; returns when the device has seen it."""
        self.write_bytes(region, offset, value.to_bytes(size, "little"))

    def read_bytes(self, region: int, offset: int, size: int) -> bytes:
        reply = self._call(Command.REGION_READ, ACCESS.pack(offset, region, size))
        data = decode_data(reply)[2]
        if len(data) != size:
            self._fail(f"a read of {size} bytes was answered with {len(data)}")
        return data

    def write_bytes(self, region: int, offset: int, data: Buffer) -> None:
        self._call(Command.REGION_WRITE, ACCESS.pack(offset, region, len(data)) + data)

    def set_irq_eventfd(self, index: int, eventfd: int | None, number: int = 0) -> None:
        """Have interrupt `number` of an index signalled through an eventfd (which stays the caller's), or with None no more."""
        irqs = IrqSet(SetIrqs.DATA_EVENTFD | SetIrqs.TRIGGER, index, number, 1)
        self._call(Command.DEVICE_SET_IRQS, irqs.encode(), () if eventfd is None else (eventfd,))

    def trigger_irq(self, index: int, number: int = 0) -> None:
        """Have the device raise an interrupt: a test of the way back."""
        irqs = IrqSet(SetIrqs.DATA_NONE | SetIrqs.TRIGGER, index, number, 1)
        self._call(Command.DEVICE_SET_IRQS, irqs.encode())

    def reset(self) -> None:
        self._call(Command.DEVICE_RESET)

    # -- one call ---------------------------------------------------------------------------------------------------------

    def _negotiate(self) -> None:
        reply = Version.decode(self._call(Command.VERSION, Version(MAJOR, MINOR, OURS).encode()))
        if reply.major != MAJOR or reply.minor > MINOR:
            self._fail(f"the device answered version {reply.major}.{reply.minor} to our {MAJOR}.{MINOR}")
        self.server = reply.capabilities

    def _call(self, command: Command, payload: Buffer = b"", fds: Sequence[int] = ()) -> memoryview:
        """The payload of the reply.

        :raise RequestRefused: the device said no. DeviceTimeout, DeviceGone, DeviceRefused (it broke the protocol): the
            connection is of no use any more.
        """
        with self._lock:
            if self._dead is not None:
                raise self._gone(self._dead)
            if self._shortened:
                self._set_timeout(self.timeout)
                self._shortened = False
            deadline = time.monotonic() + self.timeout
            self._id = number = (self._id + 1) & 0xFFFF
            try:
                self._send(
                    HEADER.pack(number, command, HEADER_SIZE + len(payload), 0, 0) + payload, fds, deadline
                )
                reply = self._receive(deadline)
            except BlockingIOError:
                self._end("a deadline was missed")
                raise DeviceTimeout(
                    f"no answer to vfio-user {command.name} within {self.timeout:g} s",
                    remedy="the device hangs, or another client is connected to it",
                    phase=Phase.RUNNING,
                    device=self.device,
                ) from None
            except OSError as error:
                self._end(f"the connection broke: {error.strerror}")
                raise self._gone(self._dead) from error
            except FerryError as error:
                self._fail(error.reason)
            reply.close()
            header = reply.header
            if header.id != number or header.command != command or header.flags & TYPE_MASK != REPLY:
                self._fail(f"the answer to {command.name} (message {number}) is something else: {header}")
            if header.flags & ERROR:
                raise _refusal(header.error, command, self.device)
            return reply.payload

    def _send(self, data: bytes, fds: Sequence[int], deadline: float) -> None:
        if fds:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            sent = self._socket.sendmsg((data,), (rights,))
        else:
            sent = self._socket.send(data)
        while sent < len(data):
            self._shorten(deadline)
            sent += self._socket.send(memoryview(data)[sent:])

    def _receive(self, deadline: float) -> Message:
        data, fds, truncated = receive(self._socket)
        while True:
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the device closed the connection")
            self._assembler.feed(data, fds, truncated)
            message = self._assembler.next()
            if message is not None:
                return message
            self._shorten(deadline)
            size = READ_SIZE if self._assembler.missing <= READ_SIZE else READ_LARGE
            data, fds, truncated = receive(self._socket, size)

    def _set_timeout(self, seconds: float) -> None:
        # The kernel's own timeouts: Python's settimeout() would add a poll() to every call. A timeout of 0 would be none.
        value = _TIMEVAL.pack(int(seconds), max(int(seconds % 1 * 1e6), 1))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)

    def _shorten(self, deadline: float) -> None:
        """For a message in pieces only the rest of the call's time is left."""
        rest = deadline - time.monotonic()
        if rest <= 0:
            raise BlockingIOError
        self._set_timeout(rest)
        self._shortened = True

    def _end(self, why: str) -> None:
        self._dead = why
        self._assembler.close()
        self._socket.close()

    def _fail(self, why: str) -> NoReturn:
        """The device broke the protocol."""
        self._end(f"the device broke the protocol: {why}")
        raise DeviceRefused(
            why,
            remedy="the device's process has a fault: see its log",
            device=self.device,
            phase=Phase.RUNNING,
        )

    def _gone(self, why: str | None) -> DeviceGone:
        return DeviceGone(
            f"vfio-user: {why}",
            remedy="is the device's process running?",
            device=self.device,
            phase=Phase.RUNNING,
        )
