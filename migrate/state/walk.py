"""Every byte of a blob explained: where each value lies, what it is called, what it means. For people who look inside; devices load
by `blob.read`, which is faster and stricter.

The walk reads heads itself, because msgpack does not say where things lie, and it reads what is damaged or cut off as far as it
goes: it ends with a part that says where and why. It judges nothing else; whether a blob is right is told by `blob.read`. The
parts of a blob that are no `damage` cover it byte for byte, without gap or overlap.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from migrate.state.blob import MAGIC
from migrate.state.kinds import Field, Kind, List, Struct
from migrate.state.schema import SchemaVersion

#: Levels of lists and maps in each other; no schema has more.
MAX_DEPTH: Final = 32
#: What is not as long as this is no name of a field.
_MAX_NAME: Final = 64


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes that belong together. Values of bytes are views into the data; nothing is copied."""

    offset: int
    length: int
    path: str  #: `.rx_fifo`, `.queues[2].size`; of the envelope `envelope.magic` and so on
    depth: int
    what: str  #: integer, bool, bytes, string, map, list, name, nil, envelope, checksum, damage
    value: object  #: of a map or list the number of its items; of damage, why
    unit: str = ""
    doc: str = ""

    @property
    def is_value(self) -> bool:
        """Something that the state says, and not how it is written."""
        return self.what in ("integer", "bool", "bytes", "string", "nil")


class _Stop(Exception):
    """The bytes make no sense from here on."""

    def __init__(self, at: int, why: str) -> None:
        self.at, self.why = at, why


#: The fixed part of the envelope: name, bytes, what it is.
_ENVELOPE: Final = (
    ("magic", 8, "begins every blob"),
    ("version", 2, "of the envelope"),
    ("type_size", 1, "bytes of the device type"),
    ("instance_size", 1, "bytes of the instance"),
    ("schema_version", 4, "of the device type's schema"),
    ("schema_digest", 32, "SHA-256 of the schema version's definition"),
    ("payload_size", 4, "bytes of the state"),
    ("reserved", 4, "0"),
)


def walk(data: bytes | memoryview, version: SchemaVersion | None) -> Iterator[Part]:
    """All parts, in the order of their offsets.

    :param version: what the names and meanings are taken from; without it they are shown as they stand in the blob.
    """
    view = memoryview(data)
    at = 0
    found: dict[str, int] = {}
    for name, size, doc in _ENVELOPE:
        piece = view[at : at + size]
        if len(piece) < size or (name == "magic" and bytes(piece) != MAGIC):
            why = "this is no vmferry state blob" if name == "magic" else f"the blob ends within its {name}"
            yield _damage(at, len(view), why)
            return
        if size <= 4:
            found[name] = int.from_bytes(piece, "big")
        yield Part(at, size, f"envelope.{name}", 0, "envelope", found.get(name, piece), doc=doc)
        at += size
    for name, size, doc in (
        ("type", found["type_size"], "the device type"),
        ("instance", found["instance_size"], "the device's Id"),
    ):
        if at + size > len(view):
            yield _damage(at, len(view), f"the blob ends within its {name}")
            return
        text = str(view[at : at + size], "utf-8", "replace")
        yield Part(at, size, f"envelope.{name}", 0, "envelope", text, doc=doc)
        at += size
    size = found["payload_size"]
    yield from _payload(view, at, at + size, version)
    if (at := at + size) >= len(view):
        if at == len(view):
            yield _damage(at, at, "the blob ends before its checksum")
        return
    yield from _checksum(view, at)


def _payload(view: memoryview, at: int, end: int, version: SchemaVersion | None) -> Iterator[Part]:
    last = min(end, len(view))
    reader = _Reader(view, at, last)
    try:
        yield from reader.value("", 0, version.struct if version is not None else None, None)
    except _Stop as stop:
        why = f"{stop.why}: the blob was cut off" if end > len(view) else stop.why
        yield _damage(stop.at, last, why)
        return
    if reader.at < last:
        yield _damage(reader.at, last, "bytes that belong to no value follow the state")
    elif end > len(view):
        yield _damage(last, last, "the blob was cut off")


def _checksum(view: memoryview, at: int) -> Iterator[Part]:
    piece = view[at : at + 4]
    if len(piece) < 4:
        yield _damage(at, len(view), "the blob ends within its checksum")
        return
    said, right = int.from_bytes(piece, "big"), zlib.crc32(view[:at])
    doc = (
        "CRC-32 of all before it: right"
        if said == right
        else f"CRC-32 of all before it: WRONG, it is {right:#010x}"
    )
    yield Part(at, 4, "checksum", 0, "checksum", said, doc=doc)
    if at + 4 < len(view):
        yield _damage(at + 4, len(view), "bytes that belong to no blob follow")


