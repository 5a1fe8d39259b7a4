"""`ferry demo` as a subprocess: what it said, what its processes were while the guest ran, and what it left behind.

Runs that tests have marked with `demo(…)` are started two at a time in the order of collection, and shared by tests that ask for
the same words.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.leftovers import Pen, Process
from tests.integration.demo.launchers import LAUNCHERS, NOBODY

FERRY = (sys.executable, "-m", "migrate.cli")
#: Enough for the guest and small enough for two demos on a small machine.
MEMORY = "64M"
AT_ONCE = 2
#: The slowest takes 10 s on an idle machine of two cores; CI is shared.
SECONDS = 150.0
KEPT = "kept"

Event = dict[str, Any]


@dataclass(slots=True, repr=False)
class DemoRun:
    """One run, when it has ended."""

    words: tuple[str, ...]
    directory: Path  #: of the pen; gone, but for what --keep left, which is moved to `kept`
    kept: Path | None = None
    code: int = -1
    lines: list[str] = field(default_factory=list)
    stderr: str = ""
    processes: list[Process] = field(default_factory=list)  #: while the guest ran on the source
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def events(self) -> list[Event]:
        """Every line of stdout, which are JSON objects one and all."""
        return [json.loads(line) for line in self.lines]

    @property
    def outcome(self) -> Event:
        """The last line."""
        return self.events[-1]

    @property
    def reasons(self) -> list[Event]:
        found: list[Event] = self.outcome["reasons"]
        return found

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def phases(self) -> list[str]:
        return [event["phase"] for event in self.of_kind("phase")]

    def says(self) -> str:
        return "\n".join(event["says"] for event in self.of_kind("demo"))

    def command_lines(self, module: str) -> list[str]:
        """Of the processes that run a module."""
        return [" ".join(process.words) for process in self.processes if module in process.words]

    def __repr__(self) -> str:
        how = f"ferry demo {' '.join(self.words)} → {self.code} after {self.seconds:.1f} s"
        return "\n".join([how, *self.lines[-8:], self.stderr])


def run(
    words: Sequence[str],
    *,
    prefix: Sequence[str] = (),
    command: Sequence[str] = FERRY,
    interrupt: signal.Signals | None = None,
    environment: dict[str, str] | None = None,
) -> DemoRun:
    """Run `ferry demo WORDS` to its end.

    :param prefix: a command that starts it. :param interrupt: sent to it once the guest runs.
    """
    pen = Pen()
    made = DemoRun(tuple(words), pen.directory)
    keep = ["--keep", str(pen.directory / KEPT)] if "--keep" in words else []
    rest = [word for word in words if word != "--keep"]
    size = [] if "--memory" in words else ["--memory", MEMORY]
    stderr = pen.directory / "stderr"
    if f"--reuid={NOBODY}" in prefix:
        os.chown(pen.directory, NOBODY, NOBODY)
    began = time.monotonic()
    try:
        with stderr.open("w") as errors:
            child = subprocess.Popen(
                [*prefix, *command, "demo", "--json", *rest, *size, *keep],
                cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=pen.environment() | (environment or {}),
            )  # fmt: skip
        late = threading.Timer(SECONDS, _kill_all, [pen])
        late.start()
        with child:
            assert child.stdout is not None
            for line in child.stdout:
                made.lines.append(line.rstrip("\n"))
                if "the guest runs on hosta" in line:
                    made.processes = pen.processes()
                    if interrupt is not None:
                        child.send_signal(interrupt)
        late.cancel()
        made.code = child.returncode
        made.seconds = time.monotonic() - began
        made.stderr = stderr.read_text()
        made.left = pen.left("stderr", KEPT)
        if keep:
            made.kept = pen.directory.with_name(pen.directory.name + "-kept")
            shutil.move(pen.directory / KEPT, made.kept)
    finally:
        pen.close()
    return made


def _kill_all(pen: Pen) -> None:
    for process in pen.processes():
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run that a test wants: its words, and the launcher that starts it."""

    words: tuple[str, ...]
    by: str = ""  #: a key of launchers.LAUNCHERS


class Playbill:
    """All runs that some tests want; each is played once."""

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="demo")
        self._runs: dict[Wanted, Future[DemoRun]] = {}
        for item in wanted:
            if item not in self._runs:
                self._runs[item] = self._pool.submit(run, item.words, prefix=LAUNCHERS[item.by]())

    def result(self, wanted: Wanted) -> DemoRun:
        return self._runs[wanted].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for future in self._runs.values():
            if not future.cancelled() and future.exception() is None and (kept := future.result().kept):
                shutil.rmtree(kept, ignore_errors=True)
