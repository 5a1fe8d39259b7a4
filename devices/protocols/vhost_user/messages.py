"""What is on the wire of vhost-user: the header, the payloads, their limits. No I/O.

Integers are in the host's byte order. Every `unpack` checks lengths before it uses anything. Source of the layouts: QEMU's
docs/interop/vhost-user.rst, "Message specification".
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from migrate.errors import Phase, RemoteProtocolError

Buffer = bytes | bytearray | memoryview

HEADER: Final = struct.Struct("=III")
HEADER_SIZE: Final = HEADER.size
#: No request that we take has a larger payload: a memory table of eight regions has 264 bytes, a configuration 268.
MAX_PAYLOAD: Final = 4096
#: Regions of a memory table, and so descriptors of one message.
MAX_FDS: Final = 8
MAX_CONFIG: Final = 256
VERSION, REPLY, NEED_REPLY, _VERSION_MASK = 0x1, 0x4, 0x8, 0x3


class Request(IntEnum):
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class ProtocolFeature(IntFlag):
    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    DEVICE_STATE = 1 << 19


#: Virtio feature bits that belong to vhost and not to the device.
F_LOG_ALL: Final = 1 << 26
F_PROTOCOL_FEATURES: Final = 1 << 30

_U64: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=II")
_ADDRESS: Final = struct.Struct("=IIQQQQ")
_TABLE: Final = struct.Struct("=II")
_REGION: Final = struct.Struct("=QQQQ")
_CONFIG: Final = struct.Struct("=III")
_LOG: Final = struct.Struct("=QQ")
#: QEMU pads it to a multiple of eight bytes.
_INFLIGHT: Final = struct.Struct("=QQHH4x")
_TRANSFER: Final = struct.Struct("=II")
#: A ring's number in the low bits of a u64; there is no descriptor with it where this bit is set.
_RING_MASK, _NO_FD = 0xFF, 0x100


class Header(NamedTuple):
    request: int
    flags: int
    size: int  #: of the payload

    @property
    def wants_reply(self) -> bool:
        return bool(self.flags & NEED_REPLY)


def mac(payload: Buffer) -> bytes:
    """The address that is to be announced: the first six bytes of a u64."""
    _exactly(payload, _U64.size)
    return bytes(payload[:6])


class State(NamedTuple):
    """Of a ring: a number that belongs to it."""

    ring: int
    number: int


class Addresses(NamedTuple):
    """Of a ring: where its parts are, in the front end's own addresses, but for `log`, which is the guest's."""

    ring: int
    flags: int  #: bit 0: log writes to the used ring at `log`
    descriptors: int
    used: int
    available: int
    log: int


class RegionEntry(NamedTuple):
    """A piece of guest memory."""

    gpa: int
    size: int
    user: int  #: where the front end has it mapped: rings are named by that
    offset: int  #: in its descriptor


class BadRequest(RemoteProtocolError):
    """The front end asks for what cannot be; with REPLY_ACK it is told so, else the connection ends."""

    code = "VhostUser"


def refused(reason: str) -> BadRequest:
    return BadRequest(
        reason, phase=Phase.RUNNING, remedy="look at the VMM on the other side of this vhost-user socket"
    )


def header_of(data: Buffer) -> Header:
    """:raise BadRequest: no message can begin like this; where the next begins is not known."""
    header = Header._make(HEADER.unpack_from(data))
    if header.flags & _VERSION_MASK != VERSION or header.flags & REPLY:
        raise refused(f"a message has the flags {header.flags:#x}; version 1 is spoken here")
    if header.size > MAX_PAYLOAD:
        raise refused(f"a message claims {header.size} bytes; {MAX_PAYLOAD} is the most")
    return header


def reply(request: int, payload: bytes) -> bytes:
    return HEADER.pack(request, VERSION | REPLY, len(payload)) + payload


def u64(payload: Buffer) -> int:
    _exactly(payload, _U64.size)
    value: int = _U64.unpack(payload)[0]
    return value


def pack_u64(value: int) -> bytes:
    return _U64.pack(value)


def state(payload: Buffer) -> State:
    _exactly(payload, _STATE.size)
    return State._make(_STATE.unpack(payload))


def pack_state(ring: int, number: int) -> bytes:
    return _STATE.pack(ring, number)


def addresses(payload: Buffer) -> Addresses:
    _exactly(payload, _ADDRESS.size)
    return Addresses._make(_ADDRESS.unpack(payload))


def ring_and_fd(payload: Buffer) -> tuple[int, bool]:
    """A ring's number, and whether a descriptor comes with it."""
    value = u64(payload)
    return value & _RING_MASK, not value & _NO_FD


def table(payload: Buffer) -> list[RegionEntry]:
    if len(payload) < _TABLE.size:
        raise refused(f"a memory table of {len(payload)} bytes")
    count, _ = _TABLE.unpack_from(payload)
    if count > MAX_FDS:
        raise refused(f"a memory table of {count} regions; {MAX_FDS} is the most")
    # QEMU sends room for eight whatever the count.
    if len(payload) < _TABLE.size + count * _REGION.size:
        raise refused(f"a memory table of {count} regions in {len(payload)} bytes")
    return [
        RegionEntry._make(_REGION.unpack_from(payload, _TABLE.size + at * _REGION.size))
        for at in range(count)
    ]


def region(payload: Buffer) -> RegionEntry:
    _exactly(payload, _U64.size + _REGION.size)
    return RegionEntry._make(_REGION.unpack_from(payload, _U64.size))


def config(payload: Buffer) -> tuple[int, int, bytes]:
    """Offset, size, and what follows them."""
    if len(payload) < _CONFIG.size:
        raise refused(f"a request for the configuration of {len(payload)} bytes")
    offset, size, _ = _CONFIG.unpack_from(payload)
    if size > MAX_CONFIG or offset > MAX_CONFIG or len(payload) != _CONFIG.size + size:
        raise refused(f"a request for {size} bytes of the configuration at {offset}, in {len(payload)} bytes")
    return offset, size, bytes(payload[_CONFIG.size :])


def pack_config(offset: int, data: bytes) -> bytes:
    return _CONFIG.pack(offset, len(data), 0) + data


def log_base(payload: Buffer) -> tuple[int, int]:
    """Size and offset of the log in its descriptor."""
    _exactly(payload, _LOG.size)
    size, offset = _LOG.unpack(payload)
    return size, offset


class Inflight(NamedTuple):
    """Of the in-flight region: what to map of its descriptor, and for how many queues of how many entries."""

    size: int
    offset: int
    queues: int
    entries: int


def inflight(payload: Buffer) -> Inflight:
    _exactly(payload, _INFLIGHT.size)
    return Inflight._make(_INFLIGHT.unpack(payload))


def pack_inflight(given: Inflight) -> bytes:
    return _INFLIGHT.pack(*given)


#: Directions of SET_DEVICE_STATE_FD; the device is stopped in both.
SAVE, LOAD = 0, 1


def device_state(payload: Buffer) -> int:
    """The direction."""
    _exactly(payload, _TRANSFER.size)
    direction, phase = _TRANSFER.unpack(payload)
    if direction not in (SAVE, LOAD) or phase:
        raise refused(f"a transfer of device state in direction {direction}, phase {phase}")
    return int(direction)


def _exactly(payload: Buffer, size: int) -> None:
    if len(payload) != size:
        raise refused(f"a payload of {len(payload)} bytes where {size} are agreed")
