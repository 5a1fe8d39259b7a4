"""What a person named, and the blobs that are in it: one, those of a directory, or those in a migration stream of QEMU."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrate.errors import UsageError
from migrate.state.blob import MAX_BLOB

#: The first bytes of QEMU's migration stream (docs/qemu-stream.md).
QEMU_MAGIC: Final = b"QEVM"


@dataclass(frozen=True, slots=True)
class Item:
    """A blob, or what was given as one."""

    name: str  #: where it was found
    data: memoryview


def items(what: str, wanted: str = "") -> Sequence[Item]:
    """:param wanted: only the device of this Id. :raise UsageError: there is nothing."""
    found = _items(what)
    if wanted:
        found = [item for item in found if _instance(item.data) == wanted]
    if not found:
        raise UsageError(
            f"{what} has no blob" + (f" of a device {wanted!r}" if wanted else ""),
            remedy="name a blob, or a directory that has *.blob files in it",
        )
    return found


def one(what: str, wanted: str = "") -> Item:
    """:raise UsageError: there is none, or several."""
    found = items(what, wanted)
    if len(found) > 1:
        names = ", ".join(_instance(item.data) or item.name for item in found)
        raise UsageError(f"{what} has {len(found)} blobs: {names}"[:400], remedy="choose one by --id")
    return found[0]


def _items(what: str) -> list[Item]:
    if what == "-":
        return _of("standard input", _stdin())
    path = Path(what)
    try:
        if path.is_dir():
            return [Item(str(entry), _file(entry)) for entry in sorted(path.glob("*.blob"))]
        return _of(what, _file(path))
    except OSError as error:
        raise UsageError(
            f"{what} cannot be read: {error.strerror}", remedy="name a file that may be read"
        ) from None


def _of(name: str, data: memoryview) -> list[Item]:
    if bytes(data[: len(QEMU_MAGIC)]) == QEMU_MAGIC:
        raise UsageError(
            f"{name} is a migration stream of QEMU, which this release does not read",
            remedy="give the blobs that devices saved",
        )
    return [Item(name, data)]


def _file(path: Path) -> memoryview:
    """Mapped, not read: what is looked at is what costs memory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    except (ValueError, OSError):  # a pipe or a device: no size, no mapping
        return memoryview(_bounded(os.fdopen(os.dup(fd), "rb").read(MAX_BLOB + 1), str(path)))
    finally:
        os.close(fd)


def _stdin() -> memoryview:
    return memoryview(_bounded(sys.stdin.buffer.read(MAX_BLOB + 1), "standard input"))


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BLOB:
        raise UsageError(
            f"{name} has more than {MAX_BLOB} bytes, and no blob has", remedy="save it to a file first"
        )
    return data


def _instance(data: memoryview) -> str:
    from migrate.errors import BlobError
    from migrate.state.blob import header_of

    try:
        return header_of(bytes(data[:400])).instance
    except BlobError:
        return ""
