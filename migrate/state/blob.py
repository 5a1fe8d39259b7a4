"""The envelope around a device's state: what it is, for which device, in which version, and whether it is whole.

The envelope is outside the codec of the state and stays readable for ever. All integers are big-endian:

| offset    | bytes | what                                                         |
|-----------|-------|--------------------------------------------------------------|
| 0         | 8     | magic: 89 56 4D 46 42 0D 0A 1A                               |
| 8         | 2     | version of the envelope: 1                                   |
| 10        | 1     | T, bytes of the device type: 1 to 64                         |
| 11        | 1     | I, bytes of the instance: 1 to 255                           |
| 12        | 4     | schema version, from 1                                       |
| 16        | 32    | schema digest: SHA-256 of the version's definition           |
| 48        | 4     | P, bytes of the payload: at most 16777216                    |
| 52        | 4     | reserved: 0                                                  |
| 56        | T     | device type, ASCII                                           |
| 56+T      | I     | instance (the device's Id), UTF-8, printable                 |
| 56+T+I    | P     | payload: the state in canonical MessagePack                  |
| 56+T+I+P  | 4     | CRC-32 (zlib) of everything before it                        |

Every later envelope keeps the first 56 bytes, the device type and the instance where they are, so that a program that is too old
can still say what it has been given. The magic has a byte above 127 and line ends in it: a copy through a text tool is
noticed. The checksum finds damage, not malice: a snapshot at rest is sealed and signed elsewhere.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from migrate.errors import BlobError, Phase
from migrate.state.schema import MAX_PAYLOAD, TYPE_NAME, Schema, SchemaVersion

MAGIC: Final = b"\x89VMFB\r\n\x1a"
ENVELOPE_VERSION: Final = 1

_FIXED: Final = struct.Struct(">8sHBBI32sII")
_CHECKSUM: Final = struct.Struct(">I")

_DAMAGED: Final = "it is damaged: get it again"

#: The most bytes that a blob can have.
MAX_BLOB: Final = _FIXED.size + 64 + 255 + MAX_PAYLOAD + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class Header:
    """All of a blob but its payload."""

    type: str
    instance: str  #: the device's Id
    version: int  #: of the schema
    digest: bytes  #: of the schema version's definition
    payload_at: int  #: offset of the payload
    payload_size: int  #: in bytes

    @property
    def size(self) -> int:
        """Of the whole blob, in bytes, with its checksum."""
        return self.payload_at + self.payload_size + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class Blob:
    type: str
    instance: str  #: the device's Id
    version: int  #: of the schema
    digest: bytes  #: of the schema version's definition
    payload: bytes


def pack(blob: Blob) -> bytes:
    """The envelope with its payload.

    :raise BlobError: if a part does not fit its place.
    """
    kind, instance = blob.type.encode("utf-8", "replace"), blob.instance.encode("utf-8", "replace")
    wrong = ""
    if not TYPE_NAME.fullmatch(blob.type):
        wrong = f"{blob.type[:64]!r} is no name of a device type"
    elif not _is_instance(blob.instance):
        wrong = f"{blob.instance[:64]!r} is no Id of a device: 1 to 255 bytes of printable UTF-8"
    elif not 1 <= blob.version < 2**32 or len(blob.digest) != 32:
        wrong = f"schema version {blob.version} with a digest of {len(blob.digest)} bytes is none"
    elif len(blob.payload) > MAX_PAYLOAD:
        wrong = f"a payload of {len(blob.payload)} bytes is over {MAX_PAYLOAD}"
    if wrong:
        raise BlobError(wrong, remedy="this is a mistake in the program that saves", phase=Phase.SAVE)
    head = _FIXED.pack(
        MAGIC, ENVELOPE_VERSION, len(kind), len(instance), blob.version, blob.digest, len(blob.payload), 0
    )
    parts = (head, kind, instance, blob.payload)
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join((*parts, _CHECKSUM.pack(checksum)))


def header_of(data: bytes) -> Header:
    """What the first bytes of a blob say about it; the payload need not be there, and the checksum is not looked at.

    :raise BlobError: if this is no blob, an envelope of a later version, or the header is not all there.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise _bad(
            "this is no vmferry state blob: it does not begin like one", "give a file that vmferry wrote"
        )
    short = _bad(f"the blob ends after {len(data)} bytes, inside its header", "it was cut off: get it again")
    if len(data) < _FIXED.size:
        raise short
    _, envelope, type_size, instance_size, version, digest, size, reserved = _FIXED.unpack_from(data)
    payload_at = _FIXED.size + type_size + instance_size
    if len(data) < payload_at:
        raise short
    names = bytes(data[_FIXED.size : payload_at])
    try:
        kind, instance = names[:type_size].decode(), names[type_size:].decode()
    except UnicodeDecodeError:
        raise _bad("the blob's device type or Id is not UTF-8", _DAMAGED) from None
    if not TYPE_NAME.fullmatch(kind) or not _is_instance(instance):
        raise _bad("the blob's device type is no name, or its Id is empty or not printable", _DAMAGED)
    if envelope != ENVELOPE_VERSION:
        raise _bad(
            f"the blob ({kind}, schema version {version}) has envelope version {envelope}; "
            f"this program reads {ENVELOPE_VERSION}",
            "use a newer vmferry",
            instance,
        )
    if version == 0 or reserved != 0:
        raise _bad(
            f"the blob's header has schema version {version} and reserved value {reserved}",
            _DAMAGED,
            instance,
        )
    if size > MAX_PAYLOAD:
        raise _bad(
            f"the blob claims a payload of {size} bytes; {MAX_PAYLOAD} is the most", _DAMAGED, instance
        )
    return Header(kind, instance, version, digest, payload_at, size)


