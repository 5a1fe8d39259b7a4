"""In which versions a participant's state is written and read here, and the way between its values and a blob.

A process plays the newest release, or with --max-version an older one, in full. It reads the newest version of that release and
all before it, and writes the newest and those before it that its schema says are still written: what a destination asks for that
is older. The way between versions is `migrate.state.upgrades`; what would be lost on it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from migrate.errors import BlobError, DeviceRefused, Phase, UsageError
from migrate.state import blob, catalog
from migrate.state.upgrades import convert


class StateFormat:
    """The schema of one participant, as far as this process plays it."""

    def __init__(self, type_name: str, device_id: str, max_version: int | None = None) -> None:
        """:raise SchemaError: the type has no schema. UsageError: there is no such version."""
        self._id = device_id
        self._schema = catalog.load(type_name)
        newest = self._schema.version if max_version is None else max_version
        if newest not in self._schema.versions:
            raise UsageError(
                f"{type_name} has no schema version {newest}",
                remedy=f"give --max-version one of {', '.join(map(str, self._schema.versions))}",
                device=device_id,
            )
        #: The newest version that is written.
        self.version = self._schema.at(newest)
        #: All that are read.
        self.readable = tuple(version for version in self._schema.versions if version <= newest)
        #: All that are written; a release whose newest is written no more writes that one all the same.
        self.writable = tuple(number for number in self.readable if number >= self._schema.written) or (
            newest,
        )

    def write(self, values: Mapping[str, Any], version: int) -> bytes:
        """A state as a blob.

        :raise DeviceRefused: in that version it is not written. BlobError: it does not fit, or would lose something.
        """
        if version not in self.writable:
            raise self._refused(
                f"it writes {self.version.type} version {', '.join(map(str, self.writable))}, not {version}",
                "upgrade the destination, or start this process with --max-version",
                Phase.SAVE,
            )
        return blob.write(self._schema.at(version), self._id, self._in(version, values))

    def digest(self, version: int) -> bytes:
        """Of the definition of a version that is written."""
        return self._schema.at(version).digest

    def payload(self, values: Mapping[str, Any], version: int) -> bytes:
        """The canonical bytes of a state in a version that is written. :raise BlobError: as `write`."""
        return self._schema.at(version).encode(self._in(version, values))

    def _in(self, version: int, values: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return convert(self._schema, self._as_released(values), self.version.version, version)
        except BlobError as error:
            error.device = self._id
            raise

    def read(self, data: bytes) -> dict[str, Any]:
        """The state in a blob, by the newest version. :raise BlobError, DeviceRefused: it does not load here; why."""
        header = blob.header_of(data)
        if header.type == self._schema.type and header.version not in self.readable:
            raise self._refused(
                f"it reads {header.type} version {', '.join(map(str, self.readable))}, "
                f"and the blob is version {header.version}",
                "upgrade this side, or have the source write an older version",
                Phase.LOAD,
            )
        if header.instance != self._id:
            raise self._refused(
                f"the blob is the state of {header.instance!r}",
                "see that both sides use the same ids",
                Phase.LOAD,
            )
        version, values = blob.read(data, self._schema)
        return convert(self._schema, values, version.version, self._schema.version)

    def _as_released(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the release that is played would have saved."""
        newest = self._schema.version
        if self.version.version == newest:
            return values
        canonical = self._schema.at(newest).struct.canonical(values)
        return convert(self._schema, canonical, newest, self.version.version, never_had=True)

    def _refused(self, reason: str, remedy: str, phase: Phase) -> DeviceRefused:
        return DeviceRefused(reason, remedy=remedy, phase=phase, device=self._id)
