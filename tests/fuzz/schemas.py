"""Invariant: a schema file is read, or refused with a SchemaError that says where; what is read has the versions it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from migrate.errors import SchemaError
from migrate.state.parse import parse

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"


def corpus() -> Sequence[bytes]:
    return [path.read_bytes() for path in sorted(SCHEMAS.glob("*.toml"))]


def schema(data: bytes) -> None:
    try:
        found = parse(data.decode("utf-8", "replace"), "fuzz.toml")
    except SchemaError as error:
        assert error.reason.startswith("fuzz.toml")
        assert error.remedy
        return
    for number in found.versions:
        version = found.at(number)
        assert version.decode(version.encode(version.defaults())) == version.defaults()
