"""What may change in schemas and what may not, as rules with names that stay: for `ferry schema check`, by people and in CI.

Two questions. Has a *released* version changed, or gone? That is never right: blobs of it exist. And do neighbouring versions meet?
In Avro's words, for a step from version n to n+1:

| mode     | promise                                                                                       |
|----------|-----------------------------------------------------------------------------------------------|
| backward | every state of version n can be read by a program whose newest is n+1                         |
| forward  | every state of n+1 whose new fields have their defaults, and whose new subsections are not    |
|          | needed, can be written in version n                                                           |
| full     | both                                                                                          |

A step that has a function in steps.py is judged by that function's tests and not by rules about fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from migrate.errors import SchemaError
from migrate.state.kinds import Bytes, Enum, Int, Kind, List, Str, Struct
from migrate.state.schema import Schema, SchemaVersion
from migrate.state.steps import STEPS

MODES: Final = ("backward", "forward", "full")

#: Every rule, and what it says; the ids are for ever.
RULES: Final[Mapping[str, str]] = {
    "FILE_IS_A_SCHEMA": "a schema file can be read",
    "TYPE_NO_DELETE": "a device type that was released stays",
    "VERSION_NO_DELETE": "a version that was released stays: blobs of it exist",
    "RELEASED_VERSION_IMMUTABLE": "a version that was released never changes: what is different goes into a new version",
    "FIELD_NO_DELETE": "a field of a released version stays in it",
    "FIELD_NO_ADD": "a field is added to a new version, not to one that was released",
    "FIELD_SAME_TYPE": "a field keeps its type, or the step to the next version has a function",
    "FIELD_SAME_ORDER": "the fields of a released version keep their order: it is their encoding",
    "FIELD_SAME_UNIT": "a field keeps its unit",
    "FIELD_NEEDS_DEFAULT": "a field that is new in a later version has a default: the value for states that do not have it",
    "SUBSECTION_NO_DELETE": "a subsection stays in later versions: a state that needs it could not be upgraded",
    "BOUNDS_NO_NARROW": "bounds do not become narrower in the next version: states that exist would not fit",
    "BOUNDS_NO_WIDEN": "bounds do not become wider: a state could not be written in the older version (forward)",
    "ENUM_VALUE_NO_DELETE": "a word of an enum stays in the next version",
    "ENUM_VALUE_NO_ADD": "no word is added to an enum: a state could not be written in the older version (forward)",
}


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that is broken."""

    rule: str
    type: str
    version: int  #: the one that is wrong; 0: of the type as a whole
    path: str  #: of the field
    text: str

    def __str__(self) -> str:
        where = f"{self.type} version {self.version}" if self.version else self.type
        return f"{self.rule}: {where}{self.path}: {self.text} ({RULES[self.rule]})"


def released(old: Mapping[str, Schema], new: Mapping[str, Schema]) -> Iterator[Broken]:
    """What was changed of what has been released."""
    for name, before in old.items():
        after = new.get(name)
        if after is None:
            yield Broken("TYPE_NO_DELETE", name, 0, "", "it is gone")
            continue
        for number in before.versions:
            if number not in after.versions:
                yield Broken("VERSION_NO_DELETE", name, number, "", "it is gone")
            elif before.at(number).digest != after.at(number).digest:
                yield Broken("RELEASED_VERSION_IMMUTABLE", name, number, "", "it is defined otherwise")
                yield from _changed(before.at(number), after.at(number))


def _changed(before: SchemaVersion, after: SchemaVersion) -> Iterator[Broken]:
    yield from _fields_changed(before.struct, after.struct, before.type, before.version, "")


