"""Where schemas are found, and nothing else. The only file of `migrate.state` that reads files and the environment.

Looked at in this order, the first that has the type wins:

1. the directories that the caller gives;
2. those in FERRY_SCHEMAS, separated by ":" as in PATH: for types of one's own;
3. the types that come with vmferry: `migrate/state/schemas` inside a wheel, `schemas` in a checkout.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from migrate.errors import SchemaError
from migrate.state.parse import parse
from migrate.state.schema import TYPE_NAME, Schema

ENVIRONMENT: Final = "FERRY_SCHEMAS"

#: The largest schema file that is read, in bytes.
_MAX_FILE: Final = 1 << 20


def load(type_name: str, extra: Sequence[Path] = ()) -> Schema:
    """The schema of a device type.

    :param extra: directories to look in first.
    :raise SchemaError: if there is none (the nearest name is given), or its file is wrong.
    """
    if TYPE_NAME.fullmatch(type_name):  # before it becomes part of a path
        for place in _places(extra):
            source = place / f"{type_name}.toml"
            if _there(source.is_file):
                return _read(type_name, source)
    near = difflib.get_close_matches(type_name[:64], types(extra), 1)
    raise SchemaError(
        f"no schema for device type {type_name[:64]!r}" + (f"; the nearest is {near[0]}" if near else ""),
        remedy=f"looked in {', '.join(map(str, _places(extra)))}; set {ENVIRONMENT} to the directory that has it",
    )


def types(extra: Sequence[Path] = ()) -> list[str]:
    """All device types that `load` finds, sorted."""
    found: set[str] = set()
    for place in _places(extra):
        if _there(place.is_dir):
            try:
                names = [entry.name for entry in place.iterdir()]
            except OSError:
                continue  # a directory that may not be listed; a type asked for by name is still found in it
            found.update(
                name[:-5] for name in names if name.endswith(".toml") and TYPE_NAME.fullmatch(name[:-5])
            )
    return sorted(found)


def _places(extra: Sequence[Path]) -> Iterator[Traversable]:
    yield from extra
    yield from (Path(entry) for entry in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if entry)
    packaged = files("migrate.state") / "schemas"
    yield packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "schemas"


def _there(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except OSError:  # a directory on the way that may not be entered
        return False


def _read(type_name: str, source: Traversable) -> Schema:
    try:
        with source.open("rb") as stream:
            data = stream.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise SchemaError(f"{source} has more than {_MAX_FILE} bytes", remedy="this is no schema file")
        schema = parse(data.decode(), str(source))
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(
            f"{source} cannot be read: {error}", remedy="correct the file or its permissions"
        ) from None
    if schema.type != type_name:
        raise SchemaError(
            f"{source} describes {schema.type!r}",
            remedy=f"call the file {schema.type}.toml, or correct its `type`",
        )
    return schema
