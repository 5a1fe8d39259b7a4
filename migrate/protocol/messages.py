"""Control messages: what they carry, their bounds, and their bytes. Sans-IO.

A message is a MessagePack array `[name, fields]` in a CONTROL frame. Each class states its fields with a bounded check; a field
that is missing, unknown, of the wrong type or out of bounds is a RemoteProtocolError that names it. docs/protocol.md's table
of messages is checked against this file by a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import msgpack

from migrate.errors import Phase, Reason, RemoteProtocolError
from migrate.protocol.frames import MAX_CONTROL

PROTOCOL_VERSION = 1
MAX_DEVICES = 256
MAX_REGIONS = 64
MAX_BLOB = 16 << 20
MAX_CHUNK = 4 << 20

Check = Callable[[object, str], object]


def _bad(where: str, why: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"the peer sent a message whose {where} {why}",
        phase=Phase.PREFLIGHT,
        remedy="check that both hosts run versions of vmferry that talk to each other",
    )


def _int(limit: int) -> Check:
    def check(value: object, where: str) -> object:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
            raise _bad(where, f"is not an integer from 0 to {limit - 1}")
        return value

    return check


def _text(limit: int) -> Check:
    def check(value: object, where: str) -> object:
        if not isinstance(value, str) or len(value) > limit:
            raise _bad(where, f"is not a text of at most {limit} characters")
        return value

    return check


def _bytes(limit: int, exactly: int | None = None) -> Check:
    def check(value: object, where: str) -> object:
        if (
            not isinstance(value, bytes)
            or len(value) > limit
            or (exactly is not None and len(value) != exactly)
        ):
            raise _bad(where, f"is not {exactly if exactly is not None else f'at most {limit}'} bytes")
        return value

    return check


def _bool(value: object, where: str) -> object:
    if not isinstance(value, bool):
        raise _bad(where, "is not true or false")
    return value


def _list(item: Check, limit: int) -> Check:
    def check(value: object, where: str) -> object:
        if not isinstance(value, list | tuple) or len(value) > limit:
            raise _bad(where, f"is not a list of at most {limit}")
        return tuple(item(entry, f"{where}[{index}]") for index, entry in enumerate(value))

    return check


def _map(item: Check, limit: int = MAX_DEVICES) -> Check:
    def check(value: object, where: str) -> object:
        if not isinstance(value, Mapping) or len(value) > limit:
            raise _bad(where, f"is not a map of at most {limit}")
        return {str(ID(key, where)): item(entry, f"{where}.{key}") for key, entry in value.items()}

    return check


def _struct(kind: Callable[[], type[Any]]) -> Check:
    def check(value: object, where: str) -> object:
        if isinstance(value, kind()):
            return value
        return _build(kind(), value, where)

    return check


def _reasons(value: object, where: str) -> object:
    if not isinstance(value, list | tuple) or len(value) > 1024:
        raise _bad(where, "is not a list of at most 1024 reasons")
    return tuple(entry if isinstance(entry, Reason) else Reason.from_wire(entry) for entry in value)


U32, U64 = _int(1 << 32), _int(1 << 64)
ID, NAME, TEXT, DIGEST = _text(255), _text(255), _text(2000), _bytes(32, 32)


def spec(check: Check, **kwargs: Any) -> Any:
    return field(metadata={"check": check}, **kwargs)


def _build(kind: type[Any], value: object, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _bad(where, "is not a map")
    wanted = {item.name: item for item in fields(kind)}
    for key in value:
        if key not in wanted:
            raise _bad(where, f"has an unknown field {str(key)[:40]!r}")
    made = {}
    for name, item in wanted.items():
        if name not in value:
            raise _bad(where, f"lacks the field {name!r}")
        made[name] = item.metadata["check"](value[name], f"{where}.{name}")
    return kind(**made)


def _plain(value: object) -> object:
    """The value as MessagePack writes it."""
    if isinstance(value, Reason):
        return value.to_wire()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}  # type: ignore[arg-type]
    return value


@dataclass(frozen=True, slots=True)
class RegionEntry:
    gpa: int = spec(U64)
    size: int = spec(U64)


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One participant in the manifest. `options` are the guest-visible ones; no path travels in them."""

    id: str = spec(ID)
    type: str = spec(NAME)
    protocol: str = spec(NAME)
    versions: tuple[int, ...] = spec(_list(U32, 64))
    digest: bytes = spec(_bytes(32))
    tracker: str = spec(NAME)
    opaque: bool = spec(_bool)
    gpa: int = spec(U64)
    irq: int = spec(U32)
    options: dict[str, str] = spec(_map(_text(1000), 64))


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

    versions: tuple[int, ...] = spec(_list(U32, 64))
    software: str = spec(NAME)
    host: str = spec(NAME)
    incarnation: str = spec(NAME)


@dataclass(frozen=True)
class Manifest(Message):
    """What is to be moved. Nothing about memory moves before it was answered."""

    machine: str = spec(NAME)
    job: str = spec(NAME)
    epoch: int = spec(U64)
    check_only: bool = spec(_bool)
    regions: tuple[RegionEntry, ...] = spec(_list(_struct(lambda: RegionEntry), MAX_REGIONS))
    devices: tuple[DeviceEntry, ...] = spec(_list(_struct(lambda: DeviceEntry), MAX_DEVICES))
    features: tuple[str, ...] = spec(_list(NAME, 64))


