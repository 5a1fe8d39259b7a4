"""What a person named, and the blobs that are in it: one, those of a directory, or those in a migration stream of QEMU.

Beside blobs there is what devices streamed (`--keep`, *.chunks). Of a QEMU of the type x-remote that is a migration stream, too.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from migrate.errors import UsageError
from migrate.qemu.stream import MAGIC as QEMU_MAGIC
from migrate.qemu.stream import StreamSummary, is_stream, read
from migrate.state import chunks
from migrate.state.blob import MAGIC, MAX_BLOB

#: What is taken of a stream on standard input; it is kept in a file while it is read.
MAX_STREAM: Final = 4 << 30
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Item:
    """A blob, or what was given as one."""

    name: str  #: where it was found
    data: memoryview
    #: Of a helper in a stream: its Id, which need not be one of our devices'.
    helper: str = ""

    @property
    def is_opaque(self) -> bool:
        """A helper's state that is no blob of ours: nothing is wrong with that."""
        return bool(self.helper) and bytes(self.data[: len(MAGIC)]) != MAGIC


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a device streamed, and was kept."""

    name: str
    count: int  #: of its chunks
    size: int  #: bytes, of all that is its own
    stream: StreamSummary | None = None  #: where it is a QEMU's
    complaint: str = ""


@dataclass(frozen=True, slots=True)
class Given:
    items: Sequence[Item]
    stream: StreamSummary | None = None  #: where they were found in a migration stream of QEMU
    streamed: Sequence[Streamed] = ()


def given(what: str, wanted: str = "") -> Given:
    """:param wanted: only the device of this Id. :raise UsageError: there is nothing."""
    found = _found(what)
    chosen = [item for item in found.items if not wanted or wanted in (item.helper, _instance(item.data))]
    streamed = [one for one in found.streamed if not wanted or Path(one.name).stem == wanted]
    if not chosen and not streamed and (wanted or found.stream is None):
        raise UsageError(
            f"{what} has no blob" + (f" of a device {wanted!r}" if wanted else ""),
            remedy="name a blob, or a directory that has *.blob files in it",
        )
    return Given(chosen, found.stream, streamed)


def one(what: str, wanted: str = "") -> Item:
    """:raise UsageError: there is none, or several."""
    found = given(what, wanted).items
    if not found:
        raise UsageError(f"{what} has no blob in it", remedy="see `ferry blob show` for what is there")
    if len(found) > 1:
        names = ", ".join(item.helper or _instance(item.data) or item.name for item in found)
        raise UsageError(f"{what} has {len(found)} blobs: {names}"[:400], remedy="choose one by --id")
    return found[0]


def _found(what: str) -> Given:
    if what == "-":
        return _stdin()
    path = Path(what)
    try:
        if path.is_dir():
            blobs = [Item(str(entry), _file(entry)) for entry in sorted(path.glob("*.blob"))]
            streamed = [_streamed(str(entry), _file(entry)) for entry in sorted(path.glob("*.chunks"))]
            return Given(blobs, streamed=streamed)
        data = _file(path)
        if bytes(data[: len(chunks.KEPT)]) == chunks.KEPT:
            return Given([], streamed=[_streamed(what, data)])
        if not is_stream(bytes(data[: len(QEMU_MAGIC)])):
            return Given([Item(what, data)])
        with path.open("rb") as file:
            return _stream(what, file)
    except OSError as error:
        raise UsageError(
            f"{what} cannot be read: {error.strerror}", remedy="name a file that may be read"
        ) from None


def _stream(name: str, file: BinaryIO) -> Given:
    summary = read(file)
    helpers = [Item(f"{name}, byte {one.offset}", memoryview(one.data), one.id) for one in summary.helpers]
    return Given(helpers, summary)


def _streamed(name: str, data: memoryview) -> Streamed:
    """Chunks as they were kept. What a bridge knows nothing of is put together again, for it may be a QEMU's stream."""
    count, size, at = 0, 0, len(chunks.KEPT)
    whole: BinaryIO | None = None
    with tempfile.TemporaryFile() as file:
        for number, chunk in enumerate(chunks.kept(data)):
            count, at = count + 1, at + chunks.KEPT_OVERHEAD + len(chunk)
            opaque = chunks.unpack(chunk)
            size += len(chunk if opaque is None else opaque.data)
            if opaque is not None:
                whole = file
                if opaque.number == 0 and number:  # the device was reset on its way
                    file.truncate(0)
                    file.seek(0)
                file.write(opaque.data)
        complaint = (
            "" if at == len(data) else f"cut off at byte {at}: {len(data) - at} bytes are no whole chunk"
        )
        if whole is None:
            return Streamed(name, count, size, complaint=complaint)
        whole.seek(0)
        head = whole.read(len(QEMU_MAGIC))
        return Streamed(name, count, size, read(whole) if is_stream(head) else None, complaint)


def _file(path: Path) -> memoryview:
    """Mapped, not read: what is looked at is what costs memory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    except (ValueError, OSError):  # a pipe or a device: no size, no mapping
        with os.fdopen(os.dup(fd), "rb") as file:
            return memoryview(_bounded(file.read(MAX_BLOB + 1), str(path)))
    finally:
        os.close(fd)


def _stdin() -> Given:
    source, name = sys.stdin.buffer, "standard input"
    head = source.read(_CHUNK)
    if not is_stream(head):
        data = _bounded(head + source.read(max(0, MAX_BLOB + 1 - len(head))), name)
        return Given([Item(name, memoryview(data))])
    with tempfile.TemporaryFile() as file:
        while head:
            if file.tell() + len(head) > MAX_STREAM:
                raise UsageError(
                    f"the stream has more than {MAX_STREAM >> 30} GiB", remedy="save it to a file first"
                )
            file.write(head)
            head = source.read(_CHUNK)
        return _stream(name, file)


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
