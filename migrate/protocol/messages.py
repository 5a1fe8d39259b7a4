"""Control messages: what they carry, their bounds, and their bytes. Sans-IO.

A message is a MessagePack array `[name, fields]` in a CONTROL frame. Each class states its fields with a bounded check; a field
that is missing, unknown, of the wrong type or out of bounds is a RemoteProtocolError that names it. docs/protocol.md's table
of messages is checked against this file by a test.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import ClassVar

import msgpack

from migrate.errors import Reason
from migrate.protocol.fields import (
    Bool,
    Bytes,
    Check,
    Int,
    List,
    Map,
    Reasons,
    Struct,
    Text,
    bad,
    build,
    plain,
    spec,
)
from migrate.protocol.frames import MAX_CONTROL

PROTOCOL_VERSION = 1
MAX_DEVICES = 256
MAX_REGIONS = 64
MAX_BLOB = 16 << 20
MAX_CHUNK = 4 << 20

#: Longest list of any message: START's extents.
MAX_LIST = 4096
#: Most lists, maps and entries of these in any message (a manifest's devices): one hostile byte can be a map that costs 64.
MAX_ITEMS = 1 << 17

U32, U64 = Int(1 << 32), Int(1 << 64)
ID, NAME, TEXT, DIGEST, BOOL = Text(255), Text(255), Text(2000), Bytes(32, exactly=True), Bool()


def _by_device(item: Check, limit: int = MAX_DEVICES) -> Map:
    return Map(ID, item, limit)


@dataclass(frozen=True, slots=True)
class RegionEntry:
    gpa: int = spec(U64)
    size: int = spec(U64)


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """A back-end file on storage that both hosts share: its file name, and the token that the source wrote beside it."""

    option: str = spec(NAME)
    name: str = spec(NAME)
    size: int = spec(U64)
    read_only: bool = spec(BOOL)
    token: str = spec(Text(64))


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One participant in the manifest. `options` are the guest-visible ones; no path travels in them."""

    id: str = spec(ID)
    type: str = spec(NAME)
    protocol: str = spec(NAME)
    versions: tuple[int, ...] = spec(List(U32, 64))
    digest: bytes = spec(Bytes(32))
    tracker: str = spec(NAME)
    opaque: bool = spec(BOOL)
    gpa: int = spec(U64)
    irq: int = spec(U32)
    vectors: int = spec(U32)
    options: dict[str, str] = spec(_by_device(Text(1000), 64))
    disks: tuple[DiskEntry, ...] = spec(List(Struct(DiskEntry), 8))


REGISTRY: dict[str, type[Message]] = {}


class Message:
    """Base of all messages; every subclass is a frozen dataclass, registered under its class's name."""

    __slots__ = ()
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__.upper()
        REGISTRY[cls.name] = cls


@dataclass(frozen=True)
class Hello(Message):
    """First from each side. `incarnation` names the host's ledger: one that was wiped has another."""

    versions: tuple[int, ...] = spec(List(U32, 64))
    software: str = spec(NAME)
    host: str = spec(NAME)
    incarnation: str = spec(NAME)


@dataclass(frozen=True)
class Manifest(Message):
    """What is to be moved. Nothing about memory moves before it was answered."""

    machine: str = spec(NAME)
    job: str = spec(NAME)
    epoch: int = spec(U64)
    check_only: bool = spec(BOOL)
    regions: tuple[RegionEntry, ...] = spec(List(Struct(RegionEntry), MAX_REGIONS))
    devices: tuple[DeviceEntry, ...] = spec(List(Struct(DeviceEntry), MAX_DEVICES))
    features: tuple[str, ...] = spec(List(NAME, 64))


@dataclass(frozen=True)
class Accept(Message):
    """`token` joins page channels; `versions` are the schema versions the source is to write, by device."""

    token: bytes = spec(DIGEST)
    versions: dict[str, int] = spec(_by_device(U32))
    max_connections: int = spec(U32)


@dataclass(frozen=True)
class Refuse(Message):
    """All reasons against the manifest. Nothing was stopped."""

    reasons: tuple[Reason, ...] = spec(Reasons())


@dataclass(frozen=True)
class Start(Message):
    """Page channels will join; `extents` (gpa, bytes) are where data lies now, for prefaulting."""

    connections: int = spec(U32)
    extents: tuple[tuple[int, ...], ...] = spec(List(List(U64, 2, exactly=True), MAX_LIST))


@dataclass(frozen=True)
class Started(Message):
    """All page channels have joined."""


@dataclass(frozen=True)
class Join(Message):
    """First and only control frame of a page channel."""

    token: bytes = spec(DIGEST)
    index: int = spec(U32)


@dataclass(frozen=True)
class Chunk(Message):
    """Streamed device state, in order."""

    device: str = spec(ID)
    data: bytes = spec(Bytes(MAX_CHUNK + 65536))


@dataclass(frozen=True)
class Round(Message):
    """The source has sent all of round n; every page channel carries MARK n."""

    n: int = spec(U32)
    pages: int = spec(U64)


