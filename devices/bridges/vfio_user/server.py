"""The process of a server, where the bridge starts it (devices.bridges.models has its command): its end told. It dies with us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Final

from migrate.errors import DeviceGone, Phase

_END_SECONDS: Final = 2.0


class ServerProcess:
    """Its words go where ours go: into the device's log."""

    def __init__(self, device: str, command: Sequence[str], socket: str) -> None:
        """:raise DeviceGone: it cannot be started."""
        self.socket = socket
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket)
        try:
            # The kernel ends it with us, however we end: a device that outlives its bridge is one that nobody controls.
            self._child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command], stdin=subprocess.DEVNULL, stdout=2
            )
        except OSError as error:
            raise DeviceGone(
                f"its vfio-user server cannot be started: {error}",
                device=device,
                phase=Phase.SETUP,
                remedy="see --serve in host.toml",
            ) from None

    @property
    def pid(self) -> int:
        return self._child.pid

    def obituary(self, patience: float = 0.0) -> str:
        """How it ended; "" while it lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(patience)
        status = self._child.poll()
        if status is None:
            return ""
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"

    def end(self) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        self._child.terminate()
        try:
            self._child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        with contextlib.suppress(OSError):
            os.unlink(self.socket)
