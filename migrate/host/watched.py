"""A process that this daemon watches by a pidfd: its own child, or one that an earlier daemon left running.

A pidfd names one process for ever, so a signal never hits a stranger that got the same number later. Who may be what
(a supervisor, a coordinator) is not known here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

#: Field 22 of /proc/PID/stat (proc(5)), counted after the command's closing parenthesis.
_START_TIME = 22 - 3


def start_time(pid: int) -> int:
    """When a process began, in clock ticks since boot: with its number, its identity. 0 where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[_START_TIME])


class Watched:
    """One process, from now until its end. Make it in the event loop's thread; `close` it, or let it end."""

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
        """:raises ProcessLookupError: there is no such process."""
        self.pid = pid
        #: The exit status as in `Popen.returncode`; None while it runs, and for what is not our child.
        self.returncode: int | None = None
        self.ended = asyncio.Event()
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._fd = os.pidfd_open(pid)
        self._loop.add_reader(self._fd, self._on_end)

    def _on_end(self) -> None:
        self.close()
        if self._child is not None:
            self.returncode = self._child.wait()
        else:
            _reap(self.pid)
        self.ended.set()

    def signal(self, number: signal.Signals) -> None:
        """Nothing where it has ended."""
        if self._fd >= 0:
            try:
                signal.pidfd_send_signal(self._fd, number)
            except ProcessLookupError:
                pass  # a zombie; its end is about to be told

    async def wait(self, timeout: float | None) -> bool:
        """Wait for its end for at most so many seconds; whether it came."""
        try:
            async with asyncio.timeout(timeout):
                await self.ended.wait()
        except TimeoutError:
            return False
        return True

    async def end(self, *, patience: float) -> None:
        """SIGTERM, after `patience` seconds SIGKILL; returns when it has ended."""
        self.signal(signal.SIGTERM)
        if not await self.wait(patience):
            self.signal(signal.SIGKILL)
            await self.ended.wait()

    def close(self) -> None:
        """Stop watching; the process goes on."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def how(self) -> str:
        """How it ended, in words."""
        if self.returncode is None:
            return "ended"
        if self.returncode < 0:
            return f"was killed by {signal.Signals(-self.returncode).name}"
        return f"exited with {self.returncode}"


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass  # not our child, or reaped already
