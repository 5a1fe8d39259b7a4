"""Schema files: TOML text in, `Schema` out, or a SchemaError that says where the file is wrong.

A file describes all versions of a type at once: a field is there from version `since` to version `until` (inclusive), so a later
version adds to the file and changes nothing that was released. The same name may come back as another kind where the ranges do not
overlap: that is how a field is widened. What the keys mean for people who write schemas is in docs/state.md.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Mapping
from typing import Final, NoReturn

from migrate.errors import SchemaError
from migrate.state.kinds import INTEGERS, Bool, Bytes, Enum, Field, Int, Kind, List, Str, Struct, Wrong, shown
from migrate.state.schema import MAX_PAYLOAD, TYPE_NAME, Schema, SchemaVersion

FIELD_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_ENUM_VALUE: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_UNIT: Final = re.compile(r"[A-Za-z0-9%/ ]{0,32}")  # a part of the definition that a digest is made over
_SIZED: Final = re.compile(r"(bytes|str|list)(?:\[(\d{1,9})\]|<=(\d{1,9}))")
_WORDS: Final = (*INTEGERS, "bool", "bytes[N]", "bytes<=N", "str<=N", "enum", "list[N]", "list<=N", "struct")

_MAX_VERSION: Final = 10_000
_MAX_ENTRIES: Final = 4096  #: fields of a struct, values of an enum
_MAX_LIST: Final = 16_384  #: items; msgpack allocates what a list's head claims, 1024 levels deep
_MAX_DEPTH: Final = 8  #: lists and structs inside each other

_FILE_KEYS: Final = frozenset({"type", "version", "oldest", "written", "doc", "field", "subsection"})
_KIND_KEYS: Final = frozenset({"type", "min", "max", "values", "item", "fields"})
_FIELD_KEYS: Final = _KIND_KEYS | {"name", "since", "until", "default", "unit", "doc"}
_SUBSECTION_KEYS: Final = frozenset({"name", "since", "until", "doc", "field"})


def parse(text: str, origin: str) -> Schema:
    """Read a schema file's text.

    :param origin: the file's name, for messages.
    :raise SchemaError: with the place in the file, for anything that is not a schema.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SchemaError(f"{origin} is not TOML: {error}", remedy="correct the file") from None
    source = _Source(origin)
    source.check_keys("", table, _FILE_KEYS)
    name = source.name("", table, "type", TYPE_NAME)
    newest = source.number("", table, "version", 1, _MAX_VERSION)
    oldest = source.number("", table, "oldest", 1, newest, absent=1)
    written = source.number("", table, "written", oldest, newest, absent=oldest)
    versions = {
        number: SchemaVersion(name, number, _VersionOf(source, number, oldest, newest).struct(table))
        for number in range(oldest, newest + 1)
    }
    return Schema(name, source.text("", table, "doc"), versions, written)


