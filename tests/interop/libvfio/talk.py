"""Plays a scene to a server's socket, and writes down what was answered."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterable
from typing import Final

from tests.interop.libvfio.script import PAGE, Step

_HEADER: Final = struct.Struct("=HHIII")
_VERSION: Final = 1
_NO_REPLY: Final = 0x10
_TYPE: Final = 0xF
_ERROR: Final = 0x20
#: s in which no reply came: there is none.
PATIENCE: Final = 1.0

Answer = dict[str, int | str]
CLOSED: Final = "the connection is closed"
SILENT: Final = "no answer"


def _descriptors(kinds: str) -> list[int]:
    fds = []
    for kind in kinds:
        match kind:
            case "m" | "u":
                fd = os.memfd_create("dma", os.MFD_ALLOW_SEALING)
                os.truncate(fd, 16 * PAGE)
                if kind == "m":
                    fcntl.fcntl(
                        fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
                    )
                fds.append(fd)
            case "e":
                fds.append(os.eventfd(0))
            case _:
                reading, writing = os.pipe()
                os.close(writing)
                fds.append(reading)
    return fds


def play(path: str, steps: Iterable[Step]) -> list[Answer]:
    """One answer a step: its errno, bytes of payload, and where it matters their content; or that there was none."""
    answers: list[Answer] = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        _connect(connection, path)
        for number, step in enumerate(steps):
            answers.append(_ask(connection, number, step))
            if answers[-1].get("no answer") == CLOSED:
                break
    return answers


def _connect(connection: socket.socket, path: str) -> None:
    """The socket's file is there a moment before somebody listens."""
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return connection.connect(path)
        time.sleep(0.02)
    raise TimeoutError(f"nobody listens at {path}")


def _ask(connection: socket.socket, number: int, step: Step) -> Answer:
    size = _HEADER.size + len(step.payload) if step.size < 0 else step.size
    data = _HEADER.pack(number, step.command, size, step.flags, 0) + step.payload
    fds = _descriptors(step.fds)
    try:
        socket.send_fds(connection, [data], fds) if fds else connection.sendall(data)
        if step.flags & _NO_REPLY:
            return {"no answer": SILENT}
        return _answer(connection, number, step)
    except TimeoutError:
        return {"no answer": SILENT}
    except (BrokenPipeError, ConnectionResetError, EOFError):
        return {"no answer": CLOSED}
    finally:
        for fd in fds:
            os.close(fd)


def _answer(connection: socket.socket, number: int, step: Step) -> Answer:
    head = _exactly(connection, _HEADER.size)
    identity, command, size, flags, error = _HEADER.unpack(head)
    payload = _exactly(connection, size - _HEADER.size)
    assert flags & _TYPE == 1
    answer: Answer = {"errno": error if flags & _ERROR else 0}
    if (identity, command) != (number, step.command):
        answer["to"] = command
    if not answer["errno"] and step.command != _VERSION:  # the length of a JSON text says nothing
        answer["size"] = len(payload)
        if step.data:
            answer["data"] = payload.hex()
    return answer


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        got, fds, _, _ = socket.recv_fds(connection, size - len(data), 8)
        for fd in fds:
            os.close(fd)
        if not got:
            raise EOFError
        data += got
    return data
