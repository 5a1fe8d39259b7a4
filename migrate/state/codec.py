"""The canonical MessagePack of a struct: exactly one sequence of bytes for a state, and every other refused.

It stands between `kinds.py`, which judges values, and `schema.py`, which knows types and versions and makes readable errors of
`Wrong`. It is the only file of `migrate.state` that unpacks hostile bytes: whatever msgpack raises ends here. The rules of the
canonical form are in docs/state.md; the envelope around the bytes is `blob.py`.

How hostile bytes are kept from costing memory: there are never more of them than the schema can need; no list's head may claim
much more than the schema allows (msgpack allocates by that claim); and above 1 MiB there may be no more lists and maps than the
schema allows (each costs 56 bytes or more, and one byte can be a list).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NoReturn

import msgpack

from migrate.state.kinds import Bytes, Enum, Kind, List, Str, Struct, Wrong

#: Up to this many bytes of payload, lists and maps are not counted: they cannot cost more than 72 MiB.
_UNCOUNTED: Final = 1 << 20

#: Up to this many bytes no limits are given to msgpack, which takes the number of bytes for each: 512 lists in each other may claim
#: that many items, which costs 16 MiB. Giving it limits takes as long as unpacking the state of a small device.
_SMALL: Final = 4096

#: The largest state that a buffer is kept for, in bytes.
_KEPT: Final = 64 << 10

#: How much more than the schema allows a head may claim, so that a little too much is judged by `kinds.py`, which names the path.
_SLACK: Final = 64


class Codec:
    """Encoding and decoding of one struct.

    :ivar max_size: the most bytes that a state can take.
    """

    def __init__(self, struct: Struct) -> None:
        self._struct = struct
        self._fits = struct.judge()
        self.max_size = struct.max_size
        # For plain values msgpack gives the shortest form of everything, which is the canonical one.
        # A packer of its own for small states: making one takes as long as packing a few registers. Its buffer stays as large as
        # the largest that it packed. Packing holds the GIL, so threads may share it.
        self._pack: Callable[[object], bytes] = (
            msgpack.Packer(buf_size=self.max_size).pack if self.max_size <= _KEPT else msgpack.packb
        )
        limits = _Limits()
        limits.look(struct)
        self._containers = limits.containers
        self._list = limits.list + _SLACK
        self._others = {
            "max_map_len": limits.map + _SLACK,
            "max_str_len": limits.str + _SLACK,
            "max_bin_len": limits.bin + _SLACK,
            "max_ext_len": 0,
        }

    def encode(self, values: Mapping[str, object]) -> bytes:
        """:raise Wrong: if a value does not fit."""
        return self._pack(values if self._fits(values) else self._struct.canonical(values))

    def decode(self, data: bytes) -> dict[str, object]:
        """:raise Wrong: if the bytes are not what `encode` gives for some state."""
        if len(data) > self.max_size:
            raise Wrong(f"has {len(data)} bytes, and {self.max_size} is the most that one can have")
        hooks = _counting(self._containers) if len(data) > _UNCOUNTED else {}
        unpacked = self._unpack(data, hooks)
        value = unpacked if self._fits(unpacked) else self._struct.canonical(unpacked)
        again = self._pack(value)
        if again != data:
            self._explain(data, again)
        return value  # type: ignore[return-value]  # a dict: it fits a struct

    def _unpack(self, data: bytes, hooks: Mapping[str, Callable[..., object]]) -> object:
        longest = min(self._list, len(data))
        try:
            if len(data) <= _SMALL and not hooks:
                return msgpack.unpackb(data)  # extensions are found by whoever judges what comes out
            return msgpack.unpackb(
                data, max_array_len=longest, ext_hook=_no_extension, **self._others, **hooks
            )
        except (msgpack.UnpackException, ValueError) as error:
            # msgpack's own text may quote the data, which is a guest's; the name of its class says enough.
            what = type(error).__name__
            raise Wrong(
                f"of {len(data)} bytes is not MessagePack within the schema's limits ({what})"
            ) from None

    def _explain(self, data: bytes, again: bytes) -> NoReturn:
        """Say why a state that fits is not canonical."""
        _regular(self._struct, self._unpack(data, {"object_pairs_hook": list}), "")
        where = next((at for at, (a, b) in enumerate(zip(again, data, strict=False)) if a != b), len(again))
        raise Wrong(f"is not in its shortest form at byte {where}")


class _Limits:
    """The longest of each kind in a schema, and how many lists and maps a state can have."""

    def __init__(self) -> None:
        self.list = self.map = self.str = self.bin = self.containers = 0

    def look(self, kind: Kind, times: int = 1) -> None:
        match kind:
            case List():
                self.containers += times
                self.list = max(self.list, kind.high)
                self.look(kind.item, times * kind.high)
            case Struct():
                self.containers += times
                self.map = max(self.map, len(kind.fields))
                for entry in kind.fields:
                    self.str = max(self.str, len(entry.name))
                    self.look(entry.kind, times)
            case Str():
                self.str = max(self.str, kind.high)
            case Enum():
                self.str = max(self.str, *map(len, kind.values))
            case Bytes():
                self.bin = max(self.bin, kind.high)


def _no_extension(code: int, _data: bytes) -> object:
    raise ValueError(f"extension type {code}")


def _counting(limit: int) -> dict[str, Callable[..., object]]:
    seen = 0

    def count(container: object) -> object:
        nonlocal seen
        seen += 1
        if seen > limit:
            raise ValueError("too many lists and maps")
        return container

    return {"list_hook": count, "object_hook": count}


def _regular(kind: Kind, raw: object, path: str) -> None:
    """Check the fields' order in a state that fits, its maps as lists of pairs. A field given twice hid its first value from
    the judge, so a level's names are looked at before anything is taken to be what its kind says.

    :raise Wrong: with the path of a field that is out of order or given twice.
    """
    if isinstance(kind, Struct) and isinstance(raw, list):
        order = {entry.name: at for at, entry in enumerate(kind.fields)}
        last = -1
        seen = set()
        for name, _ in raw:
            if name in seen:
                raise Wrong("is given twice", f"{path}.{name}")
            if order[name] < last:
                raise Wrong("is out of order", f"{path}.{name}")
            seen.add(name)
            last = order[name]
        for name, item in raw:
            _regular(kind.fields[order[name]].kind, item, f"{path}.{name}")
    elif isinstance(kind, List) and isinstance(raw, list):
        for at, item in enumerate(raw):
            _regular(kind.item, item, f"{path}[{at}]")
