"""Frames: how bytes are cut on every channel. Sans-IO: functions from bytes to values and back; docs/protocol.md has the tables.

A frame is a 16-byte header, big-endian, and a body:

    offset  size  field
    0       4     magic "VMF1"
    4       1     kind: 1 CONTROL, 2 PAGES, 3 ZERO, 4 MARK, 5 RELAY
    5       1     flags: bit 0 (not in CONTROL): the last, stopped pass; table and bytes are digested
    6       2     zero
    8       4     length of the body in bytes
    12      4     CRC-32 of bytes 0 to 11

Every length is checked against its kind's limit before anything is allocated. CONTROL bodies end with a CRC-32 of what stands
before it. PAGES and ZERO bodies begin with a run table that has its own CRC-32; the page bytes of live rounds carry none, for a
guest may write them while they are sent (DESIGN 2.5); those of the last pass are digested in STOPPED.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from migrate.errors import LocalProtocolError, Phase, RemoteProtocolError

MAGIC = b"VMF1"
HEADER = struct.Struct(">4sBBHII")
HEADER_SIZE = HEADER.size
#: Head of a PAGES, ZERO or MARK body: round number, count of runs, CRC-32 of those eight bytes and the table.
TABLE_HEAD = struct.Struct(">III")
CRC = struct.Struct(">I")
#: Head of a RELAY body: which of QEMU's connections the bytes after it belong to.
RELAY_HEAD = struct.Struct(">I")
#: One run of the table: guest physical address and length, both in bytes.
RUN_DTYPE = np.dtype([("gpa", ">u8"), ("bytes", ">u8")])

MIB = 1 << 20
MAX_CONTROL = 24 * MIB
MAX_RUNS = 4096
MAX_PAGE_BYTES = 8 * MIB
MAX_RELAY = MIB
MAX_TABLE = TABLE_HEAD.size + MAX_RUNS * RUN_DTYPE.itemsize


class Kind(IntEnum):
    CONTROL = 1
    PAGES = 2
    ZERO = 3
    MARK = 4
    RELAY = 5


LIMITS = {
    Kind.CONTROL: MAX_CONTROL,
    Kind.PAGES: MAX_TABLE + MAX_PAGE_BYTES,
    Kind.ZERO: MAX_TABLE,
    Kind.MARK: TABLE_HEAD.size,
    Kind.RELAY: RELAY_HEAD.size + MAX_RELAY,
}


@dataclass(frozen=True, slots=True)
class Header:
    kind: Kind
    length: int
    digested: bool = False


def encode_header(kind: Kind, length: int, digested: bool = False) -> bytes:
    """:raises LocalProtocolError: if the body is over its kind's limit: a bug of ours, caught before a byte is sent."""
    if length > LIMITS[kind]:
        raise LocalProtocolError(
            f"a {kind.name} frame of {length} bytes is over the limit of {LIMITS[kind]}",
            phase=Phase.PRECOPY,
            remedy="this is a defect of vmferry; report it with the log",
        )
    head = HEADER.pack(MAGIC, kind, digested, 0, length, 0)[:12]
    return head + CRC.pack(zlib.crc32(head))


def _garbage(why: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"the peer does not speak vmferry's protocol: {why}",
        phase=Phase.PRECOPY,
        remedy="check that the address is that of a `ferry host` of a version that talks to this one",
    )


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:raises RemoteProtocolError: for a wrong magic, kind, checksum, or a length over the kind's limit."""
    magic, kind, flags, zero, length, crc = HEADER.unpack(data)
    if magic != MAGIC:
        raise _garbage(f"a frame begins with {bytes(data[:4])!r}")
    if crc != zlib.crc32(data[:12]):
        raise _garbage("the checksum of a frame's header is wrong")
    try:
        known = Kind(kind)
    except ValueError:
        raise _garbage(f"a frame of unknown kind {kind}") from None
    if length > LIMITS[known]:
        raise _garbage(f"a {known.name} frame claims {length} bytes, over the limit of {LIMITS[known]}")
    if flags > (known is not Kind.CONTROL) or zero:
        raise _garbage(f"a {known.name} frame with unknown flags {flags:#x} {zero:#x}")
    return Header(known, length, bool(flags))


def encode_control(body: bytes) -> bytes:
    return encode_header(Kind.CONTROL, len(body) + CRC.size) + body + CRC.pack(zlib.crc32(body))


