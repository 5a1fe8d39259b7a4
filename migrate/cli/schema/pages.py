"""A schema version for people and for other tools: lines, an object, a page of Markdown, a JSON Schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from migrate.state import Schema, SchemaVersion
from migrate.state.kinds import INTEGERS, Bool, Bytes, Enum, Field, Int, Kind, List, Str, Struct


def words(kind: Kind) -> str:
    """A kind as its file says it."""
    match kind:
        case Int():
            return kind.name
        case Bool():
            return "bool"
        case Bytes():
            return f"bytes[{kind.high}]" if kind.low == kind.high else f"bytes<={kind.high}"
        case Str():
            return f"str<={kind.high}"
        case Enum():
            return f"enum: {', '.join(kind.values)}"
        case List():
            count = f"[{kind.high}]" if kind.low == kind.high else f"<={kind.high}"
            return f"list{count} of {words(kind.item)}"
        case Struct():
            return "struct"
    return kind.text()


def bounds(kind: Kind) -> str:
    if isinstance(kind, Int):
        return "" if (kind.low, kind.high) == INTEGERS[kind.name] else f"{kind.low} to {kind.high}"
    return ""


def fields(version: SchemaVersion) -> Iterator[str]:
    for depth, field in _flat(version.struct, 1):
        what = ", ".join(filter(None, (words(field.kind), bounds(field.kind), field.unit)))
        section = "subsection, sent when needed: " if field.optional else ""
        yield f"{'  ' * depth}{field.name:24} {section}{what}" + (
            f"  — {_line(field.doc)}" if field.doc else ""
        )


def _flat(struct: Struct, depth: int) -> Iterator[tuple[int, Field]]:
    for field in struct.fields:
        yield depth, field
        inner = field.kind.item if isinstance(field.kind, List) else field.kind
        if isinstance(inner, Struct):
            yield from _flat(inner, depth + 1)


def as_object(version: SchemaVersion) -> dict[str, Any]:
    return {
        "event": "schema", "type": version.type, "version": version.version, "digest": version.digest.hex(),
        "max_bytes": version.max_size, "fields": [_field(field) for field in version.fields],
    }  # fmt: skip


def _field(field: Field) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": field.name,
        "kind": field.kind.text(),
        "unit": field.unit,
        "doc": field.doc,
    }
    if field.optional:
        found["subsection"] = True
    if isinstance(field.kind, Struct):
        found["fields"] = [_field(inner) for inner in field.kind.fields]
    return found


def markdown(schema: Schema) -> Iterator[str]:
    """A page: the newest version's fields, and what each version brought."""
    yield f"# {schema.type}"
    yield ""
    yield _line(schema.doc)
    yield ""
    newest = schema.at(schema.version)
    yield f"Version {newest.version}, at most {newest.max_size} bytes, digest `{newest.digest.hex()}`."
    yield f"Made by `ferry schema doc {schema.type}`."
    yield ""
    yield "| field | type | bounds | unit | since | meaning |"
    yield "|---|---|---|---|---|---|"
    since = _since(schema)
    for depth, field in _flat(newest.struct, 0):
        name = f"{'&nbsp;' * 4 * depth}`{field.name}`" + (" (subsection)" if field.optional else "")
        born = str(since.get(field.name, "")) if depth == 0 else ""
        kind = words(field.kind).replace("|", "\\|")
        yield f"| {name} | {kind} | {bounds(field.kind)} | {field.unit} | {born} | {_line(field.doc)} |"
    if len(schema.versions) > 1:
        yield ""
        yield "| version | digest | new | gone |"
        yield "|---|---|---|---|"
        for number in schema.versions:
            names, before = (_names(schema, at) for at in (number, number - 1))
            new, gone = (
                ", ".join(n for n in names if n not in before),
                ", ".join(n for n in before if n not in names),
            )
            yield f"| {number} | `{schema.at(number).digest.hex()[:16]}…` | {new if before else 'all'} | {gone} |"


def _names(schema: Schema, number: int) -> list[str]:
    return [field.name for field in schema.at(number).fields] if number in schema.versions else []


def _since(schema: Schema) -> dict[str, int]:
    """By field of the newest version: the first version from which it is there as it is."""
    found: dict[str, int] = {}
    for field in schema.at(schema.version).fields:
        for number in reversed(schema.versions):
            if not any(other.text() == field.text() for other in schema.at(number).fields):
                break
            found[field.name] = number
    return found


def json_schema(version: SchemaVersion) -> dict[str, Any]:
    """Of the state as `ferry blob show --json` has it: bytes are {"hex": …}. JSON's own integers are exact only up to 2^53."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{version.type} version {version.version}",
        "$comment": f"digest {version.digest.hex()}",
        **_json(version.struct),
    }


def _json(kind: Kind) -> dict[str, Any]:
    match kind:
        case Int():
            return {"type": "integer", "minimum": kind.low, "maximum": kind.high}
        case Bool():
            return {"type": "boolean"}
        case Bytes():
            digits = {"type": "string", "pattern": f"^([0-9a-f]{{2}}){{{kind.low},{kind.high}}}$"}
            return {
                "type": "object",
                "properties": {"hex": digits},
                "required": ["hex"],
                "additionalProperties": False,
            }
        case Str():
            return {"type": "string", "maxLength": kind.high}
        case Enum():
            return {"enum": list(kind.values)}
        case List():
            return {"type": "array", "minItems": kind.low, "maxItems": kind.high, "items": _json(kind.item)}
        case Struct():
            return {
                "type": "object",
                "properties": {field.name: _described(field) for field in kind.fields},
                "required": [field.name for field in kind.fields if not field.optional],
                "additionalProperties": False,
            }
    raise AssertionError(kind)


def _described(field: Field) -> dict[str, Any]:
    found = _json(field.kind)
    text = _line(field.doc) + (f" ({field.unit})" if field.unit else "")
    return {"description": text, **found} if text else found


def _line(text: str) -> str:
    return " ".join(text.split())
