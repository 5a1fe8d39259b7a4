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
    #: What the server asks of the client goes over a second socket, so that neither has to tell commands from replies.
    twin_socket: bool = False
    #: In a server's reply: which of its descriptors is the client's end of that socket. -1: none.
    twin_fd_index: int = -1

    def to_json(self) -> dict[str, object]:
        values: dict[str, object] = {name: getattr(self, name) for name in (*_NUMBERS, "write_multiple")}
        if self.twin_socket:
            index = {} if self.twin_fd_index < 0 else {"fd_index": self.twin_fd_index}
            values["twin_socket"] = {"supported": True, **index}
        return values

    @classmethod
    def from_json(cls, values: dict[str, object]) -> Self:
        """Unknown ones are skipped: a newer peer may have more."""

        twin = values.get("twin_socket", {})
        if not isinstance(twin, dict):
            raise invalid("capability twin_socket is no object")
        return cls(
            **{name: _number(values, name, cls._field_defaults[name]) for name in _NUMBERS},
            write_multiple=_boolean(values, "write_multiple"),
            twin_socket=_boolean(twin, "supported"),
            twin_fd_index=_number(twin, "fd_index", -1),
        )


_NUMBERS = ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes")


def _number(values: dict[str, object], name: str, otherwise: int) -> int:
    if name not in values:
        return otherwise
    value = values[name]
    # JSON's true is an int to Python.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise invalid(f"capability {name} is not a number that makes sense")
    return value


def _boolean(values: dict[str, object], name: str) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise invalid(f"capability {name} is neither true nor false")
    return value


#: What this implementation can take, as server and as client. A twin socket is proposed by a client that wants one.
OURS = Capabilities(
    max_msg_fds=MAX_FDS, max_data_xfer_size=MAX_DATA, max_dma_maps=MAX_DMA_MAPS, write_multiple=True
)


def agree(client: Capabilities) -> Capabilities:
    """What a server answers: of what both share no more than was proposed; what it can take itself as it is.

    vfio-user.rst, VFIO_USER_VERSION: "The capability list must be a subset of those proposed".

    :raise RequestError: there is no page size in common.
    """
    pgsizes = OURS.pgsizes & client.pgsizes
    if not pgsizes:
        raise invalid(
            f"the client maps pages of sizes {client.pgsizes:#x}, and {OURS.pgsizes:#x} are known here"
        )
    return OURS._replace(
        max_dma_maps=min(OURS.max_dma_maps, client.max_dma_maps),
        pgsizes=pgsizes,
        write_multiple=client.write_multiple,
    )


class Version(NamedTuple):
    major: int
    minor: int
    capabilities: Capabilities = Capabilities()

    def encode(self) -> bytes:
        data = json.dumps({"capabilities": self.capabilities.to_json()}, separators=(",", ":"))
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
