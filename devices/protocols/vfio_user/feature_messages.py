"""What is on the wire of vfio-user about features: migration, the log of DMA, what is ours. No I/O.

Source of the layouts: QEMU's docs/interop/vfio-user.rst, VFIO_USER_DEVICE_FEATURE and VFIO_USER_MIG_DATA_READ/WRITE, which are
those of <linux/vfio.h> without the data descriptor. `REMAINING` and `ENVELOPE` are extensions: docs/vfio-user.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple, Self

from devices.protocols.vfio_user.messages import MAX_DATA, Buffer, invalid


class Feature(IntEnum):
    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    #: Ours: how much of the state is still to be read, as the kernel's VFIO_MIG_GET_PRECOPY_INFO.
    REMAINING = 0xFE00
    #: Ours: what kind of state this is, and in which versions it is read and written.
    ENVELOPE = 0xFE01


INDEX_MASK = 0xFFFF
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
_KNOWN = INDEX_MASK | GET | SET | PROBE
FEATURE = struct.Struct("=II")


class FeatureRequest(NamedTuple):
    """DEVICE_FEATURE: which feature, what is to be done (GET, SET, PROBE), and its data."""

    feature: int
    operations: int
    data: Buffer = b""
    #: Bytes of reply that the client takes; 0: as many as the request has.
    room: int = 0

    def encode(self) -> bytes:
        size = FEATURE.size + len(self.data)
        return FEATURE.pack(max(self.room, size), self.feature | self.operations) + self.data

    @classmethod
    def decode(cls, payload: Buffer) -> Self:
        if len(payload) < FEATURE.size:
            raise invalid(f"a DEVICE_FEATURE of {len(payload)} bytes")
        argsz, flags = FEATURE.unpack_from(payload)
        operations = flags & ~INDEX_MASK
        if flags & ~_KNOWN or not operations or operations == GET | SET:
            raise invalid(
                f"a DEVICE_FEATURE with flags {flags:#x}: GET, SET, or PROBE of one of them or both"
            )
        return cls(flags & INDEX_MASK, operations, memoryview(payload)[FEATURE.size :], argsz)


def _fields(layout: struct.Struct, data: Buffer, what: str) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise invalid(f"{what} of {len(data)} bytes instead of {layout.size}")
    return layout.unpack(data)


# -- migration ---------------------------------------------------------------------------------------------------------------


class MigrationFlags(IntFlag):
    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


class MigrationState(IntEnum):
    """enum vfio_device_mig_state; the names are those of migrate.state.lifecycle.DeviceState."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


MIGRATION = struct.Struct("=Q")
_STATE = struct.Struct("=Ii")
NO_FD = -1


def encode_state(state: int) -> bytes:
    """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE. There is no data descriptor in vfio-user: -1, as the kernel says it."""
    return _STATE.pack(state, NO_FD)


def decode_state(data: Buffer) -> int:
    return _fields(_STATE, data, "a device state")[0]


MIG_DATA = struct.Struct("=II")


def encode_mig_read(size: int) -> bytes:
    return MIG_DATA.pack(MIG_DATA.size + size, size)


def decode_mig_read(payload: Buffer) -> int:
    """How many bytes are wanted."""
    argsz, size = _fields(MIG_DATA, payload, "a MIG_DATA_READ")
    if size > MAX_DATA or argsz < MIG_DATA.size + size:
        raise invalid(f"a MIG_DATA_READ of {size} bytes with argsz {argsz}")
    return size


def encode_mig_data(data: Buffer) -> bytes:
    """A MIG_DATA_WRITE, or the reply to a MIG_DATA_READ."""
    return MIG_DATA.pack(MIG_DATA.size + len(data), len(data)) + data


def decode_mig_data(payload: Buffer, *, padded: bool = False) -> memoryview:
    """The data of a MIG_DATA_WRITE, or of a reply.

    :param padded: more may follow: libvfio-user answers a short read with a message of the size that was asked for.
    """
    if len(payload) < MIG_DATA.size:
        raise invalid(f"migration data of {len(payload)} bytes with its header")
    argsz, size = MIG_DATA.unpack_from(payload)
    data = memoryview(payload)[MIG_DATA.size :]
    if (
        argsz < MIG_DATA.size + size
        or size > MAX_DATA
        or len(data) < size
        or (len(data) > size and not padded)
    ):
        raise invalid(f"migration data of {len(data)} bytes that claims {size}, argsz {argsz}")
    return data[:size]


# -- the log of DMA ------------------------------------------------------------------------------------------------------------

_LOGGING = struct.Struct("=QII")
_RANGE = struct.Struct("=QQ")
REPORT = struct.Struct("=QQQ")
_END = 1 << 64
#: The largest page that a report can have: with the most bits of a report, all is still below 2^62.
_MAX_PAGE = 1 << 38


