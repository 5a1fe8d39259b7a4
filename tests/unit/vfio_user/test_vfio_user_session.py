"""What a server answers to one client."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vfio_user_backend import POISON, MemoryBackend, command

from devices.protocols.vfio_user import messages as m
from devices.protocols.vfio_user import version as v
from devices.protocols.vfio_user.messages import Command
from devices.protocols.vfio_user.session import Session


class Talk:
    """A session and its backend; `ask` gives the payload of a reply, or the errno of an error reply."""

    def __init__(self, *, negotiated: bool = True) -> None:
        self.backend = MemoryBackend()
        self.session = Session(self.backend)
        if negotiated:
            self.ask(Command.VERSION, v.Version(0, 1).encode())

    def ask(self, number: int, payload: bytes = b"", fds: list[int] | None = None) -> bytes | int:
        reply = self.session.handle(command(number, payload, fds=fds))
        assert reply is not None
        header = m.Header._make(m.HEADER.unpack_from(reply))
        assert (header.id, header.command, header.size) == (7, number, len(reply))
        if header.flags & m.ERROR:
            assert len(reply) == m.HEADER_SIZE
            return header.error
        assert header.flags == m.REPLY
        return reply[m.HEADER_SIZE :]


@pytest.fixture
def talk() -> Iterator[Talk]:
    talk = Talk()
    yield talk
    talk.session.close()


def test_the_version_in_common_is_answered_and_what_the_client_can_take_is_kept() -> None:
    for proposed, agreed in ((0, 0), (1, 1), (7, 1)):
        talk = Talk(negotiated=False)
        reply = talk.ask(Command.VERSION, v.Version(0, proposed, v.Capabilities(max_msg_fds=3)).encode())
        assert isinstance(reply, bytes)
        assert v.Version.decode(reply) == v.Version(0, agreed, v.OURS._replace(write_multiple=False))
        assert talk.session.client == v.Capabilities(max_msg_fds=3)


@pytest.mark.parametrize(
    ("number", "payload"),
    [
        (Command.DEVICE_GET_INFO, m.DeviceInfo().encode()),
        (Command.VERSION, v.Version(1, 0).encode()),
        (Command.VERSION, b"\0"),
    ],
)
def test_a_client_that_cannot_negotiate_is_answered_einval_and_let_go(number: int, payload: bytes) -> None:
    talk = Talk(negotiated=False)
    assert talk.ask(number, payload) == errno.EINVAL
    assert talk.session.over


def test_a_refused_command_does_not_end_a_session(talk: Talk) -> None:
    assert talk.ask(Command.DEVICE_RESET, b"x") == errno.EINVAL
    assert not talk.session.over


@pytest.mark.parametrize("number", [0, 1, 11, 12, 14, 15, 99])
def test_a_command_that_is_not_served_here_is_answered_enotsup(talk: Talk, number: int) -> None:
    assert talk.ask(number) == errno.ENOTSUP


def test_a_command_without_reply_gets_none_not_even_an_error(talk: Talk) -> None:
    write = m.ACCESS.pack(4, 0, 2) + b"ab"
    assert talk.session.handle(command(Command.REGION_WRITE, write, flags=m.NO_REPLY)) is None
    assert talk.backend.bytes[0][4:6] == b"ab"
    assert talk.session.handle(command(99, flags=m.NO_REPLY)) is None


def test_a_reply_in_place_of_a_command_is_refused(talk: Talk) -> None:
    reply = talk.session.handle(command(Command.DEVICE_RESET, flags=m.REPLY))
    assert reply == m.error_reply(7, Command.DEVICE_RESET, errno.EINVAL)
    assert talk.backend.resets == 0


def test_the_device_is_described(talk: Talk) -> None:
    info = talk.ask(Command.DEVICE_GET_INFO, m.DeviceInfo().encode())
    assert m.DeviceInfo.decode(info) == m.DeviceInfo(m.DeviceFlags.RESET, 3, 3)  # type: ignore[arg-type]
    for index, flags, size in ((0, 3, 4096), (1, 1, 16), (2, 2, 16)):
        region = talk.ask(Command.DEVICE_GET_REGION_INFO, m.RegionInfo(index).encode())
        assert m.RegionInfo.decode(region) == m.RegionInfo(index, flags, 0, size, 0)  # type: ignore[arg-type]
    for index, flags, count in ((0, m.IrqFlags.EVENTFD, 1), (1, 0, 0), (2, m.IrqFlags.EVENTFD, 3)):
        irq = talk.ask(Command.DEVICE_GET_IRQ_INFO, m.IrqInfo(index).encode())
        assert m.IrqInfo.decode(irq) == m.IrqInfo(index, flags, count)  # type: ignore[arg-type]
    assert talk.ask(Command.DEVICE_GET_REGION_INFO, m.RegionInfo(3).encode()) == errno.EINVAL
    assert talk.ask(Command.DEVICE_GET_IRQ_INFO, m.IrqInfo(3).encode()) == errno.EINVAL
    talk.backend.pci = True
    info = talk.ask(Command.DEVICE_GET_INFO, m.DeviceInfo().encode())
    assert m.DeviceInfo.decode(info).flags == m.DeviceFlags.RESET | m.DeviceFlags.PCI  # type: ignore[arg-type]


def test_a_region_keeps_what_is_written(talk: Talk) -> None:
    written = talk.ask(Command.REGION_WRITE, m.ACCESS.pack(4090, 0, 6) + b"abcdef")
    assert written == m.ACCESS.pack(4090, 0, 6)
    assert talk.ask(Command.REGION_READ, m.ACCESS.pack(4092, 0, 4)) == m.ACCESS.pack(4092, 0, 4) + b"cdef"
    assert talk.ask(Command.REGION_READ, m.ACCESS.pack(4096, 0, 0)) == m.ACCESS.pack(4096, 0, 0)


@pytest.mark.parametrize(
    ("offset", "region", "count"),
    [
        (4096, 0, 1),
        (4093, 0, 4),
        (2**64 - 1, 0, 2),
        (0, 3, 1),
        (0, 2**32 - 1, 1),
        (0, 0, m.MAX_DATA + 1),
        (0, 2, 1),
    ],
)
def test_a_read_outside_of_what_may_be_read_is_refused(
    talk: Talk, offset: int, region: int, count: int
) -> None:
    assert talk.ask(Command.REGION_READ, m.ACCESS.pack(offset, region, count)) == errno.EINVAL


def test_a_write_to_what_may_only_be_read_is_refused(talk: Talk) -> None:
    assert talk.ask(Command.REGION_WRITE, m.ACCESS.pack(0, 1, 1) + b"x") == errno.EINVAL
    assert talk.backend.bytes[1] == bytes(16)


def test_the_devices_refusal_and_its_own_faults_are_told_apart(talk: Talk) -> None:
    assert talk.ask(Command.REGION_READ, m.ACCESS.pack(POISON, 0, 1)) == errno.EIO
    talk.backend.refuse = errno.EBUSY
    assert talk.ask(Command.REGION_READ, m.ACCESS.pack(0, 0, 1)) == errno.EBUSY


def test_dma_windows_are_mapped_once_and_unmapped_exactly(talk: Talk) -> None:
    def window(address: int, size: int) -> bytes | int:
        return talk.ask(Command.DMA_MAP, m.DmaMap(3, 0, address, size).encode(), [os.memfd_create("x")])

    assert window(0x10000, 0x4000) == b""
    for address, size in ((0x10000, 0x4000), (0xF000, 0x2000), (0x13000, 0x1000), (0, 0x100000)):
        assert window(address, size) == errno.EEXIST
    assert window(0xF000, 0x1000) == window(0x14000, 0x1000) == b""
    for address, size in ((0x10000, 0x1000), (0x11000, 0x3000), (0x20000, 0x1000)):
        assert talk.ask(Command.DMA_UNMAP, m.DmaUnmap(0, address, size).encode()) == errno.ENOENT
    unmap = m.DmaUnmap(0, 0x10000, 0x4000).encode()
    assert talk.ask(Command.DMA_UNMAP, unmap) == unmap
    assert talk.backend.windows == {0xF000: 0x1000, 0x14000: 0x1000}
    talk.ask(Command.DMA_UNMAP, m.DmaUnmap(m.UNMAP_ALL, 0, 0).encode())
    assert talk.backend.windows == {}


def test_a_window_that_the_device_refuses_is_not_remembered(talk: Talk) -> None:
    talk.backend.refuse = errno.EINVAL
    payload = m.DmaMap(3, 0, 0, 4096).encode()
    assert talk.ask(Command.DMA_MAP, payload, [os.memfd_create("x")]) == errno.EINVAL
    talk.backend.refuse = 0
    assert talk.ask(Command.DMA_MAP, payload, [os.memfd_create("x")]) == b""


def test_a_window_without_a_descriptor_and_one_too_many_are_refused(talk: Talk) -> None:
    assert talk.ask(Command.DMA_MAP, m.DmaMap(3, 0, 0, 4096).encode()) == errno.ENOTSUP
    for number in range(m.MAX_DMA_MAPS):
        talk.backend.windows[number * 4096] = 4096
        talk.session._windows[number * 4096] = 4096
    last = m.DmaMap(3, 0, m.MAX_DMA_MAPS * 4096, 4096).encode()
    assert talk.ask(Command.DMA_MAP, last, [os.memfd_create("x")]) == errno.ENOSPC


def test_an_interrupt_can_be_connected_raised_and_disconnected(talk: Talk) -> None:
    def set_irqs(flags: int, count: int = 1, data: bytes = b"", fds: list[int] | None = None) -> bytes | int:
        return talk.ask(Command.DEVICE_SET_IRQS, m.IrqSet(flags, 0, 0, count, data).encode(), fds)

    none, boolean, eventfd, trigger = 1, 2, 4, 32
    assert set_irqs(eventfd | trigger, fds=[os.eventfd(0)]) == b""
    assert list(talk.backend.eventfds) == [(0, 0)]
    assert set_irqs(none | trigger) == set_irqs(boolean | trigger, data=b"\1") == b""
    assert talk.backend.triggered == [(0, 0)] * 2
    assert set_irqs(boolean | trigger, data=b"\0") == b""
    assert talk.backend.triggered == [(0, 0)] * 2
    assert set_irqs(none | trigger, count=0) == b""
    assert not talk.backend.eventfds
    assert set_irqs(none | trigger, count=2) == errno.EINVAL
    assert set_irqs(none | 8) == errno.EINVAL  # MASK
    assert set_irqs(eventfd | trigger, fds=[os.eventfd(0), os.eventfd(0)]) == errno.EINVAL
    other = m.IrqSet(none | trigger, 1, 0, 1).encode()
    assert talk.ask(Command.DEVICE_SET_IRQS, other) == errno.EINVAL


def test_interrupts_of_one_index_are_named_by_range_and_each_has_an_eventfd_of_its_own(talk: Talk) -> None:
    def set_irqs(
        flags: int, start: int, count: int, data: bytes = b"", fds: list[int] | None = None, index: int = 2
    ) -> bytes | int:
        return talk.ask(Command.DEVICE_SET_IRQS, m.IrqSet(flags, index, start, count, data).encode(), fds)

    none, boolean, eventfd, trigger = 1, 2, 4, 32
    given = [os.eventfd(0) for _ in range(3)]
    assert set_irqs(eventfd | trigger, 1, 2, fds=given[:2]) == b""
    assert set_irqs(eventfd | trigger, 0, 1, fds=given[2:]) == b""
    assert talk.backend.eventfds == {(2, 1): given[0], (2, 2): given[1], (2, 0): given[2]}
    assert set_irqs(boolean | trigger, 0, 3, b"\1\0\1") == set_irqs(none | trigger, 1, 2) == b""
    assert talk.backend.triggered == [(2, 0), (2, 2), (2, 1), (2, 2)]
    assert set_irqs(eventfd | trigger, 1, 1) == b""
    assert sorted(talk.backend.eventfds) == [(2, 0), (2, 2)]
    assert set_irqs(eventfd | trigger, 0, 3, fds=[os.eventfd(0)]) == errno.EINVAL
    for start, count, index in ((3, 1, 2), (1, 3, 2), (0, 1, 1)):
        assert set_irqs(none | trigger, start, count, index=index) == errno.EINVAL
    assert set_irqs(none | trigger, 0, 0) == b""
    assert not talk.backend.eventfds


def test_a_client_that_goes_leaves_no_window_and_no_eventfd_but_the_devices_state() -> None:
    talk = Talk()
    talk.ask(Command.DMA_MAP, m.DmaMap(3, 0, 0, 4096).encode(), [os.memfd_create("x")])
    talk.ask(Command.DEVICE_SET_IRQS, m.IrqSet(4 | 32, 0, 0, 1).encode(), [os.eventfd(0)])
    talk.ask(Command.REGION_WRITE, m.ACCESS.pack(0, 0, 1) + b"x")
    talk.session.close()
    assert talk.backend.windows == {}
    assert not talk.backend.eventfds
    assert talk.backend.bytes[0][0] == ord("x")
    assert talk.backend.resets == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 20) | st.integers(0, 65535),
            st.binary(max_size=48),
            st.integers(0, 3),
            st.sampled_from([0, 0, 0, m.NO_REPLY, m.REPLY, m.ERROR]),
        ),
        max_size=12,
    )
)
def test_whatever_a_client_sends_the_session_answers_and_leaks_nothing(
    sent: list[tuple[int, bytes, int, int]],
) -> None:
    talk = Talk()
    for number, payload, count, flags in sent:
        fds = [os.memfd_create("x") for _ in range(count)]
        reply = talk.session.handle(command(number, payload, flags=flags, fds=list(fds)))
        assert (reply is None) == bool(flags & m.NO_REPLY)
    talk.session.close()