@dataclass(frozen=True)
class RoundDone(Message):
    """Everything of round n is in the destination's memory."""

    n: int = spec(U32)


@dataclass(frozen=True)
class Rehearse(Message):
    """Blobs of the running devices: would they load? Nothing is applied."""

    blobs: dict[str, bytes] = spec(_by_device(Bytes(MAX_BLOB)))


@dataclass(frozen=True)
class Rehearsed(Message):
    """`load_ns`: by device, how long the check took. `reasons`: why it would fail."""

    load_ns: dict[str, int] = spec(_by_device(U64))
    commit_ns: int = spec(U64)
    reasons: tuple[Reason, ...] = spec(Reasons())


@dataclass(frozen=True)
class State(Message):
    """One device's blob, after the stop."""

    device: str = spec(ID)
    blob: bytes = spec(Bytes(MAX_BLOB))


@dataclass(frozen=True)
class Stopped(Message):
    """All is sent. `channels`: SHA-256 of the last pass's page bytes, by channel in order; `blobs`: SHA-256 by device."""

    n: int = spec(U32)
    pages: int = spec(U64)
    channels: tuple[bytes, ...] = spec(List(DIGEST, 17))
    blobs: dict[str, bytes] = spec(_by_device(DIGEST))


@dataclass(frozen=True)
class Ready(Message):
    """Everything is applied; times are the destination's own intervals, in ns."""

    load_ns: dict[str, int] = spec(_by_device(U64))
    total_ns: int = spec(U64)


@dataclass(frozen=True)
class Reject(Message):
    """The destination cannot go on; the source runs."""

    reasons: tuple[Reason, ...] = spec(Reasons())


@dataclass(frozen=True)
class Verify(Message):
    """SHA-256 of every MiB of memory, and of each device's whole state, while both are stopped."""

    blocks: bytes = spec(Bytes(MAX_CONTROL - 65536))
    devices: dict[str, bytes] = spec(_by_device(DIGEST))


@dataclass(frozen=True)
class Verified(Message):
    """How many blocks differ (the first few named), and the devices whose state differs."""

    differing: int = spec(U64)
    first: tuple[int, ...] = spec(List(U64, 64))
    devices: tuple[str, ...] = spec(List(ID, MAX_DEVICES))


@dataclass(frozen=True)
class Commit(Message):
    """`stopped_ns`: how long the machine has stood still, on the source's clock, when this was sent."""

    job: str = spec(NAME)
    epoch: int = spec(U64)
    stopped_ns: int = spec(U64)
    paused: bool = spec(BOOL)


@dataclass(frozen=True)
class Running(Message):
    """The machine runs here; the parts are the destination's own intervals, in ns."""

    commit_ns: int = spec(U64)
    resume_ns: int = spec(U64)


@dataclass(frozen=True)
class Aborted(Message):
    """Written to the ledger before it is sent: this epoch is never committed here."""

    reasons: tuple[Reason, ...] = spec(Reasons())


@dataclass(frozen=True)
class Abort(Message):
    """The source gives up before COMMIT; it runs."""

    reasons: tuple[Reason, ...] = spec(Reasons())


@dataclass(frozen=True)
class Ask(Message):
    """Who runs the machine? From a source in doubt."""

    machine: str = spec(NAME)
    job: str = spec(NAME)
    epoch: int = spec(U64)
    incarnation: str = spec(NAME)


@dataclass(frozen=True)
class Answer(Message):
    """running, committed (not running yet), aborted, or unknown (another incarnation: a ledger that was wiped)."""

    state: str = spec(Text(16))
    detail: str = spec(TEXT)


@dataclass(frozen=True)
class Ping(Message):
    """Liveness, and the round-trip time."""

    n: int = spec(U64)


@dataclass(frozen=True)
class Pong(Message):
    """The answer to PING n."""

    n: int = spec(U64)


@dataclass(frozen=True)
class Bye(Message):
    """The conversation is over; nothing is expected."""


def encode(message: Message) -> bytes:
    return bytes(msgpack.packb([message.name, plain(message)], use_bin_type=True))


def decode(body: bytes) -> Message:
    """:raises RemoteProtocolError: for anything that is not exactly one known message within its bounds."""
    seen = 0

    def count(container: Sized) -> object:
        nonlocal seen
        seen += 1 + len(container)
        if seen > MAX_ITEMS:
            raise ValueError("too many items")
        return container

    try:
        value = msgpack.unpackb(
            body, max_array_len=MAX_LIST, max_map_len=MAX_DEVICES, max_ext_len=0, ext_hook=_no_extension,
            list_hook=count, object_hook=count,
        )  # fmt: skip
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as error:
        raise bad("encoding", f"cannot be read ({type(error).__name__})") from None
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise bad("shape", "is not [name, fields]")
    kind = REGISTRY.get(value[0])
    if kind is None:
        raise bad("name", f"is unknown: {value[0][:40]!r}")
    message = build(kind, value[1], value[0])
    assert isinstance(message, Message)
    return message


def _no_extension(code: int, _data: bytes) -> object:
    raise ValueError(f"extension type {code}")
