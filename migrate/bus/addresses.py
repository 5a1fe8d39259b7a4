"""Which bus is meant by "system", "session" or an address."""

from __future__ import annotations

import os

from migrate.errors import UsageError


def address_of(word: str) -> str:
    """:raises UsageError: for a session's bus where there is no session, or a bus that no Unix socket leads to."""
    if word == "system":
        found = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or "unix:path=/run/dbus/system_bus_socket"
    elif word == "session":
        found = os.environ.get("DBUS_SESSION_BUS_ADDRESS") or ""
        if not found and os.path.exists(path := f"{os.environ.get('XDG_RUNTIME_DIR', '')}/bus"):
            found = f"unix:path={path}"
        if not found:
            raise UsageError(
                "there is no session's bus here",
                remedy="set DBUS_SESSION_BUS_ADDRESS, or give --bus system or an address",
            )
    else:
        found = word
    # An address may be a list of those that lead to one bus.
    for one in found.split(";"):
        if one.startswith("unix:"):
            return one
    raise UsageError(
        f"{word!r} is not a bus that can be reached", remedy="give system, session, or unix:path=/PATH"
    )
