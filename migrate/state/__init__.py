"""A device's state: what it may be (schema), how it is written (codec, blob), which versions meet, and what a device may be doing.

kinds.py judges values; codec.py is the canonical MessagePack; schema.py puts type, version and digest to it; parse.py reads
schema files and catalog.py finds them (the only file access here); blob.py is the envelope; versions.py the rules of
compatibility; lifecycle.py the device states of VFIO migration v2. No clock, no asyncio, no sockets. Formats: docs/state.md.
"""

from migrate.state.blob import Blob, Header
from migrate.state.lifecycle import DeviceState
from migrate.state.schema import Schema, SchemaVersion

__all__ = ["Blob", "DeviceState", "Header", "Schema", "SchemaVersion"]
