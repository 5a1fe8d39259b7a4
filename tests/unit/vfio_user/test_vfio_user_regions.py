"""What a client may use of a region in place of access, many writes at once, and interrupts that are masked."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vfio_user_talk import EVERYTHING, Talk

from devices.protocols.vfio_user import messages as m
from devices.protocols.vfio_user import region_messages as r
from devices.protocols.vfio_user import version as v
from devices.protocols.vfio_user.framing import close_all
from devices.protocols.vfio_user.messages import Command, RequestError


@pytest.fixture
def talk() -> Iterator[Talk]:
    talk = Talk()
    yield talk
    talk.session.close()


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("x")
    yield made
    os.close(made)


def region(talk: Talk, index: int, room: int = r.REGION_INFO_ROOM) -> bytes | int:
    return talk.ask(Command.DEVICE_GET_REGION_INFO, m.RegionInfo(index).encode(argsz=room))


def same_file(a: int, b: int) -> bool:
    return os.fstat(a).st_ino == os.fstat(b).st_ino


def test_a_region_that_can_be_mapped_in_part_says_which_and_comes_with_a_descriptor(
    talk: Talk, fd: int
) -> None:
    areas = ((0, 4096), (8192, 4096))
    talk.backend.mappable[0] = r.RegionMemory(fd, 0x10000, areas)
    talk.backend.regions = (type(talk.backend.regions[0])(16384), *talk.backend.regions[1:])
    reply = region(talk, 0)
    assert isinstance(reply, bytes)
    # <linux/vfio.h>: the info, then a capability (id 1, version 1, no next), the number of areas, the areas.
    assert reply == struct.pack("=IIIIQQ", 80, 3 | 4 | 8, 0, 32, 16384, 0x10000) + struct.pack(
        "=HHIIIQQQQ", 1, 1, 0, 2, 0, 0, 4096, 8192, 4096
    )
    (taken,) = talk.taken()
    assert same_file(taken, fd)
    assert taken != fd
    os.close(taken)
    info, found = r.decode_region(reply)
    assert (info.flags, info.size, info.offset, found) == (15, 16384, 0x10000, areas)


def test_a_client_without_room_is_told_how_much_and_gets_the_descriptor_once(talk: Talk, fd: int) -> None:
    talk.backend.mappable[0] = r.RegionMemory(fd, 0, ((0, 4096),))
    short = region(talk, 0, 32)
    assert short == struct.pack("=IIIIQQ", 64, 3 | 4, 0, 0, 4096, 0)
    assert talk.taken() == []
    assert len(region(talk, 0, 64)) == 64  # type: ignore[arg-type]
    close_all(taken := talk.taken())
    assert region(talk, 0, 31) == errno.EINVAL
    assert taken == []


def test_a_region_that_can_be_mapped_whole_has_no_capability(talk: Talk, fd: int) -> None:
    talk.backend.mappable[0] = r.RegionMemory(fd)
    assert region(talk, 0) == struct.pack("=IIIIQQ", 32, 3 | 4, 0, 0, 4096, 0)
    close_all(talk.taken())
    assert region(talk, 1) == struct.pack("=IIIIQQ", 32, 1, 1, 0, 16, 0)
    assert talk.taken() == []


@given(st.binary(min_size=32, max_size=120), st.integers(0, 40))
def test_a_region_info_of_any_shape_is_read_or_refused(data: bytes, cap_offset: int) -> None:
    head = struct.pack("=IIIIQQ", len(data), m.RegionFlags.CAPS, 0, cap_offset, 1 << 20, 0)
    for payload in (data, head + data):
        try:
            r.decode_region(memoryview(payload))
        except RequestError as error:
            assert error.errno == errno.EINVAL


def test_a_chain_of_capabilities_that_goes_in_a_circle_is_refused() -> None:
    head = struct.pack("=IIIIQQ", 48, m.RegionFlags.CAPS, 0, 32, 4096, 0)
    with pytest.raises(RequestError, match="capability at 32"):
        r.decode_region(head + struct.pack("=HHI", 9, 1, 32) + bytes(8))


def test_an_area_outside_of_its_region_is_refused() -> None:
    head = struct.pack("=IIIIQQ", 64, m.RegionFlags.CAPS, 0, 32, 4096, 0)
    for area in ((0, 8192), (4096, 4096), (1, 4095), (2**64 - 4096, 4096)):
        with pytest.raises(RequestError, match="an area"):
            r.decode_region(head + struct.pack("=HHIIIQQ", 1, 1, 0, 1, 0, *area))


# -- descriptors that replace writes --------------------------------------------------------------------------------------


def test_descriptors_of_a_region_are_sent_once_each_and_read_in_both_layouts(talk: Talk) -> None:
    first, second = os.eventfd(0), os.eventfd(0)
    doorbells = [
        r.IoEventfd(first, 0, 4),
        r.IoEventfd(second, 8, 2, r.DATAMATCH, 7),
        r.IoEventfd(first, 16, 0),
    ]
    talk.backend.doorbells[0] = doorbells
    reply = talk.ask(Command.DEVICE_GET_REGION_IO_FDS, r.encode_io_fds_request(0))
    assert isinstance(reply, bytes)
    taken = talk.taken()
    assert len(taken) == 2
    assert len(reply) == 16 + 3 * 48
    found = r.decode_io_fds(reply, taken, 4096)
    assert [(one.offset, one.size, one.flags, one.datamatch) for one in found] == [
        (one.offset, one.size, one.flags, one.datamatch) for one in doorbells
    ]
    os.eventfd_write(found[1].fd, 5)
    assert os.eventfd_read(second) == 5
    # The specification's 40 bytes an entry, its datamatch right after the padding.
    spec = struct.pack("=IIII", 56, 0, 0, 1) + struct.pack("=QQIIIIQ", 8, 2, 1, 0, 1, 0, 7)
    assert r.decode_io_fds(spec, taken, 4096) == [r.IoEventfd(taken[1], 8, 2, 1, 7)]
    # And in what we send, a reader of either layout finds it.
    assert (
        struct.unpack_from("=Q", reply, 16 + 48 + 32) == struct.unpack_from("=Q", reply, 16 + 48 + 40) == (7,)
    )
    close_all(taken)
    close_all([first, second])


def test_without_room_only_the_number_of_descriptors_is_said(talk: Talk, fd: int) -> None:
    talk.backend.doorbells[0] = [r.IoEventfd(fd, 0, 4)]
    assert talk.ask(Command.DEVICE_GET_REGION_IO_FDS, r.encode_io_fds_request(0, 16)) == struct.pack(
        "=IIII", 64, 0, 0, 1
    )
    assert talk.taken() == []
    assert talk.ask(Command.DEVICE_GET_REGION_IO_FDS, r.encode_io_fds_request(1)) == struct.pack(
        "=IIII", 16, 0, 1, 0
    )


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack("=III", 16, 0, 0),
        struct.pack("=IIII", 15, 0, 0, 0),
        struct.pack("=IIII", m.MAX_DATA + 1, 0, 0, 0),
        struct.pack("=IIII", 4096, 1, 0, 0),
        struct.pack("=IIII", 4096, 0, 3, 0),
        struct.pack("=IIII", 4096, 0, 0, 1),
    ],
)
def test_a_request_for_descriptors_that_makes_no_sense_is_einval(talk: Talk, payload: bytes) -> None:
    assert talk.ask(Command.DEVICE_GET_REGION_IO_FDS, payload) == errno.EINVAL


def test_more_descriptors_than_the_client_takes_are_e2big_and_none_leaks(fd: int) -> None:
    talk = Talk(EVERYTHING._replace(max_msg_fds=0))
    talk.backend.mappable[0] = r.RegionMemory(fd)
    talk.backend.doorbells[0] = [r.IoEventfd(fd, 0, 4)]
    assert region(talk, 0) == errno.E2BIG
    assert talk.ask(Command.DEVICE_GET_REGION_IO_FDS, r.encode_io_fds_request(0)) == errno.E2BIG
    assert talk.taken() == []
    talk.session.close()


@given(st.binary(max_size=200), st.integers(0, 3))
def test_a_list_of_descriptors_of_any_shape_is_read_or_refused(data: bytes, count: int) -> None:
    head = struct.pack("=IIII", 16 + len(data), 0, 0, count)
    for payload in (data, head + data):
        try:
            found = r.decode_io_fds(payload, [5, 6], 4096)
        except RequestError as error:
            assert error.errno == errno.EINVAL
        else:
            assert all(one.fd in (5, 6) and one.offset + one.size <= 4096 for one in found)


# -- many writes ------------------------------------------------------------------------------------------------------------------


def writes(*each: tuple[int, int, bytes]) -> bytes:
    return r.encode_writes([r.Write(*one) for one in each])


def test_many_writes_are_done_in_order_and_counted(talk: Talk) -> None:
    payload = writes((0, 0, b"abcdefgh"), (0, 4, b"XY"), (2, 0, b"!"))
    # vfio-user.rst: a count, then 24 bytes each.
    assert payload[:8] == struct.pack("=Q", 3)
    assert payload[32:56] == struct.pack("=QII8s", 4, 0, 2, b"XY")
    assert talk.ask(Command.REGION_WRITE_MULTI, payload) == struct.pack("=Q", 3)
    assert talk.backend.bytes[0][:8] == b"abcdXYgh"
    assert talk.backend.bytes[2][:1] == b"!"
    assert talk.ask(Command.REGION_WRITE_MULTI, writes()) == struct.pack("=Q", 0)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack("=Q", 1),
        struct.pack("=Q", 2**64 - 1),
        struct.pack("=Q", 0) + bytes(24),
        struct.pack("=QQII8s", 1, 0, 0, 0, b""),
        struct.pack("=QQII8s", 1, 0, 0, 9, b""),
        writes((0, 0, b"abcd"), (0, 4093, b"abcd")),
        writes((0, 0, b"abcd"), (1, 0, b"x")),
        writes((0, 0, b"abcd"), (3, 0, b"x")),
    ],
)
def test_one_wrong_write_among_many_is_einval_and_none_is_done(talk: Talk, payload: bytes) -> None:
    assert talk.ask(Command.REGION_WRITE_MULTI, payload) == errno.EINVAL
    assert talk.backend.bytes[0][:4] == bytes(4)


def test_where_the_device_refuses_one_of_many_those_before_it_are_counted(talk: Talk) -> None:
    talk.backend.refuse = errno.EBUSY
    assert talk.ask(Command.REGION_WRITE_MULTI, writes((0, 0, b"ab"))) == errno.EBUSY
    talk.backend.refuse = 0
    original = talk.backend.region_write

    def once(region: int, offset: int, data: bytes) -> None:
        original(region, offset, data)
        talk.backend.refuse = errno.EBUSY

    talk.backend.region_write = once  # type: ignore[method-assign]
    reply = talk.ask(Command.REGION_WRITE_MULTI, writes((0, 0, b"ab"), (0, 2, b"cd"), (0, 4, b"ef")))
    assert reply == struct.pack("=Q", 1)
    assert talk.backend.bytes[0][:6] == b"ab" + bytes(4)


def test_many_writes_are_for_who_has_agreed_to_them() -> None:
    talk = Talk(v.Capabilities())
    assert talk.ask(Command.REGION_WRITE_MULTI, writes((0, 0, b"ab"))) == errno.ENOTSUP


# -- masks ------------------------------------------------------------------------------------------------------

NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32


def set_irqs(
    talk: Talk, flags: int, start: int, count: int, data: bytes = b"", fds: list[int] | None = None
) -> bytes | int:
    payload = m.IrqSet(flags, 2, start, count, data).encode()
    return talk.ask(Command.DEVICE_SET_IRQS, payload, fds)


def test_interrupts_are_masked_and_unmasked_by_range_or_by_name(talk: Talk) -> None:
    talk.backend.maskable = frozenset({2})
    info = talk.ask(Command.DEVICE_GET_IRQ_INFO, m.IrqInfo(2).encode())
    assert m.IrqInfo.decode(info).flags == m.IrqFlags.EVENTFD | m.IrqFlags.MASKABLE  # type: ignore[arg-type]
    assert set_irqs(talk, NONE | MASK, 0, 3) == b""
    assert talk.backend.masked == {(2, 0), (2, 1), (2, 2)}
    assert set_irqs(talk, BOOL | UNMASK, 0, 3, b"\1\0\1") == b""
    assert talk.backend.masked == {(2, 1)}
    assert set_irqs(talk, NONE | UNMASK, 1, 1) == b""
    assert talk.backend.masked == set()


def test_disabling_all_and_going_away_take_the_masks(talk: Talk) -> None:
    talk.backend.maskable = frozenset({2})
    set_irqs(talk, NONE | MASK, 0, 3)
    assert set_irqs(talk, NONE | TRIGGER, 0, 0) == b""
    assert talk.backend.masked == set()
    set_irqs(talk, NONE | MASK, 0, 3)
    talk.session.close()
    assert talk.backend.masked == set()


def test_what_cannot_be_masked_so_is_einval(talk: Talk) -> None:
    assert set_irqs(talk, NONE | MASK, 0, 1) == errno.EINVAL
    talk.backend.maskable = frozenset({2})
    assert set_irqs(talk, NONE | MASK, 0, 4) == errno.EINVAL
    assert set_irqs(talk, NONE | MASK, 0, 0) == errno.EINVAL
    assert set_irqs(talk, EVENTFD | MASK, 0, 1, fds=[os.eventfd(0)]) == errno.EINVAL
    assert set_irqs(talk, NONE | TRIGGER, 1, 0) == errno.EINVAL
    assert talk.backend.masked == set()