def decode_control(body: bytes) -> bytes:
    """The body without its checksum.

    :raises RemoteProtocolError: if the checksum is wrong.
    """
    if len(body) < CRC.size or zlib.crc32(body[: -CRC.size]) != CRC.unpack(body[-CRC.size :])[0]:
        raise _garbage("the checksum of a control frame is wrong")
    return body[: -CRC.size]


Runs = NDArray[np.void]


def encode_table(
    kind: Kind,
    round_number: int,
    gpas: NDArray[np.uint64],
    sizes: NDArray[np.uint64],
    *,
    digested: bool = False,
) -> bytes:
    """Header and run table of a PAGES frame (the page bytes follow in the order of the table) or a whole ZERO or MARK frame.

    :param gpas: guest physical addresses, bytes. :param sizes: lengths, bytes.
    """
    table = np.empty(len(gpas), RUN_DTYPE)
    table["gpa"] = gpas
    table["bytes"] = sizes
    raw = table.tobytes()
    start = struct.pack(">II", round_number, len(gpas))
    data = int(sizes.sum()) if kind is Kind.PAGES else 0
    if len(gpas) > MAX_RUNS or data > MAX_PAGE_BYTES:
        raise LocalProtocolError(
            f"{len(gpas)} runs of {data} bytes do not fit one frame", phase=Phase.PRECOPY
        )
    header = encode_header(kind, TABLE_HEAD.size + len(raw) + data, digested)
    return header + start + CRC.pack(zlib.crc32(raw, zlib.crc32(start))) + raw


@dataclass(frozen=True, slots=True)
class TableHead:
    round_number: int
    runs: int
    crc: int

    @property
    def table_bytes(self) -> int:
        return self.runs * RUN_DTYPE.itemsize


def decode_table_head(header: Header, data: bytes | bytearray | memoryview) -> TableHead:
    """:raises RemoteProtocolError: if the count of runs is over the limit or does not fit the frame."""
    head = TableHead(*TABLE_HEAD.unpack(data))
    data_bytes = header.length - TABLE_HEAD.size - head.table_bytes
    if head.runs > MAX_RUNS or data_bytes < 0:
        raise _garbage(f"a {header.kind.name} frame of {header.length} bytes claims {head.runs} runs")
    if data_bytes > (MAX_PAGE_BYTES if header.kind is Kind.PAGES else 0):
        raise _garbage(f"a {header.kind.name} frame has {data_bytes} bytes after its table")
    return head


def decode_table(header: Header, head: TableHead, data: bytes | bytearray | memoryview) -> Runs:
    """The run table, checked: whole pages, no overflow, and as many bytes as the frame has left.

    Whether the runs lie in the guest's memory is for the receiver to say: only it knows the layout.

    :raises RemoteProtocolError: otherwise.
    """
    start = struct.pack(">II", head.round_number, head.runs)
    if zlib.crc32(data, zlib.crc32(start)) != head.crc:
        raise _garbage("the checksum of a run table is wrong")
    table: Runs = np.frombuffer(data, RUN_DTYPE)
    sizes = table["bytes"].astype(np.uint64)
    gpas = table["gpa"].astype(np.uint64)
    if bool(((gpas | sizes) & np.uint64(4095)).any()) or bool((sizes == 0).any()):
        raise _garbage("a run is not made of whole pages")
    if bool((sizes > np.uint64(1 << 48)).any()) or bool((gpas > np.uint64(1 << 52)).any()):
        raise _garbage("a run lies beyond any guest's memory")
    if header.kind is Kind.PAGES and int(sizes.sum()) != header.length - TABLE_HEAD.size - head.table_bytes:
        raise _garbage("a PAGES frame's bytes are not those of its table")
    return table


def encode_relay(stream: int, size: int, *, digested: bool = False) -> bytes:
    """What stands before `size` bytes of one of QEMU's connections; of none, where it has ended."""
    return encode_header(Kind.RELAY, RELAY_HEAD.size + size, digested) + RELAY_HEAD.pack(stream)


def decode_relay(header: Header, data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """From the first bytes of a RELAY body: the connection, and how many of its bytes follow.

    :raises RemoteProtocolError: if it is no such frame, or too short for its head.
    """
    if header.kind is not Kind.RELAY or header.length < RELAY_HEAD.size:
        raise _garbage(f"a {header.kind.name} frame of {header.length} bytes where QEMU's channel is relayed")
    stream: int = RELAY_HEAD.unpack_from(data)[0]
    return stream, header.length - RELAY_HEAD.size
