"""What each word of `ferry blob` does."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from migrate.cli.blob import drawing
from migrate.cli.blob.source import Given, Item, given, one
from migrate.cli.output import Output
from migrate.errors import BlobError, FerryError, SchemaError, UsageError
from migrate.state import Schema, SchemaVersion, blob, catalog
from migrate.state.compare import differences
from migrate.state.query import find
from migrate.state.redact import redact
from migrate.state.walk import Part, walk

#: More than the envelope's head needs, bytes.
_HEAD: Final = 400
#: Values that one object of --json has at the most; no schema of ours has as many.
MAX_VALUES: Final = 100_000


def act(args: argparse.Namespace) -> int:
    output = Output(sys.stdout, sys.stderr, json=args.json)
    return _ACTIONS[args.action](args, output)


def _of_stream(found: Given, output: Output) -> bool:
    """What a migration stream of QEMU has beside blobs, and what devices streamed. True: some could not be read to its end."""
    broken = False
    for kept in found.streamed:
        output.event(
            {
                "event": "streamed",
                "name": kept.name,
                "chunks": kept.count,
                "bytes": kept.size,
                "complaint": kept.complaint or None,
            }
        )
        output.data(f"{kept.name}: streamed state, {kept.count} chunks, {kept.size} bytes")
        if kept.complaint:
            output.data(f"  {kept.complaint}")
        broken |= bool(kept.complaint)
    for stream in (found.stream, *(kept.stream for kept in found.streamed)):
        if stream is not None:
            output.event(drawing.stream_as_object(stream))
            for line in drawing.stream(stream):
                output.data(line)
            broken |= stream.complaint is not None
    return broken


def _opaque(item: Item, output: Output) -> bool:
    """A helper's state that is no blob of ours is told, and no damage."""
    if item.is_opaque:
        output.event(
            {
                "event": "helper",
                "name": item.name,
                "instance": item.helper,
                "bytes": len(item.data),
                "opaque": True,
            }
        )
        output.data(f"{item.name}: {item.helper!r}, opaque: {len(item.data)} bytes that are no vmferry blob")
    return item.is_opaque


# -- looking ------------------------------------------------------------------------------------------------------------------


def _show(args: argparse.Namespace, output: Output) -> int:
    found = given(args.what, args.id)
    broken = _of_stream(found, output)
    for item in found.items:
        if _opaque(item, output):
            continue
        version, why = _version_of(item)
        damage: list[Part] = []
        parts = _watched(item, version, damage)
        if output.json:
            output.event(_as_event(item, parts, damage))
        else:
            said = _envelope(item)
            whose = (
                f"{said['type']} {said['instance']!r}, schema version {said['schema_version']}"
                if "instance" in said
                else "no blob"
            )
            output.data(f"{item.name}: {whose}")
            if why:
                output.data(f"  ({why}: without it, names and values are shown as they stand there)")
            output.bulk(f"  {line}" for line in drawing.tree(parts))
        broken |= bool(damage)
    return _end(output, broken)


def _watched(item: Item, version: SchemaVersion | None, damage: list[Part]) -> Iterator[Part]:
    """The parts as they come: a blob may have more than memory has room for. What is wrong is also put into `damage`."""
    for part in walk(item.data, version):
        if part.what == "damage" or "WRONG" in part.doc:
            damage.append(part)
        yield part


def _envelope(item: Item) -> dict[str, object]:
    parts = walk(item.data[:_HEAD], None)
    return {part.path.removeprefix("envelope."): part.value for part in parts if part.what == "envelope"}


def _dump(args: argparse.Namespace, output: Output) -> int:
    found = given(args.what, args.id)
    broken = _of_stream(found, output)
    first, last = _range(args.range)
    colour = args.colour == "always" or (args.colour == "auto" and _coloured())
    for item in found.items:
        if _opaque(item, output):
            continue
        version, why = _version_of(item)
        output.data(f"{item.name}:" + (f" ({why})" if why else ""))
        damage: list[Part] = []
        parts = _told(_watched(item, version, damage), output)
        output.bulk(drawing.rows(parts, item.data, first, min(last, len(item.data)), colour=colour))
        broken |= bool(damage)
    return _end(output, broken)


