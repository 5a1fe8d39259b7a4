"""A state without what a guest put into it, for a report that leaves the house: the same fields, the same lengths, a valid blob.

Bytes and texts are where a guest's data lies (FIFOs, buffers, serial numbers): they become zeros and stars. Numbers, flags and enum
words tell what a device was doing and stay, unless all is to go: a processor's registers can hold a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from migrate.state.kinds import Bool, Bytes, Int, Kind, List, Str, Struct


def redact(kind: Kind, value: object, *, numbers: bool = False) -> object:
    """What is shown of a value that fits its kind; it fits it, too.

    :param numbers: numbers and flags go as well, and become what they are when nothing has happened yet.
    """
    match kind:
        case Struct() if isinstance(value, Mapping):
            kinds = {entry.name: entry.kind for entry in kind.fields}
            return {name: redact(kinds[name], item, numbers=numbers) for name, item in value.items()}
        case List() if isinstance(value, Sequence):
            return [redact(kind.item, item, numbers=numbers) for item in value]
        case Bytes() if isinstance(value, bytes):
            return bytes(len(value))
        case Str() if isinstance(value, str):
            return "*" * len(value.encode())
        case Int() | Bool() if numbers:
            return kind.default()
    return value
