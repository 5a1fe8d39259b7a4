"""The header of a D-Bus message: to bytes and back. No I/O; bodies are library.py's.

Layout: D-Bus specification, "Message Protocol". The library has this too, but takes 22 µs to write and 29 µs to read a small
message, checking what the bus has checked already, and a switchover makes some forty calls while the guest stands still.
The fields of our messages hardly vary, so both directions are remembered: 2 and 1 µs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Final

from migrate.errors import LocalProtocolError, RemoteProtocolError

#: Longest message that we send or take; the private bus allows 64 MiB, and a longer one costs the sender its connection.
MAX_MESSAGE: Final = 63 << 20

#: Bytes of the fixed part; the array of fields follows.
FIXED: Final = 16

NO_REPLY: Final = 1
NO_AUTO_START: Final = 2


class Kind(IntEnum):
    CALL = 1
    RETURN = 2
    ERROR = 3
    SIGNAL = 4


@dataclass(frozen=True, slots=True)
class Fields:
    """The named fields of a header; `unix_fds` is how many descriptors belong to the message."""

    path: str | None = None
    interface: str | None = None
    member: str | None = None
    error_name: str | None = None
    reply_serial: int = 0
    destination: str | None = None
    sender: str | None = None
    signature: str = ""
    unix_fds: int = 0


@dataclass(slots=True)
class Message:
    """A message as it came. `fds` are open descriptors, close-on-exec, owned by whoever holds the message."""

    kind: int
    flags: int
    serial: int
    reply_serial: int
    fields: Fields
    body: bytes
    big_endian: bool
    fds: list[int] = field(default_factory=list)

    def close_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


# Code, type and attribute of every field in the specification's table "Header Fields".
_FIELD_TABLE: Final = (
    (1, "o", "path"),
    (2, "s", "interface"),
    (3, "s", "member"),
    (4, "s", "error_name"),
    (5, "u", "reply_serial"),
    (6, "s", "destination"),
    (7, "s", "sender"),
    (8, "g", "signature"),
    (9, "u", "unix_fds"),
)
_BY_CODE: Final = {code: (kind, name) for code, kind, name in _FIELD_TABLE}
# A field is a struct (aligned to 8) of its code and a variant; this one is exactly 8 bytes long and we write it first.
_REPLY_SERIAL: Final = bytes((5, 1, ord("u"), 0))
# What a field with an unknown code may hold: fixed sizes of the basic types.
_SIZES: Final = {"y": 1, "n": 2, "q": 2, "b": 4, "i": 4, "u": 4, "h": 4, "x": 8, "t": 8, "d": 8}


def encode_header(
    kind: Kind, serial: int, body_length: int, fields: Fields, *, flags: int = 0, reply_serial: int = 0
) -> bytes:
    """The bytes before the body. Raises LocalProtocolError where the whole would be longer than MAX_MESSAGE."""
    encoded = _encode_fields(fields)
    if reply_serial:
        encoded = _REPLY_SERIAL + reply_serial.to_bytes(4, "little") + encoded
    if FIXED + len(encoded) + body_length > MAX_MESSAGE:
        raise LocalProtocolError(
            f"a message of {body_length} bytes is longer than the bus takes ({MAX_MESSAGE} bytes)",
            remedy="pass it in a sealed memfd",
        )
    fixed = struct.pack("<cBBBIII", b"l", kind, flags, 1, body_length, serial, len(encoded))
    return fixed + encoded + bytes(-len(encoded) % 8)


@lru_cache(maxsize=1024)
def _encode_fields(fields: Fields) -> bytes:
    out = bytearray()
    for code, kind, name in _FIELD_TABLE:
        value = getattr(fields, name)
        if not value:
            continue
        out += bytes(-len(out) % 8) + bytes((code, 1, ord(kind), 0))
        if kind == "u":
            out += struct.pack("<I", value)
            continue
        text = value.encode()
        if b"\0" in text or (kind == "g" and len(text) > 255):
            raise LocalProtocolError(f"{value!r} cannot be the {name} of a D-Bus message")
        out += (bytes((len(text),)) if kind == "g" else struct.pack("<I", len(text))) + text + b"\0"
    return bytes(out)


def frame_length(fixed: bytes | bytearray) -> int:
    """The length of the whole message that starts with these FIXED bytes.

    Raises RemoteProtocolError where it is no D-Bus message, or is longer than MAX_MESSAGE: checked before anything of that
    length is allocated.
    """
    order = {ord("l"): "<", ord("B"): ">"}.get(fixed[0])
    if order is None or fixed[3] != 1:
        raise RemoteProtocolError("what came from the bus is not D-Bus, version 1")
    body_length, _serial, fields_length = struct.unpack_from(f"{order}III", fixed, 4)
    length = FIXED + fields_length + (-fields_length % 8) + body_length
    if length > MAX_MESSAGE:
        raise RemoteProtocolError(
            f"the bus announced a message of {length} bytes, {MAX_MESSAGE} is the limit"
        )
    return int(length)


def decode(frame: bytes) -> Message:
    """The message in a frame of exactly frame_length() bytes; its descriptors are still to be added (fields.unix_fds).

    Raises RemoteProtocolError where the header does not follow the specification.
    """
    big_endian = frame[0] == ord("B")
    order = ">" if big_endian else "<"
    kind, flags, _version, _body, serial, length = struct.unpack_from(f"{order}BBBIII", frame, 1)
    start, end = FIXED, FIXED + length
    reply_serial = 0
    # The serial that a reply answers differs in each; the rest of its fields does not, and is looked up.
    if length >= 8 and frame[start : start + 4] == _REPLY_SERIAL:
        (reply_serial,) = struct.unpack_from(f"{order}I", frame, start + 4)
        start += 8
    encoded = frame[start:end]
    fields = (
        _decode_known(encoded, big_endian) if len(encoded) <= 1024 else _decode_fields(encoded, big_endian)
    )
    return Message(
        kind,
        flags,
        serial,
        reply_serial or fields.reply_serial,
        fields,
        frame[end + (-length % 8) :],
        big_endian,
    )


def _decode_fields(encoded: bytes, big_endian: bool) -> Fields:
    order = ">" if big_endian else "<"
    found: dict[str, str | int] = {}
    at, end = 0, len(encoded)
    try:
        while at < end:
            at += -at % 8
            code, length = encoded[at], encoded[at + 1]
            kind = encoded[at + 2 : at + 2 + length].decode()
            at += 3 + length
            size = _SIZES.get(kind)
            value: str | int
            if size is not None:
                at += -at % size
                value = int.from_bytes(encoded[at : at + size], "big" if big_endian else "little")
            elif kind in ("s", "o"):
                at += -at % 4
                (size,) = struct.unpack_from(f"{order}I", encoded, at)
                at += 4
                value = encoded[at : at + size].decode()
                size += 1
            elif kind == "g":
                size = encoded[at]
                at += 1
                value = encoded[at : at + size].decode()
                size += 1
            else:
                raise ValueError(f"a field of type {kind}")
            at += size
            if at > end:
                raise ValueError("a field longer than the header")
            wanted = _BY_CODE.get(code)
            if wanted is not None:
                if wanted[0] != kind:
                    raise ValueError(f"a field {code} of type {kind}")
                found[wanted[1]] = value
    except (ValueError, IndexError, struct.error) as error:
        raise RemoteProtocolError("the header of a message from the bus is damaged") from error
    return Fields(**found)  # type: ignore[arg-type]  # the table has checked each type


_decode_known = lru_cache(maxsize=1024)(_decode_fields)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
