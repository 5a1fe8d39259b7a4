"""The first 32 bytes of every connection, in the clear: where a host's daemon must route it. Sans-IO.

    offset  size  field
         0     8  magic, b"VMFERRY\\x01": the last byte is the preamble's version
         8     1  kind: 0 control, 1 page
         9     1  index of the page channel; 0 for control
        10     6  zero
        16    16  session id

It authenticates nothing: whoever may talk is decided by TLS afterwards, and `tls` carries the same 32 bytes once more
inside, so that nobody on the way can send a channel to another session.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from migrate.errors import LocalProtocolError, RemoteProtocolError

VERSION = 1
MAGIC = b"VMFERRY"
SIZE = 32
SESSION_SIZE = 16

_LAYOUT = struct.Struct("!7sBBB6s16s")

_HTTP = (b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI", b"CONN", b"PRI ", b"DELE", b"HTTP")


class Kind(IntEnum):
    CONTROL = 0  #: frames of one migration, or a question about one
    PAGE = 1  #: pages of guest memory


@dataclass(frozen=True, slots=True)
class Preamble:
    kind: Kind
    index: int
    session: bytes


def encode(preamble: Preamble) -> bytes:
    """The 32 bytes of a preamble.

    :raise LocalProtocolError: an index that is not 0 to 255 (0 for control), or a session id that is not 16 bytes.
    """
    if len(preamble.session) != SESSION_SIZE:
        raise LocalProtocolError(f"a session id has {SESSION_SIZE} bytes, not {len(preamble.session)}")
    if not 0 <= preamble.index <= (255 if preamble.kind is Kind.PAGE else 0):
        raise LocalProtocolError(
            f"a {preamble.kind.name.lower()} channel cannot have the index {preamble.index}"
        )
    return _LAYOUT.pack(MAGIC, VERSION, preamble.kind, preamble.index, bytes(6), preamble.session)


def decode(data: bytes) -> Preamble:
    """Read a preamble; `data` may be short when the peer closed early.

    :raise RemoteProtocolError: it is anything else than the 32 bytes of version 1; says what it looks like.
    """
    if not data.startswith(MAGIC[: len(data)]):
        raise RemoteProtocolError(
            f"the peer is not a vmferry: {_looks_like(data)}",
            remedy="give this port to `ferry migrate --to` only",
        )
    if len(data) != SIZE:
        raise RemoteProtocolError(
            f"the peer closed the connection after {len(data)} of the first {SIZE} bytes",
            remedy="if that was not a port scan, look at the log of the peer",
        )
    _, version, kind, index, zero, session = _LAYOUT.unpack(data)
    if version != VERSION:
        raise RemoteProtocolError(
            f"the peer's connection begins with version {version} of the preamble, this side knows {VERSION}",
            remedy="install versions of vmferry on both hosts that know a common one",
        )
    if kind not in tuple(Kind) or zero != bytes(6) or (kind == Kind.CONTROL and index):
        raise RemoteProtocolError(
            f"the peer asks for a channel that does not exist (kind {kind}, index {index})",
            remedy="install the same version of vmferry on both hosts",
        )
    return Preamble(Kind(kind), index, session)


def _looks_like(data: bytes) -> str:
    if data.startswith(_HTTP):
        return "it speaks HTTP"
    if data.startswith(b"SSH-"):
        return "it speaks SSH"
    if data.startswith(b"\x16\x03"):
        return "it began with TLS at once (a browser, a probe?)"
    return f"it began with {data[:8]!r}"
