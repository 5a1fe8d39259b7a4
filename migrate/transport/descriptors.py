"""Descriptors that come with a message over a Unix socket. They are close-on-exec from the moment they exist."""

from __future__ import annotations

import array
import socket

_INT = array.array("i").itemsize


def receive_fds(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
    """One message with its descriptors, close-on-exec, and recvmsg's flags. (socket.recv_fds ignores the flags it is given.)"""
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_LEN(most * _INT), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // _INT * _INT])
    return data, list(fds), flags
