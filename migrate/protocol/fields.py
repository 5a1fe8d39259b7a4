"""What a field of a message may hold: bounded kinds that check a value, name what is wrong with it, and say themselves in words.

The words are what docs/protocol.md has in its table, so bounds are written down once. Sans-IO; knows no message.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from migrate.errors import Phase, Reason, RemoteProtocolError

MAX_REASONS = 1024


def bad(where: str, why: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"the peer sent a message whose {where} {why}",
        phase=Phase.PREFLIGHT,
        remedy="check that both hosts run versions of vmferry that talk to each other",
    )


class Check(ABC):
    """Call it with a value and the field's path: the value as the message keeps it, or RemoteProtocolError."""

    @abstractmethod
    def __call__(self, value: object, where: str) -> object: ...

    @abstractmethod
    def __str__(self) -> str:
        """For docs/protocol.md."""


@dataclass(frozen=True, slots=True)
class Int(Check):
    limit: int  #: the first that is too large

    def __call__(self, value: object, where: str) -> object:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self.limit:
            raise bad(where, f"is not an integer from 0 to {self.limit - 1}")
        return value

    def __str__(self) -> str:
        return f"u{self.limit.bit_length() - 1}"


@dataclass(frozen=True, slots=True)
class Text(Check):
    limit: int  #: characters

    def __call__(self, value: object, where: str) -> object:
        if not isinstance(value, str) or len(value) > self.limit:
            raise bad(where, f"is not a text of at most {self.limit} characters")
        return value

    def __str__(self) -> str:
        return f"text ≤ {self.limit}"


@dataclass(frozen=True, slots=True)
class Bytes(Check):
    limit: int
    exactly: bool = False

    def __call__(self, value: object, where: str) -> object:
        if (
            not isinstance(value, bytes)
            or len(value) > self.limit
            or (self.exactly and len(value) != self.limit)
        ):
            raise bad(where, f"is not {'' if self.exactly else 'at most '}{self.limit} bytes")
        return value

    def __str__(self) -> str:
        return f"{self.limit} bytes" if self.exactly else f"bytes ≤ {self.limit}"


@dataclass(frozen=True, slots=True)
class Bool(Check):
    def __call__(self, value: object, where: str) -> object:
        if not isinstance(value, bool):
            raise bad(where, "is not true or false")
        return value

    def __str__(self) -> str:
        return "bool"


@dataclass(frozen=True, slots=True)
class List(Check):
    item: Check
    limit: int
    exactly: bool = False

    def __call__(self, value: object, where: str) -> object:
        if (
            not isinstance(value, list | tuple)
            or len(value) > self.limit
            or (self.exactly and len(value) != self.limit)
        ):
            raise bad(where, f"is not a list of {'' if self.exactly else 'at most '}{self.limit}")
        return tuple(self.item(entry, f"{where}[{index}]") for index, entry in enumerate(value))

    def __str__(self) -> str:
        return f"{self.limit} × ({self.item})" if self.exactly else f"list ≤ {self.limit} of ({self.item})"


@dataclass(frozen=True, slots=True)
class Map(Check):
    key: Check
    item: Check
    limit: int

    def __call__(self, value: object, where: str) -> object:
        if not isinstance(value, Mapping) or len(value) > self.limit:
            raise bad(where, f"is not a map of at most {self.limit}")
        return {
            self.key(key, f"{where}'s key"): self.item(entry, f"{where}.{key}")
            for key, entry in value.items()
        }

    def __str__(self) -> str:
        return f"map ≤ {self.limit} of ({self.key}) to ({self.item})"


@dataclass(frozen=True, slots=True)
class Struct(Check):
    kind: type[Any]  #: a dataclass made of spec()s

    def __call__(self, value: object, where: str) -> object:
        return value if isinstance(value, self.kind) else build(self.kind, value, where)

    def __str__(self) -> str:
        return self.kind.__name__


@dataclass(frozen=True, slots=True)
class Reasons(Check):
    """Reasons are shown, not obeyed: one that is odd is cut or named (Reason.from_wire), never a breach."""

    limit: int = MAX_REASONS

    def __call__(self, value: object, where: str) -> object:
        if not isinstance(value, list | tuple) or len(value) > self.limit:
            raise bad(where, f"is not a list of at most {self.limit} reasons")
        return tuple(entry if isinstance(entry, Reason) else Reason.from_wire(entry) for entry in value)

    def __str__(self) -> str:
        return f"list ≤ {self.limit} of Reason"


def spec(check: Check) -> Any:
    """The field of a dataclass, with its check."""
    return field(metadata={"check": check})


def checks(kind: type[Any]) -> dict[str, Check]:
    return {item.name: item.metadata["check"] for item in fields(kind)}


def build(kind: type[Any], value: object, where: str) -> Any:
    """A dataclass from a map that has exactly its fields.

    :raises RemoteProtocolError: naming the field that is unknown, missing or not what it should be.
    """
    if not isinstance(value, Mapping):
        raise bad(where, "is not a map")
    wanted = checks(kind)
    for key in value:
        if key not in wanted:
            raise bad(where, f"has an unknown field {str(key)[:40]!r}")
    for name in wanted:
        if name not in value:
            raise bad(where, f"lacks the field {name!r}")
    return kind(**{name: check(value[name], f"{where}.{name}") for name, check in wanted.items()})


def plain(value: object) -> object:
    """A value as MessagePack writes it."""
    if isinstance(value, Reason):
        return value.to_wire()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}  # type: ignore[arg-type]
    return value
