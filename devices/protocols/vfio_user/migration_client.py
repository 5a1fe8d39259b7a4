"""A VMM's side of migration over vfio-user: a device's states, its data, what it has written, and what its state is.

    source       migration.set_state(PRE_COPY); migration.read() …; set_state(STOP_COPY); read() until it is short
    destination  migration.set_state(RESUMING); migration.write(data) …; set_state(RUNNING)

One object beside a Client; it keeps nothing but the client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from devices.protocols.vfio_user.client import Client
from devices.protocols.vfio_user.connection import RequestRefused
from devices.protocols.vfio_user.feature_messages import (
    ENVELOPE_ROOM,
    FEATURE,
    GET,
    MIGRATION,
    PROBE,
    REPORT,
    SET,
    Envelope,
    Feature,
    FeatureRequest,
    LoggingReport,
    LoggingStart,
    MigrationFlags,
    MigrationState,
    Remaining,
    decode_mig_data,
    decode_state,
    encode_mig_data,
    encode_mig_read,
    encode_state,
    encode_version,
)
from devices.protocols.vfio_user.messages import MAX_DATA, Buffer, Command, RequestError, invalid

_T = TypeVar("_T")


class Migration:
    """What a VMM asks of one device. RequestRefused everywhere: the device said no, `errno` says how."""

    def __init__(self, client: Client) -> None:
        self._client = client

    # -- features ---------------------------------------------------------------------------------------------------------

    def probe(self, feature: int, operations: int = 0) -> bool:
        """Whether the device has a feature, and all of the operations (GET, SET) that are named."""
        try:
            self._feature(feature, PROBE | operations)
        except RequestRefused:
            return False
        return True

    def _feature(self, feature: int, operations: int, data: Buffer = b"", room: int = 0) -> memoryview:
        """The data of the reply."""
        request = FeatureRequest(feature, operations, data, FEATURE.size + room)
        reply = self._client._call(Command.DEVICE_FEATURE, request.encode())
        if len(reply) < FEATURE.size or FEATURE.unpack_from(reply)[1] != feature | operations:
            self._client._fail(f"feature {feature:#x} was answered with something else")
        return reply[FEATURE.size :]

    def _get(self, feature: Feature, decode: Callable[[Buffer], _T], room: int) -> _T:
        return self._client._decoded(decode, self._feature(feature, GET, room=room))

    # -- states and data -----------------------------------------------------------------------------------------------------

    def flags(self) -> MigrationFlags:
        """How it can be migrated. RequestRefused: not at all, or (EBUSY) not by its VMM."""
        return MigrationFlags(self._get(Feature.MIGRATION, _number, MIGRATION.size))

    def state(self) -> MigrationState:
        return self._get(Feature.MIG_DEVICE_STATE, _state, len(encode_state(0)))

    def set_state(self, state: MigrationState) -> None:
        """Returns when it is there. RequestRefused: it may stand anywhere on the way; `state` tells."""
        self._feature(Feature.MIG_DEVICE_STATE, SET, encode_state(state))

    @property
    def most_data(self) -> int:
        """Bytes of data that go in one message."""
        return min(self._client.server.max_data_xfer_size, MAX_DATA)

    def read(self, size: int = MAX_DATA) -> bytes:
        """Data of the state. Shorter than `size`: there is no more, or in PRE_COPY none now."""
        size = min(size, self.most_data)
        reply = self._client._call(Command.MIG_DATA_READ, encode_mig_read(size))
        data = self._client._decoded(lambda payload: decode_mig_data(payload, padded=True), reply)
        if len(data) > size:
            self._client._fail(f"{len(data)} bytes of data came where {size} were asked for")
        return bytes(data)

    def read_all(self) -> Iterator[bytes]:
        """All there is now, piece by piece."""
        size = self.most_data
        while True:
            data = self.read(size)
            if data:
                yield data
            if len(data) < size:
                return

    def write(self, data: Buffer) -> None:
        """In pieces, if need be."""
        view = memoryview(data)
        for at in range(0, len(view), self.most_data):
            self._client._call(Command.MIG_DATA_WRITE, encode_mig_data(view[at : at + self.most_data]))

    # -- what it has written to memory -----------------------------------------------------------------------------------------

    def start_logging(self, page_size: int, ranges: Sequence[tuple[int, int]] = ()) -> int:
        """The size of page that the device has chosen. No ranges: everything."""
        data = LoggingStart(page_size, ranges).encode()
        reply = self._feature(Feature.DMA_LOGGING_START, SET, data)
        return self._client._decoded(LoggingStart.decode, reply).page_size

    def stop_logging(self) -> None:
        self._feature(Feature.DMA_LOGGING_STOP, SET)

    def dirty(self, iova: int, length: int, page_size: int) -> bytes:
        """A bit a page, least significant first, in whole 64-bit words. What it tells is forgotten there."""
        report = LoggingReport(iova, length, page_size)
        data = report.encode()
        room = REPORT.size + report.bitmap_size
        reply = self._feature(Feature.DMA_LOGGING_REPORT, GET, data, room)
        if len(reply) != room or reply[: REPORT.size] != data:
            self._client._fail(f"a report of {length} bytes at {iova:#x} was answered with something else")
        return bytes(reply[REPORT.size :])

    # -- ours (docs/vfio-user.md) -----------------------------------------------------------------------------------------------

    def remaining(self) -> Remaining:
        return self._get(Feature.REMAINING, Remaining.decode, len(Remaining(0, 0, 0).encode()))

    def envelope(self) -> Envelope:
        return self._get(Feature.ENVELOPE, Envelope.decode, ENVELOPE_ROOM)

    def write_version(self, version: int) -> None:
        """The schema version that is read from now on: one that the destination reads."""
        self._feature(Feature.ENVELOPE, SET, encode_version(version))


def _number(data: Buffer) -> int:
    if len(data) != MIGRATION.size:
        raise invalid(f"flags of {len(data)} bytes")
    number: int = MIGRATION.unpack(data)[0]
    return number


def _state(data: Buffer) -> MigrationState:
    number = decode_state(data)
    try:
        return MigrationState(number)
    except ValueError:
        raise RequestError(f"a device state {number}", remedy="see the log of the device's process") from None