def _damage(at: int, end: int, why: str) -> Part:
    return Part(at, end - at, "", 0, "damage", why)


#: MessagePack heads: first byte → what it is, bytes of the number that follows, and how that is read.
_HEADS: Final = {
    0xC0: ("nil", 0, ""), 0xC2: ("false", 0, ""), 0xC3: ("true", 0, ""),
    0xC4: ("bytes", 1, ">B"), 0xC5: ("bytes", 2, ">H"), 0xC6: ("bytes", 4, ">I"),
    0xCC: ("integer", 1, ">B"), 0xCD: ("integer", 2, ">H"), 0xCE: ("integer", 4, ">I"), 0xCF: ("integer", 8, ">Q"),
    0xD0: ("integer", 1, ">b"), 0xD1: ("integer", 2, ">h"), 0xD2: ("integer", 4, ">i"), 0xD3: ("integer", 8, ">q"),
    0xD9: ("string", 1, ">B"), 0xDA: ("string", 2, ">H"), 0xDB: ("string", 4, ">I"),
    0xDC: ("list", 2, ">H"), 0xDD: ("list", 4, ">I"), 0xDE: ("map", 2, ">H"), 0xDF: ("map", 4, ">I"),
}  # fmt: skip


class _Reader:
    """One pass over MessagePack. :ivar at: how far it has come."""

    def __init__(self, view: memoryview, at: int, end: int) -> None:
        self._view, self.at, self._end = view, at, end

    def value(self, path: str, depth: int, kind: Kind | None, field: Field | None) -> Iterator[Part]:
        begin = self.at
        what, number = self._head()
        unit, doc = (field.unit, field.doc) if field is not None else ("", "")
        if what in ("bytes", "string"):
            content = self._take(begin, number)
            value: object = content if what == "bytes" else str(content, "utf-8", "replace")
            yield Part(begin, self.at - begin, path, depth, what, value, unit, doc)
        elif what in ("map", "list"):
            if depth >= MAX_DEPTH:
                raise _Stop(begin, f"more than {MAX_DEPTH} lists and maps in each other")
            yield Part(begin, self.at - begin, path, depth, what, number, unit, doc)
            yield from self._items(what, number, path, depth + 1, kind)
        elif what in ("true", "false"):
            yield Part(begin, self.at - begin, path, depth, "bool", what == "true", unit, doc)
        else:
            yield Part(
                begin, self.at - begin, path, depth, what, number if what == "integer" else None, unit, doc
            )

    def _items(self, what: str, count: int, path: str, depth: int, kind: Kind | None) -> Iterator[Part]:
        if what == "list":
            item = kind.item if isinstance(kind, List) else None
            for number in range(count):
                yield from self.value(f"{path}[{number}]", depth, item, None)
            return
        fields = {entry.name: entry for entry in kind.fields} if isinstance(kind, Struct) else {}
        for _ in range(count):
            begin = self.at
            is_name, size = self._head()
            if is_name != "string" or size > _MAX_NAME:
                raise _Stop(begin, "there is no name of a field")
            name = str(self._take(begin, size), "utf-8", "replace")
            yield Part(begin, self.at - begin, f"{path}.{name}", depth, "name", name)
            entry = fields.get(name)
            yield from self.value(f"{path}.{name}", depth, entry.kind if entry else None, entry)

    def _take(self, begin: int, size: int) -> memoryview:
        if size > self._end - self.at:
            raise _Stop(begin, f"a value of {size} bytes, of which {self._end - self.at} are there")
        self.at += size
        return self._view[self.at - size : self.at]

    def _head(self) -> tuple[str, int]:
        """What follows, and its number: a value, a length or a count."""
        begin = self.at
        if begin >= self._end:
            raise _Stop(begin, "a value is missing")
        byte = self._view[begin]
        self.at += 1
        if byte < 0x80:
            return "integer", byte
        if byte >= 0xE0:
            return "integer", byte - 0x100
        if byte < 0x90:
            return "map", byte & 0x0F
        if byte < 0xA0:
            return "list", byte & 0x0F
        if byte < 0xC0:
            return "string", byte & 0x1F
        if byte not in _HEADS:
            self.at = begin
            raise _Stop(begin, f"no state has a value that begins with {byte:#04x}")
        what, size, form = _HEADS[byte]
        if size > self._end - self.at:
            self.at = begin
            raise _Stop(begin, "the head of a value is cut off")
        self.at += size
        return what, struct.unpack(form, self._view[self.at - size : self.at])[0] if size else 0
