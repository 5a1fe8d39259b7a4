"""How values and parts of a blob look: as a line of a tree, as JSON, as rows of annotated hexadecimal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from migrate.qemu.stream import StreamSummary
from migrate.state.walk import Part

#: Bytes in one row, and what a value may take of a line.
ROW: Final = 16
_MOST: Final = 72
#: Classes of bytes, as colours: zero, printable, white space, other ASCII, the rest.
_COLOURS: Final = ("90", "36", "32", "35", "33")
_OF_PART: Final = {"damage": "1;31", "name": "34", "checksum": "35", "envelope": "35"}


def plain(value: object) -> Any:
    """For JSON: bytes as {"hex": …}, as in tests/golden."""
    match value:
        case bytes() | memoryview():
            return {"hex": bytes(value).hex()}
        case Mapping():
            return {name: plain(item) for name, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    return value


def short(value: object) -> str:
    """In a line, cut where it is long."""
    match value:
        case None:
            return "nil"
        case bool():
            return str(value).lower()
        case int():
            return f"{value}" if -10 < value < 10 else f"{value} ({value:#x})"
        case bytes() | memoryview():
            if not len(value):
                return "(0 bytes)"
            digits = bytes(value[: _MOST // 2]).hex()
            return f"{digits}{'…' if len(value) > _MOST // 2 else ''} ({len(value)} bytes)"
        case str():
            text = repr(value)
            return text if len(text) <= _MOST else f"{text[:_MOST]}…"
    return str(value)


def alone(value: object) -> str:
    """As the only thing that was asked for, so that a script can use it."""
    match value:
        case Mapping() | list():
            return json.dumps(plain(value), indent=2)
        case bytes():
            return value.hex()
        case bool():
            return str(value).lower()
    return str(value)


def tree(parts: Iterator[Part]) -> Iterator[str]:
    """A line a value."""
    for part in parts:
        if part.what == "checksum" and "WRONG" in part.doc:
            yield f"at byte {part.offset}: {part.doc}"
        elif part.what == "damage":
            yield f"at byte {part.offset}: {part.value}" + (
                f"; {part.length} bytes are not shown" if part.length else ""
            )
        elif part.is_value or part.what in ("map", "list"):
            if not part.path:
                continue  # the map that is the state itself
            indent = "  " * part.depth
            name = part.path[part.path.rfind("[" if part.path.endswith("]") else ".") :]
            meaning = f"  — {part.doc}" if part.doc else ""
            if part.what in ("map", "list"):
                items = "" if part.what == "map" else f" ({part.value})"
                yield f"{indent}{name.lstrip('.')}:{items}{meaning}"
            else:
                unit = f" {part.unit}" if part.unit else ""
                yield f"{indent}{name.lstrip('.')} = {short(part.value)}{unit}{meaning}"


def rows(parts: Iterator[Part], data: memoryview, first: int, last: int, *, colour: bool) -> Iterator[str]:
    """Rows of bytes, each part beginning a row of its own; what it is stands beside its first."""
    digits = max(4, len(f"{len(data):x}"))
    for part in parts:
        begin, end = max(part.offset, first), min(part.offset + part.length, last)
        what = _annotation(part)
        if part.length == 0 and first <= part.offset <= last:
            yield f"{part.offset:0{digits}x}  {'':{ROW * 3}}  {_painted(what, _OF_PART.get(part.what, ''), colour)}"
        for at in range(begin, end, ROW):
            piece = bytes(data[at : min(at + ROW, end)])
            shown = (
                " ".join(f"{byte:02x}" for byte in piece) if not colour else " ".join(map(_coloured, piece))
            )
            pad = " " * (ROW * 3 - 3 * len(piece) + 1)
            note = _painted(what, _OF_PART.get(part.what, ""), colour) if at == begin else ""
            yield f"{at:0{digits}x}  {shown}{pad} {note}".rstrip()


def part_as_object(part: Part) -> dict[str, Any]:
    """Values that are long are left to whoever has the blob: offset and length are there."""
    return {
        "event": "part", "offset": part.offset, "length": part.length, "path": part.path, "what": part.what,
        "value": plain(part.value) if part.length < 4096 else None, "unit": part.unit, "doc": part.doc,
    }  # fmt: skip


def _annotation(part: Part) -> str:
    where = f"{part.offset}..{part.offset + part.length}" if part.length else f"{part.offset}"
    if part.what == "damage":
        return f"[{where}] DAMAGE: {part.value}"
    if part.what == "name":
        return f"[{where}] name of {part.path}"
    if part.what in ("map", "list"):
        return f"[{where}] {part.path or 'the state'}: {part.what} of {part.value}" + (
            f"  {part.doc}" if part.doc else ""
        )
    unit = f" {part.unit}" if part.unit else ""
    value = (
        "" if part.length > ROW and isinstance(part.value, memoryview) else f" = {short(part.value)}{unit}"
    )
    return f"[{where}] {part.path or part.what}{value}" + (f"  {part.doc}" if part.doc else "")


def _painted(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text


def _coloured(byte: int) -> str:
    if byte == 0:
        code = _COLOURS[0]
    elif 0x21 <= byte < 0x7F:
        code = _COLOURS[1]
    elif byte in b" \t\n\r\f\v":
        code = _COLOURS[2]
    else:
        code = _COLOURS[3] if byte < 0x80 else _COLOURS[4]
    return f"\x1b[{code}m{byte:02x}\x1b[0m"


def table(pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        yield f"{name:{width}}  {value}"


def stream(found: StreamSummary) -> Iterator[str]:
    """A migration stream of QEMU in a few lines, then its sections."""
    yield f"a migration stream of QEMU, machine type {found.machine or 'not told'}"
    for section in found.sections:
        version = f" version {section.version}" if section.kind in ("start", "full") else ""
        what = f"{section.kind} {section.name}" + (
            f" instance {section.instance}" if section.instance else ""
        )
        yield f"  [{section.offset}..{section.offset + section.size}] {what}{version}, {section.size} bytes"
    if found.ram is not None:
        blocks = ", ".join(f"{name} {size} bytes" for name, size in found.ram.blocks)
        yield f"  memory: {blocks}"
        yield f"  pages sent: {found.ram.pages_full} with {found.ram.bytes} bytes, {found.ram.pages_zero} of zeros"
    devices = (found.vmdesc or {}).get("devices")
    yield (
        f"  description of {len(devices)} devices"
        if isinstance(devices, list)
        else "  no description of its devices"
    )
    if found.complaint is not None:
        yield f"  at byte {found.stopped_at}: {found.complaint}"


def stream_as_object(found: StreamSummary) -> dict[str, Any]:
    return {
        "event": "stream", "machine": found.machine, "complaint": found.complaint, "stopped_at": found.stopped_at,
        "sections": [
            {"kind": one.kind, "id": one.section_id, "name": one.name, "instance": one.instance, "version": one.version,
             "offset": one.offset, "size": one.size}
            for one in found.sections
        ],
        "ram": None if found.ram is None else {
            "blocks": [{"name": name, "bytes": size} for name, size in found.ram.blocks],
            "pages_zero": found.ram.pages_zero, "pages_full": found.ram.pages_full, "bytes": found.ram.bytes,
        },
        "helpers": [{"id": one.id, "offset": one.offset, "bytes": len(one.data)} for one in found.helpers],
        "vmdesc": found.vmdesc,
    }  # fmt: skip