def _told(parts: Iterator[Part], output: Output) -> Iterator[Part]:
    for part in parts:
        if output.json:
            output.event(drawing.part_as_object(part))
        yield part


def _coloured() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ


def _info(args: argparse.Namespace, output: Output) -> int:
    found = given(args.what, args.id)
    broken = _of_stream(found, output)
    for item in found.items:
        if _opaque(item, output):
            continue
        said = _envelope(item)
        facts = {
            "type": said.get("type"), "instance": said.get("instance"), "schema version": said.get("schema_version"),
            "schema digest": _hex(said.get("schema_digest")), "envelope version": said.get("version"),
            "payload": said.get("payload_size"), "bytes": len(item.data),
        }  # fmt: skip
        known = ""
        try:
            blob.header_of(bytes(item.data[:_HEAD]))
            known = _digest_says(str(said["type"]), said["schema_version"], said["schema_digest"])
        except (FerryError, KeyError) as error:
            broken = True
            known = error.reason if isinstance(error, FerryError) else "the blob ends within its header"
        output.event({"event": "blob", "name": item.name, **facts, "known": known})
        output.data(f"{item.name}:")
        shown = [(name, str(value)) for name, value in facts.items() if value is not None]
        for line in drawing.table([*shown, ("here", known)]):
            output.data(f"  {line}")
    return _end(output, broken)


def _query(args: argparse.Namespace, output: Output) -> int:
    _, values, _ = _read(one(args.what, args.id))
    found = find(values, args.path)
    output.event({"event": "value", "path": args.path, "value": drawing.plain(found)})
    output.data(drawing.alone(found))
    return 0


def _diff(args: argparse.Namespace, output: Output) -> int:
    try:
        left, right = _read(one(args.what)), _read(one(args.other))
    except FerryError as error:
        output.failure(error)
        return 2
    if left[0].type != right[0].type:
        what = f"the first is the state of a {left[0].type}, the second of a {right[0].type}"
        output.failure(UsageError(what, remedy="compare states of one type"))
        return 2
    if left[0].version != right[0].version:
        output.say(f"schema version {left[0].version} against {right[0].version}")
    count = 0
    for found in differences(left[1], right[1]):
        count += 1
        output.event(
            {
                "event": "difference",
                "path": found.path,
                "left": _side(found.left),
                "right": _side(found.right),
            }
        )
        output.data(f"{found.path}: {drawing.short(found.left)} → {drawing.short(found.right)}")
    output.event(
        {
            "event": "outcome",
            "outcome": "different" if count else "equal",
            "differences": count,
            "exit_code": int(bool(count)),
        }
    )
    return int(bool(count))


def _verify(args: argparse.Namespace, output: Output) -> int:
    found = given(args.what, args.id)
    broken = _of_stream(found, output)
    for item in found.items:
        if _opaque(item, output):
            continue
        try:
            version, _, instance = _read(item)
        except FerryError as error:
            broken = True
            output.event(
                {"event": "blob", "name": item.name, "right": False, "reasons": [error.as_reason().to_wire()]}
            )
            output.data(f"[FAIL] {item.name}: {error}")
        else:
            output.event(
                {
                    "event": "blob",
                    "name": item.name,
                    "right": True,
                    "type": version.type,
                    "version": version.version,
                }
            )
            output.data(f"[ OK ] {item.name}: {version.type} {instance!r}, schema version {version.version}")
    return _end(output, broken)


# -- writing ------------------------------------------------------------------------------------------------------------------


def _upgrade(args: argparse.Namespace, output: Output) -> int:
    from migrate.state.upgrades import convert

    item = one(args.what, args.id)
    version, values, instance = _read(item)
    schema = catalog.load(version.type)
    target = schema.at(args.to)
    changed = convert(schema, values, version.version, args.to)
    _write(args.output, blob.write(target, instance, changed))
    output.say(
        f"wrote {version.type} {instance!r} in version {target.version} (it was {version.version}) to {args.output}"
    )
    return _end(output, False)