def unpack(data: bytes) -> Blob:
    """A whole blob, neither a byte less nor more, its checksum right. The payload is not decoded.

    :raise BlobError: for anything else.
    """
    header = header_of(data)
    if len(data) != header.size:
        word = "ends after" if len(data) < header.size else "has"
        raise _bad(
            f"the blob {word} {len(data)} bytes, and its header says {header.size}",
            "it was cut off or joined with something else: get it again",
            header.instance,
        )
    checksum_at = header.size - _CHECKSUM.size
    body = memoryview(data)[:checksum_at]
    (said,) = _CHECKSUM.unpack_from(data, checksum_at)
    if zlib.crc32(body) != said:
        raise _bad("the blob's checksum is wrong", _DAMAGED, header.instance)
    payload = bytes(body[header.payload_at :])
    return Blob(header.type, header.instance, header.version, header.digest, payload)


def write(version: SchemaVersion, instance: str, values: Mapping[str, object]) -> bytes:
    """A device's state as a blob.

    :raise BlobError: if a value does not fit the schema, or the Id its place.
    """
    return pack(Blob(version.type, instance, version.version, version.digest, version.encode(values)))


def read(data: bytes, schema: Schema) -> tuple[SchemaVersion, dict[str, object]]:
    """The state in a blob, and the version it is written in.

    :raise BlobError: if it is damaged, of another type, of a version or definition not known here, or does not fit it.
    """
    blob = unpack(data)
    if blob.type != schema.type:
        wanted = f"give it to a device of type {blob.type}, or get the blob of this one"
        raise _bad(f"the blob is the state of a {blob.type}, not of a {schema.type}", wanted, blob.instance)
    if blob.version not in schema.versions:
        known = ", ".join(map(str, schema.versions))
        raise _bad(
            f"the blob is {blob.type} version {blob.version}; known here: {known}",
            "have it written in one of these, or use a newer vmferry",
            blob.instance,
        )
    version = schema.at(blob.version)
    if blob.digest != version.digest:
        raise _bad(
            f"{blob.type} version {blob.version} is defined otherwise where the blob was written "
            f"(digest {blob.digest.hex()[:16]}) than here ({version.digest.hex()[:16]})",
            "one of the two has changed a version that was released; restore that schema file",
            blob.instance,
        )
    try:
        return version, version.decode(blob.payload)
    except BlobError as error:
        error.device = blob.instance
        raise


def _is_instance(name: str) -> bool:
    """Printable, because Ids are shown on terminals; that also excludes half surrogate pairs."""
    return name.isprintable() and 1 <= len(name.encode("utf-8", "replace")) <= 255


def _bad(reason: str, remedy: str, device: str | None = None) -> BlobError:
    return BlobError(reason, remedy=remedy, phase=Phase.LOAD, device=device)
