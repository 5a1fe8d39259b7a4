"""In which versions a participant's state is written and read here, and the way between its values and a blob.

A process writes one version: the newest, or with --max-version that of an older release, which it then plays in full. It
reads that version and all before it; what an older version does not have comes in at its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from migrate.errors import DeviceRefused, Phase, UsageError
from migrate.state import blob, catalog


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
        #: The version that is written.
        self.version = self._schema.at(newest)
        #: All that are read.
        self.readable = tuple(version for version in self._schema.versions if version <= newest)

    def encode(self, values: Mapping[str, Any]) -> bytes:
        """The canonical bytes of a state. :raise BlobError: it does not fit the schema."""
        return self.version.encode(self._as_released(values))

    def write(self, values: Mapping[str, Any], version: int) -> bytes:
        """A state as a blob. :raise DeviceRefused: in that version it is not written. BlobError: it does not fit."""
        if version != self.version.version:
            raise self._refused(
                f"it writes {self.version.type} version {self.version.version}, not {version}",
                "upgrade the destination, or start this process with --max-version",
                Phase.SAVE,
            )
        return blob.write(self.version, self._id, self._as_released(values))

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
        if version.version != self._schema.version:
            return self._schema.at(self._schema.version).defaults() | values
        return values

    def _as_released(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.version.version == self._schema.version:
            return values
        # What the older release did not have is not there to be sent.
        known = {field.name for field in self.version.fields}
        return {name: value for name, value in values.items() if name in known}

    def _refused(self, reason: str, remedy: str, phase: Phase) -> DeviceRefused:
        return DeviceRefused(reason, remedy=remedy, phase=phase, device=self._id)
