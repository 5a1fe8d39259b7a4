"""Messages and their descriptors through a real socket, however the reads fall."""

from __future__ import annotations

import array
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.protocols.channel import receive
from devices.protocols.vfio_user.framing import Assembler, FramingError
from devices.protocols.vfio_user.messages import HEADER, HEADER_SIZE, MAX_FDS, MAX_MESSAGE, message


def send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert sock.sendmsg([data], rights) == len(data)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 3)), min_size=1, max_size=8),
    st.lists(st.integers(1, 1500), min_size=1, max_size=5),
)
def test_pipelined_messages_come_out_one_by_one_each_with_its_own_descriptors(
    sent: list[tuple[int, int]], reads: list[int]
) -> None:
    ours, theirs = socket.socketpair()
    assembler, received, inodes = Assembler(), [], []
    with ours, theirs:
        for number, (size, count) in enumerate(sent):
            fds = [os.memfd_create("x") for _ in range(count)]
            inodes.append([os.fstat(fd).st_ino for fd in fds])
            send(ours, message(number, 9, bytes([number]) * size), fds)
            for fd in fds:
                os.close(fd)
        ours.shutdown(socket.SHUT_WR)
        turn = 0
        while (read := receive(theirs, reads[turn % len(reads)]))[0]:
            turn += 1
            assembler.feed(*read)
            while (one := assembler.next()) is not None:
                received.append((one.header.id, bytes(one.payload), [os.fstat(fd).st_ino for fd in one.fds]))
                one.close()
    assembler.close()
    assert received == [(n, bytes([n]) * size, inodes[n]) for n, (size, _) in enumerate(sent)]


@pytest.mark.parametrize("size", [0, HEADER_SIZE - 1, MAX_MESSAGE + 1, 2**32 - 1])
def test_an_impossible_size_is_found_in_the_header_before_anything_is_allocated(size: int) -> None:
    assembler = Assembler()
    assembler.feed(HEADER.pack(1, 9, size, 0, 0), [])
    with pytest.raises(FramingError, match=str(size)):
        assembler.next()


def test_descriptors_of_a_message_that_never_ends_are_closed() -> None:
    assembler = Assembler()
    assembler.feed(HEADER.pack(1, 9, 100, 0, 0), [os.memfd_create("x")])
    assert assembler.next() is None
    assembler.close()  # the fixture counts


def test_a_message_with_too_many_descriptors_is_marked_and_keeps_none_and_the_next_one_is_well() -> None:
    ours, theirs = socket.socketpair()
    assembler = Assembler()
    with ours, theirs:
        for count in (MAX_FDS + 1, MAX_FDS + 20, 1):
            fds = [os.memfd_create("x") for _ in range(count)]
            send(ours, message(count, 9), fds)
            for fd in fds:
                os.close(fd)
        seen = []
        while len(seen) < 3:
            assembler.feed(*receive(theirs))
            while (one := assembler.next()) is not None:
                seen.append((one.header.id, one.too_many_fds, len(one.fds)))
                one.close()
    assert seen == [(MAX_FDS + 1, True, 0), (MAX_FDS + 20, True, 0), (1, False, 1)]


def test_received_descriptors_are_not_inheritable() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = os.memfd_create("x", 0)
        send(ours, b"x", [fd])
        _, (received,), _ = receive(theirs)
        assert not os.get_inheritable(received)
        os.close(fd)
        os.close(received)
