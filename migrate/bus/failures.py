"""Errors on the bus: which D-Bus error stands for which of ours, both ways. No I/O.

Ours travel as `org.vmferry.Error.<code>` with all reasons as JSON in the text. What a device says is shown, not obeyed: it
may speak for itself only, and cannot claim an outcome of the whole migration such as "in doubt".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from migrate.errors import (
    MAX_TEXT,
    DeviceError,
    DeviceGone,
    DeviceRefused,
    FerryError,
    IncompatibleError,
    MemoryFault,
    Phase,
    Reason,
    StateError,
)

PREFIX: Final = "org.vmferry.Error."
INTERNAL: Final = PREFIX + "Internal"

_STANDARD: Final = "org.freedesktop.DBus.Error."
INVALID_ARGS: Final = _STANDARD + "InvalidArgs"
UNKNOWN_METHOD: Final = _STANDARD + "UnknownMethod"
UNKNOWN_OBJECT: Final = _STANDARD + "UnknownObject"
UNKNOWN_INTERFACE: Final = _STANDARD + "UnknownInterface"
UNKNOWN_PROPERTY: Final = _STANDARD + "UnknownProperty"
PROPERTY_READ_ONLY: Final = _STANDARD + "PropertyReadOnly"

#: What the bus itself answers for a process that is not there any more.
_GONE: Final = frozenset(
    _STANDARD + name for name in ("NoReply", "NameHasNoOwner", "ServiceUnknown", "Disconnected")
)
#: What a device may say about itself.
_OF_DEVICES: Final = (DeviceError, StateError, MemoryFault)
_MOST_TEXT: Final = 64 << 10
_MOST_REASONS: Final = 64


class CallRefused(Exception):
    """A call that a service answers with a standard error; never leaves the bus package."""

    def __init__(self, error_name: str, text: str) -> None:
        super().__init__(text)
        self.error_name = error_name
        self.text = text


def error_reply(error: Exception) -> tuple[str, str]:
    """Name and text of the D-Bus error for what a handler raised. No traceback, path or foreign text is in it."""
    if isinstance(error, CallRefused):
        return error.error_name, error.text
    if isinstance(error, FerryError):
        return PREFIX + error.code, json.dumps([reason.to_wire() for reason in error.reasons()])
    return INTERNAL, "the process hit an error of its own; its log has the details"


def error_from_reply(
    name: str, text: str, *, device: str | None, whom: str, phase: Phase | str | None
) -> FerryError:
    """Our error for a D-Bus error. `device`: the participant that was called, if it was one; `whom`: who, for the text."""
    if name in _GONE:
        return DeviceGone(
            f"{whom} is gone from the bus",
            device=device,
            phase=phase or Phase.RUNNING,
            remedy="see why its process ended",
        )
    if name == INTERNAL or not name.startswith(PREFIX):
        shown = _printable(text) or "no text"
        what = shown if name == INTERNAL else f"{shown} ({_printable(name)})"
        return DeviceRefused(
            f"{whom}: {what}" if device is None else what,
            device=device,
            phase=phase or Phase.RUNNING,
            remedy="look at its log",
        )
    reasons = [_attributed(reason, device, phase) for reason in _reasons(text)]
    kind = _BY_CODE.get(name.removeprefix(PREFIX), DeviceRefused)
    if device is not None and not issubclass(kind, _OF_DEVICES):
        kind = DeviceRefused
    if kind is IncompatibleError:
        return IncompatibleError(reasons)
    first = reasons[0]
    return kind(first.reason, remedy=first.remedy, phase=first.phase, device=first.device)


def _reasons(text: str) -> list[Reason]:
    try:
        decoded = json.loads(text) if len(text) <= _MOST_TEXT else None
    except (ValueError, RecursionError):
        decoded = None
    items = decoded if isinstance(decoded, list) and decoded else [None]
    return [Reason.from_wire(item) for item in items[:_MOST_REASONS]]


def _attributed(reason: Reason, device: str | None, phase: Phase | str | None) -> Reason:
    # A device does not know which phase of a migration it is called in; a supervisor knows better than its caller.
    said = "" if device is not None and phase is not None else _printable(reason.phase)
    return Reason(
        device if device is not None else reason.device,
        said or str(phase or Phase.RUNNING),
        _printable(reason.reason),
        _printable(reason.remedy),
    )


def _printable(text: str) -> str:
    """A peer's words for a terminal: no control characters, no more than MAX_TEXT of them."""
    return "".join(char if char.isprintable() else " " for char in text[:MAX_TEXT]).strip()


def _tree(kind: type[FerryError]) -> Iterator[type[FerryError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


#: Only the tree itself: a subclass elsewhere may be made otherwise, and no peer may name it.
_BY_CODE: Final = {kind.code: kind for kind in _tree(FerryError) if kind.__module__ == FerryError.__module__}
