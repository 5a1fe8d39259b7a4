"""DEVICE_FEATURE and migration data, command by command: what is granted, and the errno of what is not."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vfio_user_talk import EVERYTHING, Talk

from devices.protocols.vfio_user import feature_messages as f
from devices.protocols.vfio_user import messages as m
from devices.protocols.vfio_user.feature_messages import GET, PROBE, SET, Feature
from devices.protocols.vfio_user.messages import Command, RequestError, refused

ENVELOPE = f.Envelope("uart16550", "uart0", 3, (1, 2, 3), (2, 3), bytes(range(32)))
WINDOW = 0x100000
K = 1 << 10


class FakeMigration:
    def __init__(self) -> None:
        self.offered = True
        self.flags = f.MigrationFlags.STOP_COPY
        self.state = 2
        self.data = b"abcdefgh"
        self.written: list[bytes] = []
        self.refuse = 0
        self.version = 3
        self.gone = 0

    def set_state(self, state: int) -> None:
        if self.refuse:
            raise refused(self.refuse, "told to refuse")
        self.state = state

    def read(self, size: int) -> bytes:
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def write(self, data: memoryview) -> None:
        self.written.append(bytes(data))

    def remaining(self) -> f.Remaining:
        return f.Remaining(1, 2, 3)

    def envelope(self) -> f.Envelope:
        return ENVELOPE

    def choose_version(self, version: int) -> None:
        self.version = version

    def client_gone(self) -> None:
        self.gone += 1


class MigratableTalk(Talk):
    def __init__(self) -> None:
        super().__init__(EVERYTHING)
        self.migration = self.backend.migration = FakeMigration()

    def feature(self, index: int, operations: int, data: bytes = b"", room: int = 1 << 20) -> bytes | int:
        return self.ask(Command.DEVICE_FEATURE, f.FeatureRequest(index, operations, data, room).encode())

    def data(self, index: int, operations: int, data: bytes = b"", room: int = 1 << 20) -> bytes:
        """Of a reply, whose head is checked."""
        reply = self.feature(index, operations, data, room)
        assert isinstance(reply, bytes), os.strerror(reply)
        argsz, flags = f.FEATURE.unpack_from(reply)
        assert flags == index | operations
        if operations == GET:
            assert argsz == len(reply)
        return reply[f.FEATURE.size :]

    def map(self, address: int = WINDOW, size: int = 64 * K) -> None:
        fd = os.memfd_create("x")
        assert self.ask(Command.DMA_MAP, m.DmaMap(3, 0, address, size).encode(), [fd]) == b""


@pytest.fixture
def talk() -> Iterator[MigratableTalk]:
    talk = MigratableTalk()
    yield talk
    talk.session.close()


#: Feature: what can be done with it.
TABLE = {
    Feature.MIGRATION: GET,
    Feature.MIG_DEVICE_STATE: GET | SET,
    Feature.DMA_LOGGING_START: SET,
    Feature.DMA_LOGGING_STOP: SET,
    Feature.DMA_LOGGING_REPORT: GET,
    Feature.REMAINING: GET,
    Feature.ENVELOPE: GET | SET,
}


@pytest.mark.parametrize("index", [*TABLE, 0, 3, 4, 5, 9, 10, 0xFE02, 0xFFFF])
@pytest.mark.parametrize("operations", [0, GET, SET, GET | SET])
def test_a_probe_says_what_a_feature_can_do_and_changes_nothing(
    talk: MigratableTalk, index: int, operations: int
) -> None:
    can = index in TABLE and not operations & ~TABLE.get(Feature(index), 0) if index in TABLE else False
    reply = talk.feature(index, PROBE | operations, room=0)
    assert reply == (f.FEATURE.pack(8, index | PROBE | operations) if can else errno.EINVAL)
    assert talk.backend.log is None


@pytest.mark.parametrize(
    ("index", "operations"),
    [
        (Feature.MIGRATION, 0),
        (Feature.MIGRATION, SET),
        (Feature.MIG_DEVICE_STATE, GET | SET),
        (Feature.MIGRATION, GET | 1 << 19),
        (Feature.DMA_LOGGING_START, GET),
        (Feature.DMA_LOGGING_STOP, GET),
        (Feature.DMA_LOGGING_REPORT, SET),
        (Feature.REMAINING, SET),
        (3, GET),
        (0xFFFF, SET),
    ],
)
def test_what_a_feature_does_not_do_is_einval(talk: MigratableTalk, index: int, operations: int) -> None:
    assert talk.feature(index, operations) == errno.EINVAL


@pytest.mark.parametrize("payload", [b"", bytes(7), f.FEATURE.pack(8, 0)])
def test_a_device_feature_that_is_none_is_einval(talk: MigratableTalk, payload: bytes) -> None:
    assert talk.ask(Command.DEVICE_FEATURE, payload) == errno.EINVAL


def test_the_features_of_migration_are_read_and_set(talk: MigratableTalk) -> None:
    assert talk.data(Feature.MIGRATION, GET) == struct.pack("=Q", 1)
    assert talk.data(Feature.MIG_DEVICE_STATE, GET) == struct.pack("=Ii", 2, -1)
    wanted = struct.pack("=II", 3, 7)
    assert talk.data(Feature.MIG_DEVICE_STATE, SET, wanted) == wanted
    assert talk.migration.state == 3
    assert f.Remaining.decode(talk.data(Feature.REMAINING, GET)) == (1, 2, 3)
    assert f.Envelope.decode(talk.data(Feature.ENVELOPE, GET)) == ENVELOPE
    talk.data(Feature.ENVELOPE, SET, struct.pack("=I", 2))
    assert talk.migration.version == 2


@pytest.mark.parametrize(
    "index", [Feature.MIGRATION, Feature.MIG_DEVICE_STATE, Feature.REMAINING, Feature.ENVELOPE]
)
def test_a_get_with_too_little_room_or_with_data_is_einval(talk: MigratableTalk, index: Feature) -> None:
    whole = len(talk.data(index, GET)) + f.FEATURE.size
    assert talk.feature(index, GET, room=whole - 1) == errno.EINVAL
    assert isinstance(talk.feature(index, GET, room=whole), bytes)
    assert talk.feature(index, GET, b"x") == errno.EINVAL


@pytest.mark.parametrize(
    ("index", "data"),
    [
        (Feature.MIG_DEVICE_STATE, b""),
        (Feature.MIG_DEVICE_STATE, bytes(4)),
        (Feature.MIG_DEVICE_STATE, bytes(12)),
        (Feature.ENVELOPE, bytes(8)),
        (Feature.DMA_LOGGING_START, bytes(8)),
        (Feature.DMA_LOGGING_START, struct.pack("=QII", 0, 0, 0)),
        (Feature.DMA_LOGGING_START, struct.pack("=QII", 4096, 1, 0)),
        (Feature.DMA_LOGGING_START, struct.pack("=QII", 4096, 2**32 - 1, 0)),
        (Feature.DMA_LOGGING_START, struct.pack("=QIIQQ", 4096, 1, 0, 2**64 - 4096, 8192)),
        (Feature.DMA_LOGGING_START, struct.pack("=QIIQQ", 4096, 1, 0, 0, 0)),
        (Feature.DMA_LOGGING_STOP, b"x"),
    ],
)
def test_a_set_of_the_wrong_size_or_of_nonsense_is_einval(
    talk: MigratableTalk, index: Feature, data: bytes
) -> None:
    assert talk.feature(index, SET, data) == errno.EINVAL
    assert talk.migration.state == 2
    assert talk.backend.log is None


def test_a_set_whose_argsz_is_less_than_itself_is_einval(talk: MigratableTalk) -> None:
    payload = f.FEATURE.pack(15, Feature.MIG_DEVICE_STATE | SET) + f.encode_state(3)
    assert talk.ask(Command.DEVICE_FEATURE, payload) == errno.EINVAL
    assert talk.migration.state == 2


def test_the_devices_own_errno_is_passed_on(talk: MigratableTalk) -> None:
    talk.migration.refuse = errno.EIO
    assert talk.feature(Feature.MIG_DEVICE_STATE, SET, f.encode_state(3)) == errno.EIO


def test_a_device_that_its_supervisor_moves_is_ebusy_to_its_vmm_and_may_be_looked_at(
    talk: MigratableTalk,
) -> None:
    talk.migration.offered = False
    for index, operations, data in (
        (Feature.MIGRATION, GET, b""),
        (Feature.MIGRATION, PROBE, b""),
        (Feature.MIG_DEVICE_STATE, SET, f.encode_state(1)),
        (Feature.MIG_DEVICE_STATE, PROBE, b""),
        (Feature.REMAINING, GET, b""),
        (Feature.ENVELOPE, SET, struct.pack("=I", 3)),
    ):
        assert talk.feature(index, operations, data) == errno.EBUSY
    assert talk.ask(Command.MIG_DATA_READ, f.encode_mig_read(4)) == errno.EBUSY
    assert talk.ask(Command.MIG_DATA_WRITE, f.encode_mig_data(b"abcd")) == errno.EBUSY
    assert f.decode_state(talk.data(Feature.MIG_DEVICE_STATE, GET)) == 2
    assert f.Envelope.decode(talk.data(Feature.ENVELOPE, GET)) == ENVELOPE
    talk.data(Feature.DMA_LOGGING_START, SET, f.LoggingStart(4096).encode())
    assert (talk.migration.state, talk.migration.written, talk.migration.version) == (2, [], 3)
    talk.session.close()
    assert talk.migration.gone == 0


def test_a_device_that_cannot_be_migrated_has_no_such_feature(talk: MigratableTalk) -> None:
    talk.backend.migration = None
    for index in (Feature.MIGRATION, Feature.MIG_DEVICE_STATE, Feature.REMAINING, Feature.ENVELOPE):
        assert talk.feature(index, GET) == talk.feature(index, PROBE) == errno.EINVAL
    assert talk.ask(Command.MIG_DATA_READ, f.encode_mig_read(4)) == errno.EINVAL
    assert talk.ask(Command.MIG_DATA_WRITE, f.encode_mig_data(b"abcd")) == errno.EINVAL
    assert isinstance(talk.feature(Feature.DMA_LOGGING_STOP, SET), bytes)


# -- migration data --------------------------------------------------------------------------------------------------------


def test_migration_data_is_read_until_it_is_short_and_written(talk: MigratableTalk) -> None:
    pieces = []
    for _ in range(3):
        reply = talk.ask(Command.MIG_DATA_READ, f.encode_mig_read(5))
        assert isinstance(reply, bytes)
        assert f.MIG_DATA.unpack_from(reply) == (len(reply), len(reply) - 8)
        pieces.append(bytes(f.decode_mig_data(reply)))
    assert pieces == [b"abcde", b"fgh", b""]
    assert talk.ask(Command.MIG_DATA_WRITE, f.encode_mig_data(b"xyz")) == b""
    assert talk.ask(Command.MIG_DATA_WRITE, f.encode_mig_data(b"")) == b""
    assert talk.migration.written == [b"xyz", b""]


@pytest.mark.parametrize(
    ("number", "payload"),
    [
        (Command.MIG_DATA_READ, b""),
        (Command.MIG_DATA_READ, struct.pack("=I", 12)),
        (Command.MIG_DATA_READ, f.encode_mig_read(4) + b"x"),
        (Command.MIG_DATA_READ, struct.pack("=II", 11, 4)),
        (Command.MIG_DATA_READ, struct.pack("=II", 2**32 - 1, m.MAX_DATA + 1)),
        (Command.MIG_DATA_READ, struct.pack("=II", 2**32 - 1, 2**32 - 1)),
        (Command.MIG_DATA_WRITE, b""),
        (Command.MIG_DATA_WRITE, struct.pack("=II", 12, 4) + b"abc"),
        (Command.MIG_DATA_WRITE, struct.pack("=II", 12, 4) + b"abcde"),
        (Command.MIG_DATA_WRITE, struct.pack("=II", 11, 4) + b"abcd"),
        (Command.MIG_DATA_WRITE, struct.pack("=II", 2**32 - 1, 2**32 - 1) + b"abcd"),
    ],
)
def test_migration_data_of_the_wrong_size_is_einval(
    talk: MigratableTalk, number: int, payload: bytes
) -> None:
    assert talk.ask(number, payload) == errno.EINVAL
    assert talk.migration.written == []
    assert talk.migration.data == b"abcdefgh"


def test_more_data_than_the_client_takes_is_einval() -> None:
    talk = Talk(EVERYTHING._replace(max_data_xfer_size=4))
    talk.backend.migration = FakeMigration()
    assert isinstance(talk.ask(Command.MIG_DATA_READ, f.encode_mig_read(4)), bytes)
    assert talk.ask(Command.MIG_DATA_READ, f.encode_mig_read(5)) == errno.EINVAL
    assert talk.ask(Command.MIG_DATA_WRITE, f.encode_mig_data(b"abcde")) == errno.EINVAL


def test_a_client_takes_a_short_read_in_a_message_of_full_size() -> None:
    padded = struct.pack("=II", 11, 3) + b"abc" + bytes(5)
    assert f.decode_mig_data(padded, padded=True) == b"abc"
    with pytest.raises(RequestError):
        f.decode_mig_data(padded)


# -- the log of DMA --------------------------------------------------------------------------------------------------------------


def start(talk: MigratableTalk, page_size: int, *ranges: tuple[int, int]) -> int:
    data = talk.data(Feature.DMA_LOGGING_START, SET, f.LoggingStart(page_size, ranges).encode())
    chosen = f.LoggingStart.decode(data)
    assert chosen.ranges == ranges
    return chosen.page_size


def report(talk: MigratableTalk, iova: int, length: int, page_size: int) -> bytes | int:
    wanted = f.LoggingReport(iova, length, page_size).encode()
    reply = talk.feature(Feature.DMA_LOGGING_REPORT, GET, wanted)
    if isinstance(reply, int):
        return reply
    assert reply[8:32] == wanted
    return reply[32:]


def test_dma_is_logged_from_start_to_stop(talk: MigratableTalk) -> None:
    talk.map()
    assert report(talk, WINDOW, 64 * K, 4 * K) == errno.EINVAL
    assert start(talk, 4 * K, (WINDOW, 64 * K)) == 4 * K
    assert talk.backend.log is not None
    talk.backend.log.mark(WINDOW + 9 * 4 * K, 1)
    assert report(talk, WINDOW, 64 * K, 4 * K) == b"\0\2" + bytes(6)
    assert report(talk, WINDOW, 64 * K, 4 * K) == bytes(8)
    talk.backend.log.mark(WINDOW + 9 * 4 * K, 1)
    assert report(talk, WINDOW, 64 * K, 2 * K) == b"\0\0\x0c" + bytes(5)
    talk.data(Feature.DMA_LOGGING_STOP, SET)
    assert talk.backend.log is None
    assert report(talk, WINDOW, 64 * K, 4 * K) == errno.EINVAL
    talk.data(Feature.DMA_LOGGING_STOP, SET)


def test_a_second_start_is_the_same_log_or_einval(talk: MigratableTalk) -> None:
    talk.map()
    assert start(talk, 8 * K) == 8 * K
    assert talk.backend.log is not None
    talk.backend.log.mark(WINDOW, 1)
    assert start(talk, 8 * K) == 8 * K
    assert talk.feature(Feature.DMA_LOGGING_START, SET, f.LoggingStart(4 * K).encode()) == errno.EINVAL
    assert report(talk, WINDOW, 64 * K, 8 * K) == b"\1" + bytes(7)


def test_a_page_size_that_cannot_be_had_is_answered_with_the_one_that_was_chosen(
    talk: MigratableTalk,
) -> None:
    assert start(talk, 3000) == 4 * K


@pytest.mark.parametrize(
    ("iova", "length", "page_size", "number"),
    [
        (WINDOW, 64 * K, 0, errno.EINVAL),
        (WINDOW, 64 * K, 3000, errno.EINVAL),
        (WINDOW, 64 * K, 1 << 24, errno.EINVAL),
        (WINDOW, 0, 4 * K, errno.EINVAL),
        (2**64 - 4 * K, 8 * K, 4 * K, errno.EINVAL),
        (0, 2**63, 4 * K, errno.EINVAL),
        (WINDOW, 64 * K + 1, 4 * K, errno.ENOENT),
        (WINDOW - 4 * K, 64 * K, 4 * K, errno.ENOENT),
        (0, 4 * K, 4 * K, errno.ENOENT),
        (WINDOW + 64 * K, 4 * K, 4 * K, errno.ENOENT),
    ],
)
def test_a_report_that_cannot_be_given_is_refused(
    talk: MigratableTalk, iova: int, length: int, page_size: int, number: int
) -> None:
    talk.map()
    start(talk, 4 * K)
    assert report(talk, iova, length, page_size) == number


def test_a_report_may_be_of_part_of_a_window_and_of_several(talk: MigratableTalk) -> None:
    talk.map(WINDOW + 64 * K)
    talk.map(WINDOW)
    start(talk, 4 * K)
    assert talk.backend.log is not None
    talk.backend.log.mark(WINDOW + 60 * K, 8 * K)
    assert report(talk, WINDOW + 56 * K, 16 * K, 4 * K) == b"\6" + bytes(7)


def test_a_report_that_the_client_has_no_room_for_loses_nothing(talk: MigratableTalk) -> None:
    talk.map()
    start(talk, 4 * K)
    assert talk.backend.log is not None
    talk.backend.log.mark(WINDOW, 1)
    wanted = f.LoggingReport(WINDOW, 64 * K, 4 * K).encode()
    assert talk.feature(Feature.DMA_LOGGING_REPORT, GET, wanted, room=39) == errno.EINVAL
    assert report(talk, WINDOW, 64 * K, 4 * K) == b"\1" + bytes(7)


def test_a_window_that_goes_while_it_is_logged_takes_its_bits_with_it(talk: MigratableTalk) -> None:
    talk.map()
    start(talk, 4 * K)
    assert talk.backend.log is not None
    talk.backend.log.mark(WINDOW, 64 * K)
    talk.ask(Command.DMA_UNMAP, m.DmaUnmap(0, WINDOW, 64 * K).encode())
    assert report(talk, WINDOW, 64 * K, 4 * K) == errno.ENOENT
    talk.map()
    assert report(talk, WINDOW, 64 * K, 4 * K) == bytes(8)


def test_a_client_that_goes_takes_its_log_with_it_and_the_migration_is_told(talk: MigratableTalk) -> None:
    talk.map()
    start(talk, 4 * K)
    talk.session.close()
    assert talk.backend.log is None
    assert talk.migration.gone == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*TABLE, 3, 0xFFFF]),
            st.sampled_from([GET, SET, PROBE, PROBE | GET]),
            st.binary(max_size=40)
            | st.builds(
                lambda *numbers: struct.pack("=QQQ", *numbers),
                *[st.sampled_from([0, 1, 4096, WINDOW, 65536, 2**38, 2**40, 2**63, 2**64 - 4096])] * 3,
            ),
            st.sampled_from([0, 8, 40, 1 << 20]),
        ),
        max_size=8,
    )
)
def test_whatever_is_asked_of_features_is_answered_and_is_no_fault_of_ours(
    asked: list[tuple[int, int, bytes, int]],
) -> None:
    talk = MigratableTalk()
    talk.map()
    for index, operations, data, room in asked:
        if talk.backend.log is not None:
            talk.backend.log.mark(WINDOW + 4 * K, 5)
        assert talk.feature(index, operations, data, room) not in (errno.EIO, errno.EBUSY)
    talk.session.close()
