"""A device's Unix socket for one VMM: made so that nobody else may connect, and never taken from a process that lives."""

from __future__ import annotations

import os
import socket
import stat

from migrate.errors import Phase, UsageError

_BACKLOG = 4


def listen(path: str) -> socket.socket:
    """:raise UsageError: no socket can be made there, or another process serves there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode of the descriptor becomes the mode of the file: nobody else may connect, from its first moment on.
        os.fchmod(listener.fileno(), 0o600)
        _remove_stale(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"no socket can be made at {path}: {error.strerror}",
            remedy="name one in a directory that exists and is yours",
            phase=Phase.SETUP,
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Removes a socket that a dead process left; a living one's is an error."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise UsageError(f"{path} exists and is no socket", remedy="name another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise UsageError(f"another process serves {path}", remedy="end it, or name another path")
