"""A device type's schema and its versions: what states there are, which bytes they are, and how a definition is told from another.

Reading schema files is `parse.py`, finding them `catalog.py`, the bytes `codec.py`, the envelope around them `blob.py`. What
schemas mean for people who write them is in docs/state.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Final

from migrate.errors import BlobError, Phase, SchemaError
from migrate.state.codec import Codec
from migrate.state.kinds import Field, Struct, Wrong

#: What a device type may be called; also a part of file names.
TYPE_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")

#: The largest encoded state that a schema may allow, in bytes. What is larger is streamed (DESIGN 2.3).
MAX_PAYLOAD: Final = 16 << 20


class SchemaVersion:
    """One version of one type. Immutable, and once released the same for ever: `digest` is what tells.

    :ivar type: the device type's name.
    :ivar version: from 1 up.
    :ivar struct: its fields, in the order in which they are encoded; subsections come last.
    :ivar max_size: the most bytes that `encode` can give.
    """

    def __init__(self, type_name: str, version: int, struct: Struct) -> None:
        self.type = type_name
        self.version = version
        self.struct = struct
        self._codec = Codec(struct)
        self.max_size = self._codec.max_size

    def __repr__(self) -> str:
        return f"<SchemaVersion {self.type} v{self.version} {self.digest.hex()[:8]}>"

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.struct.fields

    @cached_property
    def definition(self) -> str:
        """The canonical words of this version: names, kinds, bounds and units in order; no docs and no defaults."""
        lines = [f"vmferry schema {self.type} version {self.version}"]
        lines += [entry.text() for entry in self.fields]
        return "\n".join(lines) + "\n"

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of `definition`: 32 bytes."""
        return hashlib.sha256(self.definition.encode()).digest()

    def defaults(self) -> dict[str, object]:
        """A state in which nothing has happened yet: every field's default, no subsection. Each call gives a new one."""
        return self.struct.default()

    def encode(self, values: Mapping[str, object]) -> bytes:
        """The canonical bytes of a state. A subsection that is absent or None is not sent.

        :raise BlobError: if a value does not fit; names its path.
        """
        try:
            return self._codec.encode(values)
        except Wrong as wrong:
            raise BlobError(
                f"{wrong.path or 'the state'} {wrong.text}; it cannot be written as {self.type} version {self.version}",
                remedy="the device's save() and its schema disagree: correct one of them",
                phase=Phase.SAVE,
            ) from None

    def decode(self, data: bytes) -> dict[str, object]:
        """The state in these bytes: every field and only fields of this version, each within its bounds.

        :raise BlobError: if the bytes are not the canonical encoding of such a state; names the path or the offset.
        """
        try:
            return self._codec.decode(data)
        except Wrong as wrong:
            raise BlobError(
                f"{wrong.path or 'the state'} {wrong.text}; it cannot be read as {self.type} version {self.version}",
                remedy="the blob is damaged, or what wrote it does not keep to the schema; nothing was loaded",
                phase=Phase.LOAD,
            ) from None


class Schema:
    """All versions of one device type that its schema file describes.

    :ivar type: the device type's name.
    :ivar doc: what it is, in a sentence or two.
    :ivar versions: all of them, oldest first, without gaps.
    :ivar version: the newest.
    :ivar written: the oldest that programs of today still write; older ones are read only.
    """

    def __init__(
        self, type_name: str, doc: str, versions: Mapping[int, SchemaVersion], written: int = 0
    ) -> None:
        self.type = type_name
        self.doc = doc
        self.versions = tuple(sorted(versions))
        self.version = self.versions[-1]
        self.written = written or self.versions[0]
        self._versions = dict(versions)

    def __repr__(self) -> str:
        return f"<Schema {self.type} {self.versions}>"

    def at(self, version: int) -> SchemaVersion:
        """One version. :raise SchemaError: if there is no such version."""
        try:
            return self._versions[version]
        except KeyError:
            known = ", ".join(map(str, self.versions))
            raise SchemaError(
                f"{self.type} has no schema version {version}; known here: {known}",
                remedy="use a program that knows that version, or have one of these written",
            ) from None
