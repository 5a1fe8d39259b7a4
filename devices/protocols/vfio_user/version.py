"""VERSION, the first message of a vfio-user connection: which protocol both sides speak, and what each can take. No I/O."""

from __future__ import annotations

import json
import struct
from typing import NamedTuple, Self

from devices.protocols.vfio_user.messages import MAX_DATA, MAX_DMA_MAPS, MAX_FDS, PAGE_SIZE, Buffer, invalid

MAJOR = 0
#: libvfio-user's minor version; QEMU proposes 0.0, which is served just as well.
MINOR = 1

_VERSION = struct.Struct("=HH")
#: Longest version data. What the specification defines takes some 200 bytes.
MAX_VERSION_DATA = 4096


class Capabilities(NamedTuple):
    """What one side can take. The defaults are those of a peer that says nothing."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = MAX_DATA
    max_dma_maps: int = 65535
    pgsizes: int = PAGE_SIZE
    write_multiple: bool = False

    @classmethod
    def from_json(cls, values: dict[str, object]) -> Self:
        """Unknown ones are skipped: a newer peer may have more."""

        def number(name: str) -> int:
            value = values.get(name, cls._field_defaults[name])
            # JSON's true is an int to Python.
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
                raise invalid(f"capability {name} is not a number that makes sense")
            return value

        multiple = values.get("write_multiple", False)
        if not isinstance(multiple, bool):
            raise invalid("capability write_multiple is neither true nor false")
        return cls(
            number("max_msg_fds"),
            number("max_data_xfer_size"),
            number("max_dma_maps"),
            number("pgsizes"),
            multiple,
        )


OURS = Capabilities(max_msg_fds=MAX_FDS, max_data_xfer_size=MAX_DATA, max_dma_maps=MAX_DMA_MAPS)


class Version(NamedTuple):
    major: int
    minor: int
    capabilities: Capabilities = Capabilities()

    def encode(self) -> bytes:
        data = json.dumps({"capabilities": self.capabilities._asdict()}, separators=(",", ":"))
        return _VERSION.pack(self.major, self.minor) + data.encode() + b"\0"

    @classmethod
    def decode(cls, payload: Buffer) -> Self:
        if not _VERSION.size <= len(payload) <= _VERSION.size + MAX_VERSION_DATA:
            raise invalid(f"a VERSION of {len(payload)} bytes")
        major, minor = _VERSION.unpack_from(payload)
        data = bytes(payload[_VERSION.size :])
        if not data:
            return cls(major, minor)
        if data.find(b"\0") != len(data) - 1:
            raise invalid("the version data does not end with its only NUL")
        try:
            document = json.loads(data[:-1])
        except (ValueError, RecursionError) as error:
            raise invalid("the version data is not JSON") from error
        wanted = document.get("capabilities", {}) if isinstance(document, dict) else None
        if not isinstance(wanted, dict):
            raise invalid("the version data has no object 'capabilities'")
        return cls(major, minor, Capabilities.from_json(wanted))
