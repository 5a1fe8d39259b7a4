"""Reading from a VMM's socket: bytes with the descriptors that came along. Used by servers and clients of every protocol here."""

from __future__ import annotations

import array
import os
import socket
import struct

from migrate.errors import Phase, UsageError

#: Most descriptors in one message that any of our protocols accepts.
MAX_FDS = 8
_INT = array.array("i").itemsize
#: Room for one descriptor more than a message may have, so that too many are seen.
_ANCILLARY = socket.CMSG_SPACE((MAX_FDS + 1) * _INT)
#: One read takes a header and any small payload; larger ones take more reads.
READ_SIZE = 4096
#: While a large payload is awaited.
READ_LARGE = 256 << 10
#: A Unix socket's path holds at most this many bytes (sun_path is 108 with its NUL).
MAX_PATH = 107
_UCRED = struct.Struct("=iII")


def receive(connection: socket.socket, size: int = READ_SIZE) -> tuple[bytes, list[int], bool]:
    """One read: bytes (none at the end), descriptors (not inheritable, the caller's), whether the kernel dropped some."""
    data, ancillary, flags, _ = connection.recvmsg(size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    if not ancillary:
        return data, [], bool(flags & socket.MSG_CTRUNC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _INT])
    return data, list(fds), bool(flags & socket.MSG_CTRUNC)


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end, by the kernel's word."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(credentials)[1]
    return uid


def check_path(path: str) -> str:
    """:raise UsageError: no Unix socket can have this path."""
    if not 0 < len(os.fsencode(path)) <= MAX_PATH:
        raise UsageError(
            f"the socket path {path!r} is {len(os.fsencode(path))} bytes long",
            remedy=f"a Unix socket's path has at most {MAX_PATH} bytes: use a shorter directory",
            phase=Phase.SETUP,
        )
    return path
