"""A migration stream of QEMU: its sections, its memory in sum, and the blobs of our devices in its dbus-vmstate section.

The layout was read off streams of QEMU 7.2 and is in docs/qemu-stream.md. A stream has no lengths: where a device's section ends
follows from the description (JSON) behind the stream's end. Memory and dbus-vmstate have layouts of their own and are read without
it, so a stream that was cut off is read as far as its memory and what stands before the first other device.

`read` never raises for what is wrong with a stream: it says where it stopped, and why. Pages are passed over and never kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

MAGIC: Final = b"QEVM"
VERSION: Final = 3
DBUS_VMSTATE: Final = "dbus-vmstate/dbus-vmstate"

_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _VMDESC, _CONFIGURATION, _COMMAND, _FOOTER = (
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x7E,
)  # fmt: skip
_KINDS: Final = {_START: "start", _PART: "part", _END: "end", _FULL: "full"}

#: Flags in the low bits of a page's address (QEMU 7.2, migration/ram.c).
_ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE, _XBZRLE, _HOOK, _COMPRESSED = (
    0x02,
    0x04,
    0x08,
    0x10,
    0x20,
    0x40,
    0x80,
    0x100,
)
_PAGE_SIZE: Final = 4096

#: What a hostile stream may make us keep.
MAX_SECTIONS: Final = 100_000
MAX_BLOCKS: Final = 1024
MAX_HELPERS: Final = 1024
MAX_HELPER: Final = 1 << 20
MAX_VMDESC: Final = 16 << 20
_MAX_FIELDS: Final = 200_000
_MAX_DEPTH: Final = 32
#: The description follows the end of the stream, so it is looked for in the last bytes of it.
_TAIL: Final = MAX_VMDESC + (1 << 10)


@dataclass(frozen=True, slots=True)
class Section:
    kind: str  #: start, part, end or full; configuration, command, end of stream, or description (with the end before it)
    section_id: int
    name: str
    instance: int
    version: int
    offset: int
    size: int  #: with its head and its footer


@dataclass(slots=True)
class RamSummary:
    blocks: list[tuple[str, int]] = field(default_factory=list)  #: name and bytes
    pages_zero: int = 0
    pages_full: int = 0
    bytes: int = 0  #: of full pages


@dataclass(frozen=True, slots=True)
class Helper:
    id: str
    offset: int  #: of its data in the stream
    data: bytes


@dataclass(slots=True)
class StreamSummary:
    machine: str | None = None
    sections: list[Section] = field(default_factory=list)
    ram: RamSummary | None = None
    vmdesc: dict[str, Any] | None = None
    helpers: list[Helper] = field(default_factory=list)
    stopped_at: int = 0
    complaint: str | None = None  #: why it stopped there; None: the stream was read to its end


class _Stop(Exception):
    """It makes no sense from here on."""


def is_stream(head: bytes) -> bool:
    return head[: len(MAGIC)] == MAGIC


def read(file: BinaryIO) -> StreamSummary:
    """:param file: seekable, at the beginning of the stream."""
    found = StreamSummary()
    reader = _Reader(file)
    try:
        found.vmdesc = _description(file)
        reader.back(0)
        _Stream(reader, found).read()
    except (_Stop, OSError) as stop:
        found.complaint = str(stop) or type(stop).__name__
    found.stopped_at = reader.at
    return found


class _Reader:
    """Big-endian numbers and counted bytes. :ivar at: offset of what is read next; where it stopped, of what could not be read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.at = 0
        self._end = file.seek(0, 2)
        file.seek(0)

    @property
    def left(self) -> int:
        return self._end - self.at

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise _Stop(f"the stream ends within {what}")
        data = self._file.read(size)
        self.at += len(data)
        return data

    def skip(self, size: int, what: str) -> None:
        if size > self.left:
            raise _Stop(f"the stream ends within {what}")
        self.at = self._file.seek(self.at + size)

    def back(self, at: int) -> None:
        self.at = self._file.seek(at)

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "big")

    def text(self, what: str) -> str:
        return self.take(self.number(1, what), what).decode("utf-8", "replace")


def _description(file: BinaryIO) -> dict[str, Any] | None:
    """The JSON behind the end: `00 06 length {…}`, the last thing in the stream. None where there is none that can be used."""
    end = file.seek(0, 2)
    start = max(0, end - _TAIL)
    file.seek(start)
    tail = file.read(end - start)
    at = len(tail)
    while (at := tail.rfind(b"\x00\x06", 0, at)) >= 0:
        size = int.from_bytes(tail[at + 2 : at + 6], "big")
        if at + 6 + size == len(tail) and tail[at + 6 : at + 7] == b"{":
            try:
                found = json.loads(tail[at + 6 :])
            except (ValueError, RecursionError):
                return None
            return found if isinstance(found, dict) else None
    return None


