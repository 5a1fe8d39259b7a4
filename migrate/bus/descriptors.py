"""Descriptors in messages: a body holds indexes (`h`), the descriptors travel beside it. Whoever holds one closes it.

Only plain arguments may be descriptors, and each argument has its own: nothing of ours needs more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from migrate.bus import library
from migrate.bus.messages import Message
from migrate.errors import RemoteProtocolError


def take_fds(signature: str, values: list[Any], message: Message) -> None:
    """Put descriptors where `values` has indexes, and close those that nothing names. Raises RemoteProtocolError."""
    kinds = library.complete_types(signature)
    places = [place for place, kind in enumerate(kinds) if kind == "h"]
    indexes = [values[place] for place in places]
    if len(places) != signature.count("h") or len(set(indexes)) != len(indexes):
        raise RemoteProtocolError("descriptors are taken as plain arguments only, each of its own")
    if any(index >= len(message.fds) for index in indexes):
        raise RemoteProtocolError("a descriptor that was announced did not come")
    for place, index in zip(places, indexes, strict=True):
        values[place] = message.fds[index]
    message.fds = [fd for index, fd in enumerate(message.fds) if index not in indexes]
    message.close_fds()


def descriptors(signature: str, body: Sequence[Any]) -> list[int]:
    """The descriptors among the values of a body."""
    if "h" not in signature:
        return []
    kinds = library.complete_types(signature)
    return [value for kind, value in zip(kinds, body, strict=True) if kind == "h"]


def indexed(signature: str, body: Sequence[Any]) -> list[Any]:
    """A body as it is sent: indexes where its descriptors were."""
    kinds = library.complete_types(signature)
    places = iter(range(len(kinds)))
    return [next(places) if kind == "h" else value for kind, value in zip(kinds, body, strict=True)]


def identity(fd: int) -> tuple[int, int, int]:
    status = os.fstat(fd)
    return fd, status.st_dev, status.st_ino


def close_if_same(known: tuple[int, int, int]) -> None:
    """Close a descriptor unless the handler that raised had closed it, and its number is another file's by now."""
    try:
        if identity(known[0]) == known:
            os.close(known[0])
    except OSError:
        pass  # closed already
