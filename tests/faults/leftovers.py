"""What something that ran has left behind: processes, sockets, shared memory, files. Looked for in /proc, not in its own words.

Everything that is started inside a `Pen` inherits TMPDIR=that directory, so a process is found by its environment even where its
command line names nothing and its parents are gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: The kernel takes a killed process down in its own time; whatever is left after this long, s, is left for good.
GRACE_SECONDS = 5.0
_SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Process:
    """One process as it was when it was seen."""

    pid: int
    words: tuple[str, ...]
    status: dict[str, str]  #: /proc/PID/status

    def __str__(self) -> str:
        return f"{self.pid}: {' '.join(self.words)[:200]}"


class Pen:
    """A directory under /tmp (short, for sockets) that everything in it can be told by. `close` it, or use `pen()`."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
        self._shared = _names(_SHARED)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.directory)}

    def processes(self) -> list[Process]:
        """Those that run now and began in here; zombies have ended."""
        mark = f"TMPDIR={self.directory}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                marked = mark in (entry / "environ").read_bytes().split(b"\0")
                if words and (marked or os.fsencode(self.directory) in words):
                    status = dict(
                        line.split(":\t", 1) for line in (entry / "status").read_text().splitlines()
                    )
                    if not status["State"].startswith("Z"):
                        decoded = tuple(words.decode(errors="replace").rstrip("\0").split("\0"))
                        found.append(Process(int(entry.name), decoded, status))
        return found

    def sockets(self) -> list[str]:
        """Unix sockets that are bound in here."""
        return [
            line.split()[-1]
            for line in Path("/proc/net/unix").read_text().splitlines()
            if f" {self.directory}/" in line
        ]

    def at_work(self) -> list[str]:
        """Processes and bound sockets that are left, a line each; waits for what is just ending: a machine's processes are killed
        by the kernel, each after the one that started it."""
        deadline = time.monotonic() + GRACE_SECONDS
        while (found := [*map(str, self.processes()), *self.sockets()]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def left(self, *allowed: str) -> list[str]:
        """What is left, a line a thing; waits for what is just ending. Files of these names may stay."""
        found = self.at_work()
        shared = [f"{_SHARED}/{name}" for name in _names(_SHARED) - self._shared if "ferry" in name]
        return [*found, *shared, *(f"{self.directory}/{n}" for n in _names(self.directory) - set(allowed))]

    def close(self) -> None:
        """End what is left and remove the directory."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if not os.environ.get("VF_KEEP_PENS"):  # for who wants to read the logs
            shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def pen() -> Iterator[Pen]:
    made = Pen()
    try:
        yield made
    finally:
        made.close()


def _names(directory: Path) -> set[str]:
    return set(os.listdir(directory)) if directory.is_dir() else set()