def _fields_changed(before: Struct, after: Struct, name: str, version: int, path: str) -> Iterator[Broken]:
    was, now = ({field.name: field for field in struct.fields} for struct in (before, after))
    for field in before.fields:
        here = f"{path}.{field.name}"
        other = now.get(field.name)
        if other is None:
            rule = "SUBSECTION_NO_DELETE" if field.optional else "FIELD_NO_DELETE"
            yield Broken(rule, name, version, here, "it is gone")
        elif isinstance(field.kind, Struct) and isinstance(other.kind, Struct):
            yield from _fields_changed(field.kind, other.kind, name, version, here)
        elif field.kind.text() != other.kind.text():
            yield Broken(
                "FIELD_SAME_TYPE",
                name,
                version,
                here,
                f"it was {field.kind.text()} and is {other.kind.text()}",
            )
        elif field.unit != other.unit:
            units = f"it was in {field.unit or 'none'} and is in {other.unit or 'none'}"
            yield Broken("FIELD_SAME_UNIT", name, version, here, units)
    for field in after.fields:
        if field.name not in was:
            yield Broken("FIELD_NO_ADD", name, version, f"{path}.{field.name}", "it was not there")
    stay = [field.name for field in before.fields if field.name in now]
    if stay != [field.name for field in after.fields if field.name in was]:
        yield Broken("FIELD_SAME_ORDER", name, version, path, "its fields stand in another order")


def steps(schema: Schema, mode: str) -> Iterator[Broken]:
    """What keeps neighbouring versions from meeting. :param mode: of MODES."""
    backward, forward = mode in ("backward", "full"), mode in ("forward", "full")
    for number in schema.versions[1:]:
        older, newer = schema.at(number - 1), schema.at(number)
        if backward and (schema.type, number - 1, number) not in STEPS:
            yield from _meets(older.struct, newer.struct, schema.type, number, "", up=True)
        if forward and (schema.type, number, number - 1) not in STEPS:
            yield from _meets(newer.struct, older.struct, schema.type, number, "", up=False)


def _meets(have: Struct, want: Struct, name: str, version: int, path: str, *, up: bool) -> Iterator[Broken]:
    """Whether what fits `have` can be made to fit `want`. :param up: `want` is the newer one."""
    wanted = {field.name: field for field in want.fields}
    for field in have.fields:
        here = f"{path}.{field.name}"
        other = wanted.get(field.name)
        if other is not None:
            yield from _kind_meets(field.kind, other.kind, name, version, here, up=up)
        elif up and field.optional:
            yield Broken("SUBSECTION_NO_DELETE", name, version, here, f"version {version - 1} has it")


def _kind_meets(have: Kind, want: Kind, name: str, version: int, path: str, *, up: bool) -> Iterator[Broken]:
    bounds = "BOUNDS_NO_NARROW" if up else "BOUNDS_NO_WIDEN"
    match have, want:
        case Struct(), Struct():
            yield from _meets(have, want, name, version, path, up=up)
        case List(), List():
            if have.low < want.low or have.high > want.high:
                yield Broken(bounds, name, version, path, _between(have, want, up))
            yield from _kind_meets(have.item, want.item, name, version, f"{path}[]", up=up)
        case Int(low=low, high=high), Int(low=least, high=most):
            if low < least or high > most:
                yield Broken(bounds, name, version, path, _between(have, want, up))
        case Bytes(low=low, high=high), Bytes(low=least, high=most):
            if low < least or high > most:
                yield Broken(bounds, name, version, path, _between(have, want, up))
        case Str(), Str():
            if have.high > want.high:
                yield Broken(bounds, name, version, path, _between(have, want, up))
        case Enum(), Enum():
            if gone := [word for word in have.values if word not in want.values]:
                rule = "ENUM_VALUE_NO_DELETE" if up else "ENUM_VALUE_NO_ADD"
                yield Broken(rule, name, version, path, f"{', '.join(gone)} {'is gone' if up else 'is new'}")
        case _:
            if type(have) is not type(want):
                yield Broken("FIELD_SAME_TYPE", name, version, path, _between(have, want, up))


def _between(have: Kind, want: Kind, up: bool) -> str:
    older, newer = (have, want) if up else (want, have)
    return f"it was {older.text()} and is {newer.text()}"


def reads(schema: Schema) -> Mapping[int, tuple[int, ...]]:
    """By the newest version that a program knows: which versions it reads. That and all before it."""
    return {
        newest: tuple(number for number in schema.versions if number <= newest) for newest in schema.versions
    }


def of_file(origin: str, error: SchemaError) -> Broken:
    """A schema file that cannot be read, as a rule that is broken."""
    rule = "FIELD_NEEDS_DEFAULT" if "needs a `default`" in error.reason else "FILE_IS_A_SCHEMA"
    return Broken(rule, origin, 0, "", error.reason)
