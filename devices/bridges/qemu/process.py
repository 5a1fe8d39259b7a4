"""QEMU's process: started with the guest's memory inherited, its words kept in a log, its end told. It dies with us.

`setpriv` has the kernel kill QEMU when this process ends, however it ends: a QEMU that outlives it would be a machine that nobody
controls.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from migrate.errors import DeviceGone, Phase

log = logging.getLogger(__name__)

_END_SECONDS: Final = 2.0


class Process:
    def __init__(
        self,
        device: str,
        command: Sequence[str],
        log_path: Path,
        fds: Sequence[int],
        on_end: Callable[[], None],
        *,
        remedy: str = "see [qemu] command",
    ) -> None:
        """:param fds: descriptors that it inherits. :param on_end: it ended and nobody asked it to; on a thread of its own.
        :param remedy: where its command is written.

        :raise DeviceGone: it cannot be started.
        """
        self.device = device
        self.log_path = log_path
        self._on_end = on_end
        self._expected = False
        fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._start = os.fstat(fd).st_size
            self._child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=fd,
                stderr=fd,
                pass_fds=tuple(fds),
            )
        except OSError as error:
            raise DeviceGone(
                f"QEMU cannot be started: {error}",
                device=device,
                phase=Phase.SETUP,
                remedy=remedy,
            ) from None
        finally:
            os.close(fd)
        log.info("event=qemu-started pid=%d command=%r", self._child.pid, " ".join(command))
        threading.Thread(target=self._wait, name="qemu", daemon=True).start()

    def _wait(self) -> None:
        self._child.wait()
        if not self._expected:
            self._on_end()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    @property
    def status(self) -> int | None:
        return self._child.poll()

    def wait(self, seconds: float) -> None:
        """Until it has ended, so long at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)

    def last_words(self) -> str:
        """The last line that this QEMU wrote of itself, else the last at all; at most 300 characters, "" if none."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(self._start, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        said = [line.strip()[:300] for line in lines if line.strip()]
        return next((line for line in reversed(said) if line.startswith("qemu-")), said[-1] if said else "")

    def end(self) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        self._expected = True
        self._child.terminate()
        try:
            self._child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_END_SECONDS)
