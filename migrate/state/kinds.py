"""What one value of a device's state may be: the kinds a schema's fields have, each with its bounds.

A kind judges and normalises values; it does not read schema files (`parse.py`) and does not know about bytes on the wire
beyond how many a value can need at most (`schema.py` encodes). Every kind is bounded, so every schema has a largest blob.

A wrong value is reported as `Wrong`, which collects its path on the way out (`.rx_fifo[3]`); `schema.py` turns it into a
BlobError. No guest data gets into the text: bytes and strings are described by their length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgpack

#: Bounds of the integer kinds.
INTEGERS: Final[Mapping[str, tuple[int, int]]] = {
    **{f"u{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    **{f"i{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
}


class Wrong(Exception):
    """A value does not fit; never leaves `migrate.state`."""

    def __init__(self, text: str, path: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.path = path

    def under(self, step: str) -> Wrong:
        """The same, seen from one level further out."""
        self.path = step + self.path
        return self


Fits = Callable[[object], bool]


class Kind(Protocol):
    """What all kinds offer. Immutable."""

    @property
    def max_size(self) -> int:
        """The most bytes that a value can take when encoded."""

    def canonical(self, value: object) -> object:
        """The value as it is encoded: plain types, fields in schema order. :raise Wrong: if it does not fit."""

    def judge(self) -> Fits:
        """Says of what msgpack has unpacked whether it is canonical as it stands. False may also be said of what only `canonical`
        can tell, or explain: this is the fast way, for the values that fit."""

    def default(self) -> object:
        """The value that means "nothing yet": zero, or the bound nearest to it."""

    def text(self) -> str:
        """The definition in canonical words: what a schema's digest is made over."""


