"""The one file that imports the D-Bus library: message bodies to bytes and back, signatures, variants.

The library is dbus-next, or dbus-fast where FERRY_DBUS=fast and it is installed. Only its codec is used. Its connection is
not: link.py says why. Everything above this file sees plain Python values; a variant is only ever written, by `variant()`.
"""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import typing
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from migrate.errors import LocalProtocolError, RemoteProtocolError

FAST: Final = os.environ.get("FERRY_DBUS") == "fast" and importlib.util.find_spec("dbus_fast") is not None

#: "dbus_fast" or "dbus_next": what messages are coded with in this process.
NAME: Final = "dbus_fast" if FAST else "dbus_next"

if FAST:
    from dbus_fast._private.marshaller import Marshaller
    from dbus_fast._private.unmarshaller import Unmarshaller
    from dbus_fast.signature import SignatureTree, Variant
else:
    # dbus-next 0.2.3 imports this name, which 3.13 deprecates and 3.15 no longer has.
    if not hasattr(typing, "no_type_check_decorator"):
        typing.no_type_check_decorator = lambda decorator: decorator  # type: ignore[attr-defined,unused-ignore]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from dbus_next._private.marshaller import Marshaller
        from dbus_next._private.unmarshaller import Unmarshaller
        from dbus_next.signature import SignatureTree, Variant

#: dbus-next keeps every signature it ever met; a peer that invents new ones in variants must not fill our memory.
_MOST_SIGNATURES: Final = 1024


def variant(signature: str, value: object) -> Any:
    """A value with its type, for the `v` of a body. Raises LocalProtocolError where they do not match."""
    try:
        return Variant(signature, value)
    except Exception as error:
        raise LocalProtocolError(f"no variant of type {signature!r} can be made: {error}") from error


@lru_cache(maxsize=_MOST_SIGNATURES)
def complete_types(signature: str) -> tuple[str, ...]:
    """The complete types that a signature consists of. Raises RemoteProtocolError for one that is not valid."""
    try:
        return tuple(kind.signature for kind in SignatureTree(signature).types)
    except Exception as error:
        raise RemoteProtocolError(f"{signature!r} is not a D-Bus signature") from error


def encode_body(signature: str, body: Sequence[Any]) -> bytes | bytearray:
    """The bytes of a body, little-endian. Raises LocalProtocolError where a value does not fit its type."""
    if not signature and not body:
        return b""
    if len(complete_types(signature)) != len(body):
        raise LocalProtocolError(f"a body of {len(body)} values does not fit the signature {signature!r}")
    try:
        encoded: bytearray = Marshaller(signature, list(body)).marshall()
    except Exception as error:
        raise LocalProtocolError(f"a value does not fit the signature {signature!r}: {error}") from error
    return encoded


def decode_body(signature: str, body: bytes, big_endian: bool) -> list[Any]:
    """The values of a body, variants unwrapped, structs as lists; `h` stays an index. Raises RemoteProtocolError."""
    if not signature:
        return []
    try:
        values = _read_fast(signature, body, big_endian) if FAST else _read_next(signature, body, big_endian)
    except Exception as error:  # RecursionError, struct.error and the library's own
        raise RemoteProtocolError(
            f"a message body that does not follow its signature {signature!r}"
        ) from error
    # dbus-fast takes an empty body for any signature, and gives structs as tuples where dbus-next gives lists.
    if len(values) != len(complete_types(signature)):
        raise RemoteProtocolError(f"a message body that ends before its signature {signature!r} does")
    return [_plain(value) for value in values] if "v" in signature or "(" in signature else values


def _read_next(signature: str, body: bytes, big_endian: bool) -> list[Any]:
    if len(SignatureTree._cache) > _MOST_SIGNATURES:
        SignatureTree._cache.clear()
    reader = Unmarshaller(io.BytesIO())  # empty: a body that ends too early is an EOFError
    reader.buf = body
    reader.endian = ord("B" if big_endian else "l")
    return [reader.read_argument(kind) for kind in SignatureTree._get(signature).types]


def _read_fast(signature: str, body: bytes, big_endian: bool) -> list[Any]:
    # The compiled reader only takes whole messages, so the body gets the smallest header that carries its signature.
    message = Unmarshaller(io.BytesIO(_smallest_header(signature, len(body), big_endian) + body)).unmarshall()
    if message is None:
        raise EOFError
    values: list[Any] = message.body
    return values


def _smallest_header(signature: str, body_length: int, big_endian: bool) -> bytes:
    text = signature.encode()
    fields = bytes((8, 1, ord("g"), 0, len(text))) + text + b"\0"
    order, mark = (">", b"B") if big_endian else ("<", b"l")
    return (
        struct.pack(f"{order}cBBBIII", mark, 2, 0, 1, body_length, 1, len(fields))
        + fields
        + bytes(-len(fields) % 8)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Variant):
        return _plain(value.value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