class _Stream:
    """One pass over a stream, with what is found."""

    def __init__(self, reader: _Reader, found: StreamSummary) -> None:
        self._in, self._found = reader, found
        self._names: dict[int, tuple[str, int, int]] = {}
        self._block = ""
        page_size = (found.vmdesc or {}).get("page_size")
        self._page = (
            page_size
            if isinstance(page_size, int) and page_size in (4096, 8192, 16384, 65536)
            else _PAGE_SIZE
        )
        self._devices = dict(_devices(found.vmdesc))

    def read(self) -> None:
        if self._in.take(4, "its head") != MAGIC:
            self._in.back(0)
            raise _Stop("this is no migration stream of QEMU")
        version = self._in.number(4, "its head")
        if version != VERSION:
            raise _Stop(f"the stream has version {version}; this program reads {VERSION}")
        while True:
            begin = self._in.at
            try:
                if self._one(begin):
                    return
            except _Stop:
                if not self._found.sections or self._found.sections[-1].offset != begin:
                    self._in.back(begin)
                raise

    def _one(self, begin: int) -> bool:
        """One section. True: it was the end."""
        if len(self._found.sections) >= MAX_SECTIONS:
            raise _Stop(f"more than {MAX_SECTIONS} sections")
        kind = self._in.number(1, "the type of a section")
        if kind == _EOF:
            self._end(begin)
            return True
        if kind == _CONFIGURATION:
            self._found.machine = self._in.take(
                self._length(4, 256, "the machine's name"), "the machine's name"
            ).decode("utf-8", "replace")
            while self._peek() == _SUBSECTION:
                self._subsection_of_configuration()
            self._add("configuration", 0, "configuration", 0, 0, begin)
        elif kind == _COMMAND:
            number = self._in.number(2, "a command")
            self._in.skip(self._in.number(2, "a command"), "a command")
            self._add("command", number, "command", 0, 0, begin)
        elif kind in _KINDS:
            self._section(_KINDS[kind], kind in (_START, _FULL), begin)
        else:
            self._in.back(begin)
            raise _Stop(f"no section has the type {kind:#04x}")
        return False

    def _add(self, kind: str, section_id: int, name: str, instance: int, version: int, begin: int) -> None:
        self._found.sections.append(
            Section(kind, section_id, name, instance, version, begin, self._in.at - begin)
        )

    def _length(self, size: int, most: int, what: str) -> int:
        length = self._in.number(size, what)
        if length > most:
            raise _Stop(f"{what} claims {length} bytes; {most} is the most")
        return length

    def _peek(self) -> int:
        at = self._in.at
        if not self._in.left:
            return -1
        byte = self._in.number(1, "a section")
        self._in.back(at)
        return byte

    def _subsection_of_configuration(self) -> None:
        self._in.number(1, "a subsection")
        name = self._in.text("the name of a subsection")
        self._in.number(4, "a subsection")
        if name == "configuration/target-page-bits":
            self._in.number(4, name)
        elif name == "configuration/capabilities":
            for _ in range(self._length(4, 256, name)):
                self._in.text(name)
        elif name == "configuration/uuid":
            self._in.take(16, name)
        else:
            raise _Stop(f"the layout of the subsection {name[:80]!r} is not known")

    # -- sections --------------------------------------------------------------------------------------------------------------

    def _section(self, kind: str, named: bool, begin: int) -> None:
        section_id = self._in.number(4, "a section")
        if named:
            name = self._in.text("the name of a section")
            instance, version = self._in.number(4, name), self._in.number(4, name)
            self._names[section_id] = (name, instance, version)
        elif section_id not in self._names:
            raise _Stop(f"section {section_id} goes on and never began")
        name, instance, version = self._names[section_id]
        self._content(kind, name, instance)
        if self._peek() == _FOOTER:
            self._in.number(1, "a footer")
            if (said := self._in.number(4, "a footer")) != section_id:
                raise _Stop(f"the footer of section {section_id} ({name}) says {said}")
        self._add(kind, section_id, name, instance, version, begin)

    def _content(self, kind: str, name: str, instance: int) -> None:
        if name == "ram":
            self._ram()
        elif name == DBUS_VMSTATE:
            self._dbus_vmstate()
        elif (name, instance) in self._devices:
            self._fields(self._devices[name, instance], name)
        elif kind in ("start", "part", "end"):
            raise _Stop(f"the layout of the iterated section {name[:80]!r} is not known")
        elif self._found.vmdesc is None:
            raise _Stop(
                f"the stream has no description, so it is not known where {name[:80]!r} ends: it was cut off, or never had one"
            )
        else:
            raise _Stop(f"the stream's description does not have {name[:80]!r}, instance {instance}")

    def _fields(self, device: Mapping[str, Any], name: str, depth: int = 0) -> None:
        """By the description: fields have sizes, subsections that are there follow."""
        if depth > _MAX_DEPTH:
            raise _Stop(f"the description of {name[:80]!r} is nested too deep")
        for entry in _list(device, "fields"):
            self._field(entry, name, depth)
        for entry in _list(device, "subsections"):
            if self._peek() != _SUBSECTION:
                raise _Stop(f"a subsection of {name[:80]!r} is described and is not there")
            self._in.number(1, "a subsection")
            said = self._in.text("the name of a subsection")
            self._in.number(4, said)
            if said != entry.get("vmsd_name"):
                raise _Stop(f"a subsection is {said[:80]!r}, and {entry.get('vmsd_name')!r} is described")
            self._fields(entry, said, depth + 1)

    def _field(self, entry: Mapping[str, Any], name: str, depth: int) -> None:
        count = entry.get("array_len", 1) if "index" not in entry else 1
        size = entry.get("size", 0)
        if not isinstance(count, int) or not isinstance(size, int) or count < 0 or size < 0:
            raise _Stop(f"the description of {name[:80]!r} has a field without a size")
        inner = entry.get("struct")
        if not isinstance(inner, Mapping):
            self._in.skip(size * count, f"{name[:80]}.{str(entry.get('name'))[:80]}")
            return
        for _ in range(count):
            if not self._in.left and size:
                raise _Stop(f"the stream ends within {name[:80]}.{str(entry.get('name'))[:80]}")
            self._fields(inner, name, depth + 1)

    # -- memory ----------------------------------------------------------------------------------------------------------------

    def _ram(self) -> None:
        ram = self._found.ram = self._found.ram or RamSummary()
        while True:
            head = self._in.number(8, "a page of memory")
            flags = head & (self._page - 1)
            if flags & _MEM_SIZE:
                self._blocks(ram, head & ~(self._page - 1))
            elif flags & (_ZERO | _PAGE | _XBZRLE | _COMPRESSED):
                if not flags & _CONTINUE:
                    self._block = self._in.text("the name of a block of memory")
                self._a_page(ram, flags)
            elif flags & _EOS:
                return
            elif not flags & _HOOK:
                raise _Stop(f"memory has a record with the flags {flags:#x}, which none has")

    def _a_page(self, ram: RamSummary, flags: int) -> None:
        if flags & _ZERO:
            self._in.number(1, "a page of memory")
            ram.pages_zero += 1
            return
        if flags & _PAGE:
            size = self._page
        elif flags & _COMPRESSED:
            size = self._length(4, 2 * self._page, "a compressed page")
        else:
            self._in.number(1, "an encoded page")
            size = self._length(2, self._page, "an encoded page")
        self._in.skip(size, "a page of memory")
        ram.pages_full += 1
        ram.bytes += size

    def _blocks(self, ram: RamSummary, total: int) -> None:
        while total > 0:
            if len(ram.blocks) >= MAX_BLOCKS:
                raise _Stop(f"more than {MAX_BLOCKS} blocks of memory")
            name, size = (
                self._in.text("the name of a block of memory"),
                self._in.number(8, "a block of memory"),
            )
            ram.blocks.append((name, size))
            total -= size
            if not size:
                raise _Stop(f"the block of memory {name[:80]!r} has no bytes")

    # -- helpers ---------------------------------------------------------------------------------------------------------------

    def _dbus_vmstate(self) -> None:
        """Counted entries of Id and data; what follows them up to the announced size is zero (QEMU sends the room it had)."""
        size = self._in.number(4, DBUS_VMSTATE)
        end = self._in.at + size
        if size > self._in.left:
            raise _Stop(f"{DBUS_VMSTATE} claims {size} bytes, of which {self._in.left} are there")
        count = self._length(4, MAX_HELPERS, "the number of helpers")
        for _ in range(count):
            device_id = self._in.take(self._length(4, 256, "a helper's Id"), "a helper's Id").decode(
                "utf-8", "replace"
            )
            length = self._length(4, MAX_HELPER, f"the state of {device_id[:80]!r}")
            at = self._in.at
            if at + length > end:
                raise _Stop(f"the state of {device_id[:80]!r} is longer than its section")
            self._found.helpers.append(Helper(device_id, at, self._in.take(length, "a helper's state")))
        if self._in.at > end:
            raise _Stop("the helpers' states are longer than their section")
        self._in.skip(end - self._in.at, DBUS_VMSTATE)

    def _end(self, begin: int) -> None:
        """The end of the stream, and the description behind it, which not every machine type sends."""
        if not self._in.left:
            self._add("end of stream", 0, "end of stream", 0, 0, begin)
            return
        if self._in.number(1, "the description") != _VMDESC:
            self._in.back(begin + 1)
            raise _Stop("something that is no description follows the stream's end")
        self._in.skip(self._length(4, MAX_VMDESC, "the description"), "the description")
        self._add("description", 0, "description", 0, 0, begin)
        if self._in.left:
            raise _Stop(f"{self._in.left} bytes follow the description")


def _list(device: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    entries = device.get(key, [])
    if not isinstance(entries, list) or len(entries) > _MAX_FIELDS:
        raise _Stop(f"the description's {key} are no list")
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise _Stop(f"the description has something else than tables among its {key}")
        yield entry


def _devices(vmdesc: Mapping[str, Any] | None) -> Iterator[tuple[tuple[str, int], Mapping[str, Any]]]:
    entries = vmdesc.get("devices", []) if vmdesc is not None else []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, Mapping):
            name, instance = entry.get("name"), entry.get("instance_id")
            if isinstance(name, str) and isinstance(instance, int):
                yield (name, instance), entry