def _redact(args: argparse.Namespace, output: Output) -> int:
    version, values, instance = _read(one(args.what, args.id))
    cleaned = redact(version.struct, values, numbers=args.numbers)
    assert isinstance(cleaned, Mapping)
    _write(args.output, blob.write(version, instance, cleaned))
    output.say(f"wrote {version.type} {instance!r} without its guest's data to {args.output}")
    return _end(output, False)


def _write(where: str, data: bytes) -> None:
    if where == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        Path(where).write_bytes(data)
    except OSError as error:
        raise UsageError(f"{where} cannot be written: {error.strerror}", remedy="name another file") from None


# -- reading ------------------------------------------------------------------------------------------------------------------


def _read(item: Item) -> tuple[SchemaVersion, dict[str, object], str]:
    """:raise BlobError, SchemaError: it is not whole and right; the text says where it was found."""
    try:
        header = blob.header_of(bytes(item.data[:_HEAD]))
        if len(item.data) > blob.MAX_BLOB:
            raise BlobError(
                f"it has {len(item.data)} bytes, and no blob has more than {blob.MAX_BLOB}",
                remedy="cut it out",
            )
        version, values = blob.read(bytes(item.data), catalog.load(header.type))
    except (BlobError, SchemaError) as error:
        error.reason = f"{item.name}: {error.reason}"
        raise
    return version, values, header.instance


def _version_of(item: Item) -> tuple[SchemaVersion | None, str]:
    """The schema version that a blob names, if it is the one that is known here; else why there is none."""
    try:
        header = blob.header_of(bytes(item.data[:_HEAD]))
        schema: Schema = catalog.load(header.type)
        version = schema.at(header.version)
    except FerryError as error:
        return None, error.reason
    if version.digest != header.digest:
        return None, f"{header.type} version {header.version} is defined otherwise here"
    return version, ""


def _as_event(item: Item, parts: Iterator[Part], damage: list[Part]) -> dict[str, object]:
    values: list[dict[str, object]] = []
    left_out = 0
    for part in parts:
        if part.is_value:
            if len(values) < MAX_VALUES:
                values.append(
                    {
                        "path": part.path,
                        "value": drawing.plain(part.value),
                        "unit": part.unit,
                        "doc": part.doc,
                    }
                )
            else:
                left_out += 1
    said = _envelope(item)
    return {
        "event": "blob", "name": item.name, "type": said.get("type"), "instance": said.get("instance"),
        "version": said.get("schema_version"), "values": values, "left_out": left_out,
        "damage": [{"offset": part.offset, "why": part.value if part.what == "damage" else part.doc} for part in damage],
    }  # fmt: skip


def _digest_says(type_name: str, version: object, digest: object) -> str:
    known = catalog.load(type_name)
    assert isinstance(version, int)
    same = known.at(version).digest == bytes(digest)  # type: ignore[call-overload]
    return (
        "the schema is known and the same"
        if same
        else "the schema version is known, and defined otherwise here"
    )


def _hex(value: object) -> str | None:
    return bytes(value).hex() if isinstance(value, (bytes, memoryview)) else None


def _side(value: object) -> object:
    from migrate.state.compare import Missing

    return None if isinstance(value, Missing) else drawing.plain(value)


def _range(text: str) -> tuple[int, int]:
    if not text:
        return 0, sys.maxsize
    first, colon, last = text.partition(":")
    try:
        return int(first or "0", 0), int(last, 0) if last else sys.maxsize
    except ValueError:
        colon = ""
    raise UsageError(f"--range {text}{colon} is no range", remedy="write it as 0x40:0x80, 64: or :128")


def _end(output: Output, broken: bool) -> int:
    code = int(broken)
    output.event({"event": "outcome", "outcome": "broken" if broken else "done", "exit_code": code})
    return code


_ACTIONS: Final[Mapping[str, Callable[[argparse.Namespace, Output], int]]] = {
    "show": _show, "dump": _dump, "info": _info, "query": _query, "diff": _diff, "verify": _verify, "upgrade": _upgrade,
    "redact": _redact,
}  # fmt: skip