class _Source:
    """Plain values out of the file's tables, or an error that says where they should be."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def fail(self, where: str, text: str) -> NoReturn:
        place = f"{self.origin}: {where}" if where else self.origin
        raise SchemaError(f"{place}: {text}", remedy="correct the schema file; docs/state.md describes it")

    def check_keys(self, where: str, table: Mapping[str, object], known: Collection[str]) -> None:
        for key in table:
            if key not in known:
                near = difflib.get_close_matches(key, sorted(known), 1)
                self.fail(
                    where, f"unknown key {key[:40]!r}" + (f"; did you mean `{near[0]}`?" if near else "")
                )

    def tables(
        self, where: str, table: Mapping[str, object], key: str
    ) -> list[tuple[str, dict[str, object]]]:
        """A list of tables, each with the words for its place: `field 3 (ier)`."""
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            self.fail(where, f"`{key}` has to be a list of tables")
        if len(value) > _MAX_ENTRIES:
            self.fail(where, f"`{key}` is there more than {_MAX_ENTRIES} times")
        found = []
        for number, entry in enumerate(value, 1):
            name = entry.get("name")
            place = f"{key.removesuffix('s')} {number}" + (f" ({name[:64]})" if isinstance(name, str) else "")
            found.append((f"{where}: {place}" if where else place, entry))
        return found

    def name(self, where: str, table: Mapping[str, object], key: str, pattern: re.Pattern[str]) -> str:
        value = table.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.fail(where, f"`{key}` {_is(value)}; it has to match {pattern.pattern}")
        return value

    def number(
        self,
        where: str,
        table: Mapping[str, object],
        key: str,
        low: int,
        high: int,
        *,
        absent: int | None = None,
    ) -> int:
        value = table.get(key, absent)
        if type(value) is not int or not low <= value <= high:
            self.fail(where, f"`{key}` {_is(value)}; it has to be an integer from {low} to {high}")
        return value

    def text(self, where: str, table: Mapping[str, object], key: str) -> str:
        value = table.get(key, "")
        if not isinstance(value, str):
            self.fail(where, f"`{key}` has to be a string")
        return " ".join(value.split())


class _VersionOf:
    """One version's struct out of the file's tables: what is there in that version, and only that."""

    def __init__(self, source: _Source, version: int, oldest: int, newest: int) -> None:
        self.source = source
        self.version = version
        self.oldest = oldest
        self.newest = newest

    def struct(self, table: Mapping[str, object]) -> Struct:
        fields = self.fields("", table, "field", self.oldest, 0)
        struct = self.joined(f"version {self.version}", [*fields, *self.subsections(table)])
        if struct.max_size > MAX_PAYLOAD:
            self.source.fail(
                f"version {self.version}",
                f"a state may take {struct.max_size} bytes and {MAX_PAYLOAD} is the limit; larger state is streamed",
            )
        return struct

    def subsections(self, table: Mapping[str, object]) -> list[Field]:
        found = []
        for where, entry in self.source.tables("", table, "subsection"):
            self.source.check_keys(where, entry, _SUBSECTION_KEYS)
            name = self.source.name(where, entry, "name", FIELD_NAME)
            since, until = self.range(where, entry)
            if since <= self.version <= until:
                inner = self.joined(where, self.fields(where, entry, "field", since, 1))
                doc = self.source.text(where, entry, "doc")
                found.append(Field(name, inner, None, doc=doc, optional=True))
        return found

    def fields(self, where: str, table: Mapping[str, object], key: str, born: int, depth: int) -> list[Field]:
        """The fields of a struct that is itself there since version `born`."""
        found = []
        last: dict[str, int] = {}
        for place, entry in self.source.tables(where, table, key):
            self.source.check_keys(place, entry, _FIELD_KEYS)
            name = self.source.name(place, entry, "name", FIELD_NAME)
            since, until = self.range(place, entry)
            # An older blob has no value for a new field, unless the field was another kind before.
            if since > max(born, self.oldest) and "default" not in entry and last.get(name) != since - 1:
                self.source.fail(place, f"it is new in version {since} and needs a `default`")
            last[name] = until
            if since <= self.version <= until:
                kind = self.kind(place, entry, max(born, since), depth)
                fallback = self.default(place, entry, kind)
                unit = self.source.text(place, entry, "unit")
                if not _UNIT.fullmatch(unit):
                    self.source.fail(place, f"`unit` {_is(unit)}; it has to match {_UNIT.pattern}")
                found.append(Field(name, kind, fallback, unit, self.source.text(place, entry, "doc")))
        return found

    def joined(self, where: str, fields: list[Field]) -> Struct:
        names = [entry.name for entry in fields]
        for name in names:
            if names.count(name) > 1:
                self.source.fail(where, f"{name} is there twice in version {self.version}")
        if not names:
            self.source.fail(where, f"no field in version {self.version}")
        return Struct(tuple(fields))

    def range(self, where: str, entry: Mapping[str, object]) -> tuple[int, int]:
        """The versions that an entry is part of. They may all be older than the file's oldest."""
        since = self.source.number(where, entry, "since", 1, self.newest, absent=1)
        return since, self.source.number(where, entry, "until", since, self.newest, absent=self.newest)

    def kind(self, where: str, entry: Mapping[str, object], born: int, depth: int) -> Kind:
        word = entry.get("type")
        if not isinstance(word, str):
            self.source.fail(where, f"`type` {_is(word)}; it has to be one of {', '.join(_WORDS)}")
        if depth > _MAX_DEPTH:
            self.source.fail(where, f"nested deeper than {_MAX_DEPTH} levels")
        if word in INTEGERS:
            self.only(where, entry, "min", "max")
            low, high = INTEGERS[word]
            low = self.source.number(where, entry, "min", low, high, absent=low)
            return Int(word, low, self.source.number(where, entry, "max", low, high, absent=high))
        if word == "bool":
            self.only(where, entry)
            return Bool()
        if word == "enum":
            self.only(where, entry, "values")
            return Enum(self.enum_values(where, entry))
        if word == "struct":
            self.only(where, entry, "fields")
            return self.joined(where, self.fields(where, entry, "fields", born, depth + 1))
        match = _SIZED.fullmatch(word)
        if match is None or (match[1] == "str" and match[2]):
            self.source.fail(where, f"there is no type {word[:40]!r}; there are {', '.join(_WORDS)}")
        high = int(match[2] or match[3])
        return self.sized(where, entry, match[1], high if match[2] else 0, high, born, depth)

    def sized(
        self, where: str, entry: Mapping[str, object], word: str, low: int, high: int, born: int, depth: int
    ) -> Kind:
        if word == "bytes":
            self.only(where, entry)
            return Bytes(low, high)
        if word == "str":
            self.only(where, entry)
            return Str(high)
        self.only(where, entry, "item")
        item = entry.get("item")
        if not isinstance(item, dict):
            self.source.fail(where, "a list needs `item`, a table that says what its items are")
        if high > _MAX_LIST:
            self.source.fail(where, f"a list has at most {_MAX_LIST} items; use bytes, or stream the state")
        self.source.check_keys(f"{where} item", item, _KIND_KEYS)
        return List(low, high, self.kind(f"{where} item", item, born, depth + 1))

    def only(self, where: str, entry: Mapping[str, object], *allowed: str) -> None:
        for key in ("min", "max", "values", "item", "fields"):
            if key in entry and key not in allowed:
                self.source.fail(where, f"`{key}` means nothing for {entry['type']}")

    def enum_values(self, where: str, entry: Mapping[str, object]) -> tuple[str, ...]:
        values = entry.get("values")
        if not isinstance(values, list) or not 1 <= len(values) <= _MAX_ENTRIES:
            self.source.fail(where, f"an enum needs `values`, a list of 1 to {_MAX_ENTRIES} words")
        for value in values:
            if not isinstance(value, str) or not _ENUM_VALUE.fullmatch(value):
                self.source.fail(
                    where, f"one of `values` {_is(value)}; it has to match {_ENUM_VALUE.pattern}"
                )
        if len(set(values)) != len(values):
            self.source.fail(where, "one of `values` is there twice")
        return tuple(values)

    def default(self, where: str, entry: Mapping[str, object], kind: Kind) -> object:
        if "default" not in entry:
            return kind.default()
        value = entry["default"]
        if isinstance(kind, Bytes) and isinstance(value, str):
            try:
                value = bytes.fromhex(value)
            except ValueError:
                self.source.fail(where, "`default` of bytes is a string of hexadecimal digits")
        try:
            return kind.canonical(value)
        except Wrong as wrong:
            self.source.fail(where, f"`default`{wrong.path} {wrong.text}")


def _is(value: object) -> str:
    if value is None:
        return "is not there"
    return f"is {value[:40]!r}" if isinstance(value, str) else f"is {shown(value)}"