def shown(value: object) -> str:
    """A value for an error message: short whatever it is, and without a guest's data."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case int():
            bits = value.bit_length()
            return str(int(value)) if bits <= 64 else f"an integer of {bits} bits"
        case bytes() | bytearray() | memoryview():
            return f"{len(value)} bytes"
        case str():
            return f"a string of {len(value)} characters"
        case list() | tuple():
            return f"a list of {len(value)}"
        case Mapping():
            return f"a map of {len(value)}"
    return f"a {type(value).__name__}"[:60]


def _between(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}..{high}"


def _size(value: object) -> int:
    return len(msgpack.packb(value))


def _head(count: int, small: int) -> int:
    """Bytes of a MessagePack array or map head (small: 15), or of a string head (small: 31)."""
    if count <= small:
        return 1
    if small == 31 and count < 2**8:
        return 2
    return 3 if count < 2**16 else 5


@dataclass(frozen=True, slots=True)
class Int:
    name: str  #: u8 … u64, i8 … i64
    low: int
    high: int

    @property
    def max_size(self) -> int:
        return max(_size(self.low), _size(self.high))

    def canonical(self, value: object) -> int:
        # A bool is an int to Python; to a schema it is a mistake. Int enums and flags are fine and become plain.
        if type(value) is not int:
            if isinstance(value, bool) or not isinstance(value, int):
                raise Wrong(f"is {shown(value)}, not an integer of {self.low}..{self.high} ({self.name})")
            value = int(value)
        if not self.low <= value <= self.high:
            raise Wrong(f"is {shown(value)}, outside {self.low}..{self.high}")
        return value

    def judge(self) -> Fits:
        low, high = self.low, self.high
        return lambda value: type(value) is int and low <= value <= high

    def default(self) -> int:
        return min(max(0, self.low), self.high)

    def text(self) -> str:
        return f"{self.name} {self.low}..{self.high}"


@dataclass(frozen=True, slots=True)
class Bool:
    @property
    def max_size(self) -> int:
        return 1

    def canonical(self, value: object) -> bool:
        if value is True or value is False:
            return value
        raise Wrong(f"is {shown(value)}, not true or false")

    def judge(self) -> Fits:
        return lambda value: value is True or value is False

    def default(self) -> bool:
        return False

    def text(self) -> str:
        return "bool"


@dataclass(frozen=True, slots=True)
class Bytes:
    low: int  #: in bytes; equal to `high` for a fixed length
    high: int

    @property
    def max_size(self) -> int:
        return (2 if self.high < 2**8 else 3 if self.high < 2**16 else 5) + self.high

    def canonical(self, value: object) -> bytes:
        if type(value) is not bytes:
            if not isinstance(value, (bytes, bytearray, memoryview)):
                raise Wrong(f"is {shown(value)}, not {_between(self.low, self.high)} bytes")
            value = bytes(value)
        if not self.low <= len(value) <= self.high:
            raise Wrong(f"has {len(value)} bytes, not {_between(self.low, self.high)}")
        return value

    def judge(self) -> Fits:
        low, high = self.low, self.high
        return lambda value: type(value) is bytes and low <= len(value) <= high

    def default(self) -> bytes:
        return bytes(self.low)

    def text(self) -> str:
        return f"bytes {self.low}..{self.high}"


@dataclass(frozen=True, slots=True)
class Str:
    high: int  #: in bytes of UTF-8

    @property
    def max_size(self) -> int:
        return _head(self.high, 31) + self.high

    def canonical(self, value: object) -> str:
        if not isinstance(value, str):
            raise Wrong(f"is {shown(value)}, not a string of at most {self.high} bytes")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise Wrong("is a string with half a surrogate pair, which has no UTF-8") from None
        if size > self.high:
            raise Wrong(f"has {size} bytes of UTF-8, more than {self.high}")
        return str(value)

    def judge(self) -> Fits:
        high = self.high
        # What is not ASCII is for `canonical`, which measures its UTF-8 and finds halves of surrogate pairs.
        return lambda value: type(value) is str and value.isascii() and len(value) <= high

    def default(self) -> str:
        return ""

    def text(self) -> str:
        return f"str 0..{self.high}"


@dataclass(frozen=True, slots=True)
class Enum:
    values: tuple[str, ...]  #: encoded as these words, so that a blob can be read without its schema

    @property
    def max_size(self) -> int:
        return max(_size(value) for value in self.values)

    def canonical(self, value: object) -> str:
        if not isinstance(value, str):
            raise Wrong(f"is {shown(value)}, not one of {', '.join(self.values)}")
        if value not in self.values:
            raise Wrong(f"is {value[:40]!r}, not one of {', '.join(self.values)}")
        return str(value)

    def judge(self) -> Fits:
        words = frozenset(self.values)
        return lambda value: type(value) is str and value in words

    def default(self) -> str:
        return self.values[0]

    def text(self) -> str:
        return f"enum {' '.join(self.values)}"


@dataclass(frozen=True, slots=True)
class List:
    low: int  #: items; equal to `high` for a fixed length
    high: int
    item: Kind

    @property
    def max_size(self) -> int:
        return _head(self.high, 15) + self.high * self.item.max_size

    def canonical(self, value: object) -> list[object]:
        if not isinstance(value, (list, tuple)):
            raise Wrong(f"is {shown(value)}, not a list of {_between(self.low, self.high)}")
        if not self.low <= len(value) <= self.high:
            raise Wrong(f"has {len(value)} items, not {_between(self.low, self.high)}")
        canonical = self.item.canonical
        result: list[object] = []
        try:
            for item in value:
                result.append(canonical(item))  # noqa: PERF401  # len(result) names the item that is wrong
        except Wrong as wrong:
            raise wrong.under(f"[{len(result)}]") from None
        return result

    def judge(self) -> Fits:
        low, high, item = self.low, self.high, self.item.judge()
        if not isinstance(self.item, Int):
            return lambda value: type(value) is list and low <= len(value) <= high and all(map(item, value))
        least, most = self.item.low, self.item.high

        def numbers(value: object) -> bool:
            if type(value) is not list or not low <= len(value) <= high:
                return False
            return not value or (
                set(map(type, value)) == _INTS and least <= min(value) and max(value) <= most
            )

        return numbers

    def default(self) -> list[object]:
        return [self.item.default() for _ in range(self.low)]

    def text(self) -> str:
        return f"list {self.low}..{self.high} of {self.item.text()}"


@dataclass(frozen=True, slots=True)
class Field:
    """One named value of a struct, or (optional) a subsection: a struct that is only there when it is needed."""

    name: str
    kind: Kind
    fallback: object  #: what `default` says in the schema file, or the kind's own
    unit: str = ""
    doc: str = ""
    optional: bool = False

    def text(self) -> str:
        word = "subsection" if self.optional else "field"
        return f"{word} {self.name} {self.kind.text()}" + (f" in {self.unit}" if self.unit else "")


_MISSING: Final = object()
_INTS: Final = {int}


def _fields_fit(fields: tuple[Field, ...]) -> Fits:
    """For a map with exactly these fields in this order. Integers, the most by far, are judged without a call each."""
    names = [entry.name for entry in fields]
    steps = tuple(
        (entry.name, entry.kind.low, entry.kind.high, None)
        if isinstance(entry.kind, Int)
        else (entry.name, 0, 0, entry.kind.judge())
        for entry in fields
    )

    def fits(value: object) -> bool:
        if type(value) is not dict or [*value] != names:
            return False
        for name, low, high, judge in steps:
            item = value[name]
            if judge is None:
                if type(item) is not int or not low <= item <= high:
                    return False
            elif not judge(item):
                return False
        return True

    return fits


@dataclass(frozen=True, slots=True)
class Struct:
    fields: tuple[Field, ...]
    #: (name, judge, optional): what canonical() walks, without an attribute look-up a field.
    _steps: tuple[tuple[str, Callable[[object], object], bool], ...] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        steps = tuple((entry.name, entry.kind.canonical, entry.optional) for entry in self.fields)
        object.__setattr__(self, "_steps", steps)

    @property
    def max_size(self) -> int:
        return _head(len(self.fields), 15) + sum(
            _size(entry.name) + entry.kind.max_size for entry in self.fields
        )

    def canonical(self, value: object) -> dict[str, object]:
        if type(value) is not dict and not isinstance(value, Mapping):
            raise Wrong(f"is {shown(value)}, not a map of fields")
        result: dict[str, object] = {}
        name = ""
        try:
            for name, canonical, optional in self._steps:
                item = value.get(name, _MISSING)
                if item is _MISSING or (optional and item is None):
                    if not optional:
                        raise Wrong("is missing")
                else:
                    result[name] = canonical(item)
        except Wrong as wrong:
            raise wrong.under(f".{name}") from None
        if len(value) != len(result):
            known = {entry.name for entry in self.fields}
            for key in value:
                if key not in known:
                    raise Wrong(
                        "is not in the schema", f".{key[:40]}" if isinstance(key, str) else f".({shown(key)})"
                    )
        return result

    def judge(self) -> Fits:
        always = tuple(entry for entry in self.fields if not entry.optional)
        required = _fields_fit(always)
        if len(always) == len(self.fields):
            return required
        every = _fields_fit(self.fields)
        # Subsections come last: none of them, or all, are seen at once. Some of them are for `canonical`.
        return lambda value: required(value) or every(value)

    def default(self) -> dict[str, object]:
        # Judged again for its copy: a list handed out must not be the schema's own.
        return {
            entry.name: entry.kind.canonical(entry.fallback) for entry in self.fields if not entry.optional
        }

    def text(self) -> str:
        return "struct {" + "".join(f" {entry.text()};" for entry in self.fields) + " }"