@dataclass(frozen=True)
class Accept(Message):
    """`token` joins page channels; `versions` are the schema versions the source is to write, by device."""

    token: bytes = spec(DIGEST)
    versions: dict[str, int] = spec(_map(U32))
    max_connections: int = spec(U32)


@dataclass(frozen=True)
class Refuse(Message):
    reasons: tuple[Reason, ...] = spec(_reasons)


@dataclass(frozen=True)
class Start(Message):
    """Page channels will join; `extents` (gpa, bytes) are where data lies now, for prefaulting."""

    connections: int = spec(U32)
    extents: tuple[tuple[int, ...], ...] = spec(_list(_list(U64, 2), 4096))


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
    data: bytes = spec(_bytes(MAX_CHUNK + 65536))


@dataclass(frozen=True)
class Round(Message):
    """The source has sent all of round n; every page channel carries MARK n."""

    n: int = spec(U32)
    pages: int = spec(U64)


@dataclass(frozen=True)
class RoundDone(Message):
    n: int = spec(U32)


@dataclass(frozen=True)
class Rehearse(Message):
    """Blobs of the running devices: would they load? Nothing is applied."""

    blobs: dict[str, bytes] = spec(_map(_bytes(MAX_BLOB)))


@dataclass(frozen=True)
class Rehearsed(Message):
    """`load_ns`: by device, how long the check took. `reasons`: why it would fail."""

    load_ns: dict[str, int] = spec(_map(U64))
    commit_ns: int = spec(U64)
    reasons: tuple[Reason, ...] = spec(_reasons)


@dataclass(frozen=True)
class State(Message):
    """One device's blob, after the stop."""

    device: str = spec(ID)
    blob: bytes = spec(_bytes(MAX_BLOB))


@dataclass(frozen=True)
class Stopped(Message):
    """All is sent. `channels`: SHA-256 of the last pass's page bytes, by channel in order; `blobs`: SHA-256 by device."""

    n: int = spec(U32)
    pages: int = spec(U64)
    channels: tuple[bytes, ...] = spec(_list(DIGEST, 17))
    blobs: dict[str, bytes] = spec(_map(DIGEST))


@dataclass(frozen=True)
class Ready(Message):
    """Everything is applied; times are the destination's own intervals, in ns."""

    load_ns: dict[str, int] = spec(_map(U64))
    total_ns: int = spec(U64)


@dataclass(frozen=True)
class Reject(Message):
    """The destination cannot go on; the source runs."""

    reasons: tuple[Reason, ...] = spec(_reasons)


@dataclass(frozen=True)
class Verify(Message):
    """SHA-256 of every MiB of memory, and of each device's whole state, while both are stopped."""

    blocks: bytes = spec(_bytes(MAX_CONTROL - 65536))
    devices: dict[str, bytes] = spec(_map(DIGEST))


@dataclass(frozen=True)
class Verified(Message):
    """How many blocks differ (the first few named), and the devices whose state differs."""

    differing: int = spec(U64)
    first: tuple[int, ...] = spec(_list(U64, 64))
    devices: tuple[str, ...] = spec(_list(ID, MAX_DEVICES))


@dataclass(frozen=True)
class Commit(Message):
    """`stopped_ns`: how long the machine has stood still, on the source's clock, when this was sent."""

    job: str = spec(NAME)
    epoch: int = spec(U64)
    stopped_ns: int = spec(U64)
    paused: bool = spec(_bool)


@dataclass(frozen=True)
class Running(Message):
    """The machine runs here; the parts are the destination's own intervals, in ns."""

    commit_ns: int = spec(U64)
    resume_ns: int = spec(U64)


@dataclass(frozen=True)
class Aborted(Message):
    """Written to the ledger before it is sent: this epoch is never committed here."""

    reasons: tuple[Reason, ...] = spec(_reasons)


@dataclass(frozen=True)
class Abort(Message):
    """The source gives up before COMMIT; it runs."""

    reasons: tuple[Reason, ...] = spec(_reasons)


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

    state: str = spec(_text(16))
    detail: str = spec(TEXT)


@dataclass(frozen=True)
class Ping(Message):
    """Liveness, and the round-trip time."""

    n: int = spec(U64)


@dataclass(frozen=True)
class Pong(Message):
    n: int = spec(U64)


@dataclass(frozen=True)
class Bye(Message):
    """The conversation is over; nothing is expected."""


def encode(message: Message) -> bytes:
    return bytes(msgpack.packb([message.name, _plain(message)], use_bin_type=True))


def decode(body: bytes) -> Message:
    """:raises RemoteProtocolError: for anything that is not exactly one known message within its bounds."""
    try:
        value = msgpack.unpackb(body, raw=False, strict_map_key=True, use_list=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as error:
        raise _bad("encoding", f"cannot be read ({type(error).__name__})") from None
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise _bad("shape", "is not [name, fields]")
    kind = REGISTRY.get(value[0])
    if kind is None:
        raise _bad("name", f"is unknown: {value[0][:40]!r}")
    message = _build(kind, value[1], value[0])
    assert isinstance(message, Message)
    return message