class LoggingStart(NamedTuple):
    """page_size is a wish; no ranges: everything."""

    page_size: int
    ranges: Sequence[tuple[int, int]] = ()

    def encode(self) -> bytes:
        head = _LOGGING.pack(self.page_size, len(self.ranges), 0)
        return head + b"".join(_RANGE.pack(*one) for one in self.ranges)

    @classmethod
    def decode(cls, data: Buffer) -> Self:
        if len(data) < _LOGGING.size:
            raise invalid(f"a DMA_LOGGING_START of {len(data)} bytes")
        page_size, count, _ = _LOGGING.unpack_from(data)
        if len(data) - _LOGGING.size != count * _RANGE.size:
            raise invalid(f"{count} ranges in a DMA_LOGGING_START of {len(data)} bytes")
        ranges = tuple(_RANGE.iter_unpack(data[_LOGGING.size :]))
        if page_size == 0 or any(length == 0 or iova + length > _END for iova, length in ranges):
            raise invalid(f"a log of pages of {page_size} bytes, or of a range that is none")
        return cls(page_size, ranges)


class LoggingReport(NamedTuple):
    """Which pages were written in a range. The reply has this and then the bitmap, in whole 64-bit words."""

    iova: int
    length: int
    page_size: int

    @property
    def bitmap_size(self) -> int:
        return -(-self.length // (64 * self.page_size)) * 8

    def encode(self) -> bytes:
        return REPORT.pack(*self)

    @classmethod
    def decode(cls, data: Buffer) -> Self:
        report = cls(*_fields(REPORT, data, "a DMA_LOGGING_REPORT"))
        iova, length, page_size = report
        if not 0 < page_size <= _MAX_PAGE or page_size & (page_size - 1):
            raise invalid(f"a report by pages of {page_size} bytes")
        if length < page_size or iova + length > _END:
            raise invalid(f"a report of {length} bytes at {iova:#x} by pages of {page_size}")
        if report.bitmap_size > MAX_DATA:
            raise invalid(f"a report with a bitmap of {report.bitmap_size} bytes")
        return report


# -- ours ------------------------------------------------------------------------------------------------------------------------

_REMAINING = struct.Struct("=QQQ")


class Remaining(NamedTuple):
    """Bytes still to be read. The first two as in VFIO_MIG_GET_PRECOPY_INFO; the third as in VFIO_DEVICE_FEATURE_MIG_DATA_SIZE."""

    initial: (
        int  #: of what there was when the session began; once 0, there is no reason to wait before stopping
    )
    dirty: int  #: of what has changed since it was read
    stop_copy: int  #: all that would be read if the device were stopped now

    def encode(self) -> bytes:
        return _REMAINING.pack(*self)

    @classmethod
    def decode(cls, data: Buffer) -> Self:
        return cls(*_fields(_REMAINING, data, "what is left"))


_ENVELOPE = struct.Struct("=IIHHHH32s")
_VERSION = struct.Struct("=I")
_ENVELOPE_FORMAT = 1
#: Room for any: the names and versions are counted by 16 bits, and no schema has a thousand versions.
ENVELOPE_ROOM = 16 << 10


class Envelope(NamedTuple):
    """What a device's state is, before any of it is sent: the same words as in the envelope of its blob (docs/state.md)."""

    type: str
    instance: str
    version: int  #: of the schema; the one that will be written
    readable: tuple[int, ...]
    writable: tuple[int, ...]
    digest: bytes  #: of that version's definition, SHA-256

    def encode(self) -> bytes:
        kind, instance = self.type.encode(), self.instance.encode()
        versions = (*self.readable, *self.writable)
        return b"".join(
            (
                _ENVELOPE.pack(
                    _ENVELOPE_FORMAT,
                    self.version,
                    len(kind),
                    len(instance),
                    len(self.readable),
                    len(self.writable),
                    self.digest,
                ),
                struct.pack(f"={len(versions)}I", *versions),
                kind,
                instance,
            )
        )

    @classmethod
    def decode(cls, data: Buffer) -> Self:
        if len(data) < _ENVELOPE.size:
            raise invalid(f"an envelope of {len(data)} bytes")
        form, version, kind, instance, readable, writable, digest = _ENVELOPE.unpack_from(data)
        names = _ENVELOPE.size + 4 * (readable + writable)
        if form != _ENVELOPE_FORMAT or len(data) != names + kind + instance:
            raise invalid(f"an envelope of format {form} in {len(data)} bytes")
        versions = struct.unpack_from(f"={readable + writable}I", data, _ENVELOPE.size)
        try:
            text = [bytes(data[names : names + kind]).decode(), bytes(data[names + kind :]).decode()]
        except UnicodeDecodeError as error:
            raise invalid("an envelope whose names are not UTF-8") from error
        return cls(text[0], text[1], version, versions[:readable], versions[readable:], digest)


def encode_version(version: int) -> bytes:
    """SET of ENVELOPE: the schema version to write from now on."""
    return _VERSION.pack(version)


def decode_version(data: Buffer) -> int:
    return _fields(_VERSION, data, "a schema version")[0]
