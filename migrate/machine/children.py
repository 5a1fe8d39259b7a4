"""Child processes of a supervisor: started with a log file of their own, and their deaths told with the last line they wrote.

Every child dies with the supervisor (each asks the kernel for that itself: PR_SET_PDEATHSIG), so no process is ever left behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from migrate.errors import DeviceGone, Phase


class Child:
    """One process and the task that waits for it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.expected = False  #: its end is wanted
        self._waiter: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], log: Path, on_death: Callable[[Child], None]
    ) -> Child:
        """:raises DeviceGone: if the command cannot be started."""
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=fd, stderr=fd, cwd=log.parent
            )
        except OSError as error:
            raise DeviceGone(
                f"its command {command[0]!r} cannot be started: {error.strerror}",
                device=name,
                phase=Phase.SETUP,
                remedy="check `command` in machine.toml and host.toml",
            ) from None
        finally:
            os.close(fd)
        child = cls(name, process, log)
        child._waiter = asyncio.create_task(child._watch(on_death))
        return child

    async def _watch(self, on_death: Callable[[Child], None]) -> None:
        await self.process.wait()
        if not self.expected:
            on_death(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    @property
    def powered_off(self) -> bool:
        """It ended of its own accord and says that all is well: how a vCPU's process ends when the guest powers off."""
        return self.process.returncode == 0 and not self.expected

    def obituary(self, phase: Phase) -> DeviceGone:
        """Why it is gone, in its own last words."""
        code = self.process.returncode
        how = "ended" if code == 0 else f"exited with {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        last = last_line(self.log)
        return DeviceGone(
            f"its process {how}" + (f": {last}" if last else ""),
            device=self.name,
            phase=phase,
            remedy=f"see {self.log}",
        )

    async def stop(self, patience: float = 2.0) -> None:
        """SIGTERM, then SIGKILL after `patience` seconds; returns when it is reaped."""
        self.expected = True
        if self.alive:
            self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), patience)
            except TimeoutError:
                self.process.kill()
        await self.process.wait()
        if self._waiter is not None:
            await self._waiter


class Adopted:
    """A process that others started, and will end: its death is told, and no more. Has what Child has, for who only looks."""

    powered_off = False
    expected = False

    def __init__(self, name: str, pid: int, on_death: Callable[[Adopted], None]) -> None:
        """:raises DeviceGone: it has ended."""
        self.name, self.pid = name, pid
        self._on_death = on_death
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise self.obituary(Phase.SETUP) from None
        asyncio.get_running_loop().add_reader(self._fd, self._ended)

    def _ended(self) -> None:
        self._let_go()
        if not self.expected:
            self._on_death(self)

    def _let_go(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    @property
    def alive(self) -> bool:
        return self._fd >= 0

    def obituary(self, phase: Phase) -> DeviceGone:
        return DeviceGone(
            f"its process {self.pid} has ended",
            device=self.name,
            phase=phase,
            remedy="see its log; others started it",
        )

    async def stop(self, patience: float = 0.0) -> None:
        """It goes on; nobody here looks at it any more."""
        self.expected = True
        self._let_go()


def last_line(log: Path) -> str:
    """The last line of a log that says something, at most 300 characters."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
