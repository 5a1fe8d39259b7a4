"""Who may change things, on a bus that others share: root, and the user whose processes these are. Everybody may look."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Collection

from migrate.bus.connection import Bus
from migrate.bus.service import Call
from migrate.errors import DeniedError

#: Raises DeniedError where the caller may not do this.
Guard = Callable[[Call], Awaitable[None]]


def only_owners(bus: Bus, owners: Collection[int] | None = None) -> Guard:
    """:param owners: user ids; root and our own by default. The bus says whose a caller is, not the caller."""
    allowed = frozenset((0, os.getuid()) if owners is None else owners)

    async def require(call: Call) -> None:
        uid = await bus.uid_of(call.sender)
        if uid not in allowed:
            raise DeniedError(
                f"{call.member} is not for the user {uid}, who may only look",
                remedy=f"call it as user {os.getuid()}, who runs this host's daemon, or as root",
            )

    return require
