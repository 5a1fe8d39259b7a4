"""Jobs: the coordinators that this daemon started or found running, one a machine at a time, and the events they leave.

A source's coordinator writes its events into its journal (journal.py) and reads commands from a named pipe, so both outlive
the daemon: a daemon that is killed and started again finds the job by its journal, follows it on, and can cancel it. What
a coordinator says in its outcome is taken; one that ends without a word has its outcome found out by `conclude`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from migrate.bus.status import JobStatus
from migrate.errors import FerryError, UsageError
from migrate.host.journal import Journal
from migrate.host.progress import Progress
from migrate.host.watched import Watched, start_time

log = logging.getLogger(__name__)

#: How coordinators are started; tests have their own.
COORDINATOR: Final = (sys.executable, "-m", "migrate.coordinator")

#: How often a journal is looked at, s: what a progress line may lag behind. The end of a job does not wait for it.
LOOK_SECONDS: Final = 0.05
#: How long jobs may take to roll back when the daemon stops, s, before their coordinators are ended.
ROLLBACK_SECONDS: Final = 30.0
END_SECONDS: Final = 5.0
#: Journals of ended jobs that are kept.
KEEP_JOURNALS: Final = 200

#: What a job's first event says of how it was started.
_LIMITS: Final = ("downtime_ms", "bandwidth", "timeout_seconds", "on_stall")

_ID: Final = re.compile(r"[0-9a-f]{32}")


class Kind(StrEnum):
    MIGRATE = "migrate"
    CHECK = "check"  #: the preflight only
    RECOVER = "recover"  #: asks who runs a machine in doubt
    INCOMING = "incoming"  #: a destination's; its coordinator is incoming.py's


@dataclass(slots=True, eq=False)
class Job:
    id: str
    kind: Kind
    machine: str
    to: str  #: the destination's URI; of an incoming job, who sends
    journal: Journal
    process: Watched | None = None
    commands: int = -1  #: where commands are written
    last: tuple[int, str] | None = None  #: the outcome, until it is told
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def how_it_ended(self) -> str:
        return self.process.how() if self.process is not None else "ended"


class Jobs:
    """All jobs of this host that go on, and the journals of those that went before."""

    def __init__(
        self,
        directory: Path,
        *,
        emit: Callable[[str, int, str], None],
        conclude: Callable[[Job], Awaitable[Mapping[str, Any]]],
        on_end: Callable[[Job], None],
        on_status: Callable[[str, bool], None],
        command: Sequence[str] = COORDINATOR,
    ) -> None:
        """
        :param directory: the host's.
        :param emit: told job, number and line of every event.
        :param conclude: finds the outcome of a job whose coordinator ended without one.
        :param on_end: told of every job that ended, after its outcome was emitted.
        :param on_status: told the job whose status is new, another, or no longer kept; and whether it is urgent.
        :param command: what `source` or `recover` is appended to.
        """
        self.directory = directory / "jobs"
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.command = tuple(command)
        self._emit, self._conclude, self._on_end, self._on_status = emit, conclude, on_end, on_status
        self._active: dict[str, Job] = {}  # by job
        self._progress: dict[str, Progress] = {}  # of every job whose journal is kept
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    # -- looking ---------------------------------------------------------------------------------------------------------

    def active_of(self, machine: str) -> Job | None:
        return next((job for job in self._active.values() if job.machine == machine), None)

    def find(self, name: str) -> Job | None:
        """The job of this name, or of the machine of this name, if it goes on."""
        return self._active.get(name) or self.active_of(name)

    def require_free(self, machine: str) -> None:
        """:raises UsageError: if a job of this machine goes on."""
        job = self.active_of(machine)
        if job is not None:
            raise UsageError(
                f"a job of {machine} goes on already: {job.kind} {job.to}".rstrip(),
                remedy=f"wait until it ends, or `ferry cancel {machine}`",
            )

    def status(self, job: str) -> JobStatus | None:
        """What is known of a job, also of one that has ended; None where nothing is kept."""
        found = self._progress.get(job)
        return found.status if found is not None else None

    def events(self, job: str) -> list[str]:
        """All events of a job so far, as they were emitted. :raises UsageError: if there is no such job."""
        active = self._active.get(job)
        if active is not None:
            return active.journal.lines[: active.last[0] if active.last else None]
        path = self.directory / f"{job}.jsonl"
        if not _ID.fullmatch(job) or not path.exists():
            raise UsageError(f"there is no job {job[:64]!r}", remedy="jobs are named when they are started")
        journal = Journal(path, lambda *_: None)
        try:
            journal.pump()
        finally:
            journal.close()
        return journal.lines

    # -- starting --------------------------------------------------------------------------------------------------------

    def start(self, kind: Kind, machine: str, to: str, spec: Mapping[str, Any], *, of: str = "") -> Job:
        """Start a source's coordinator (or one that recovers).

        :param spec: what it is told, without `job`. :param of: the job that it asks about, for `recover`.
        :raises UsageError: if a job of this machine goes on.
        """
        self.require_free(machine)
        if self._stopping:
            raise FerryError("this host's daemon is ending", remedy="try again when it is back")
        name = secrets.token_hex(16)
        job = self._open(name, kind, machine, to, of, {key: spec[key] for key in _LIMITS if key in spec})
        word = "recover" if kind is Kind.RECOVER else "source"
        try:
            self._spawn(job, [*self.command, word], {**spec, "job": of or name})
        except OSError as error:
            self._close(job)
            self._drop(job.journal.path)
            raise FerryError(
                f"the coordinator cannot be started: {error.strerror}", remedy="check memory and processes"
            ) from None
        self._follow(job)
        return job

    def open_incoming(self, name: str, machine: str, peer: str, process: Watched) -> Job:
        """The journal of a job that arrives; `finish_incoming` ends it.

        :raises UsageError: if a job of this machine, or this very job, goes on here.
        """
        self.require_free(machine)
        if not _ID.fullmatch(name) or name in self._active:
            raise UsageError(
                "the migration would arrive where it comes from", remedy="give another host as --to"
            )
        job = self._open(name, Kind.INCOMING, machine, peer)
        job.process = process
        return job

    async def finish_incoming(self, job: Job) -> None:
        """Its coordinator has ended."""
        await self._finish(job)

    def _open(
        self,
        name: str,
        kind: Kind,
        machine: str,
        to: str,
        of: str = "",
        limits: Mapping[str, Any] = MappingProxyType({}),
    ) -> Job:
        self._prune()
        job = self._activate(name, kind, machine, to)
        first = {"event": "job", "job": name, "kind": kind, "machine": machine, "to": to, "of": of}
        job.journal.append({**first, "at": time.time(), **limits})
        return job

    def _activate(self, name: str, kind: Kind, machine: str, to: str) -> Job:
        progress = self._progress[name] = Progress(JobStatus(name, machine, str(kind), to))

        def heard(number: int, line: str, event: dict[str, Any]) -> None:
            # The outcome is told when the job is over in every respect: whoever hears it may start the next one.
            if event.get("event") == "outcome":
                job.last = (number, line)
            else:
                urgent = progress.take(event)
                self._emit(name, number, line)
                self._on_status(name, urgent)

        job = Job(name, kind, machine, to, Journal(self.directory / f"{name}.jsonl", heard))
        self._active[name] = job
        return job

    def _spawn(self, job: Job, command: list[str], spec: Mapping[str, Any]) -> None:
        pipe = self._pipe(job)
        os.mkfifo(pipe, 0o600)
        job.commands = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(job.commands, json.dumps(spec).encode() + b"\n")
        # It holds a writing end itself and so never sees the end of its commands. A group of its own: Ctrl-C on a
        # terminal is for the daemon, which then lets its jobs roll back.
        stdin = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)
        stderr = os.open(
            self.directory / f"{job.id}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        try:
            child = subprocess.Popen(
                command, stdin=stdin, stdout=job.journal.fileno(), stderr=stderr, process_group=0,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        finally:
            os.close(stdin)
            os.close(stderr)
        job.process = Watched(child.pid, child)
        job.journal.append({"event": "started", "pid": child.pid, "start_time": start_time(child.pid)})

    def _pipe(self, job: Job) -> Path:
        return self.directory / f"{job.id}.in"

    # -- after a restart -------------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Find the jobs that an earlier daemon left without an outcome: follow those that go on, conclude the others."""
        for path in sorted(self.directory.glob("*.jsonl")):
            if not _ID.fullmatch(path.stem):
                continue
            journal = Journal(path, lambda *_: None)
            journal.pump()
            journal.close()
            if journal.outcome is None and journal.first.get("event") == "job":
                self._adopt(path.stem, journal)
            elif journal.outcome is not None:
                path.with_suffix(".in").unlink(missing_ok=True)
                self._remember(path.stem, journal)

    def _remember(self, name: str, journal: Journal) -> None:
        """The status of a job that an earlier daemon saw end."""
        kind, machine, to = (str(journal.first.get(key, "")) for key in ("kind", "machine", "to"))
        progress = self._progress[name] = Progress(JobStatus(name, machine, kind, to))
        for line in journal.lines:
            progress.take(json.loads(line))
        self._on_status(name, True)

    def _adopt(self, name: str, before: Journal) -> None:
        first = before.first
        job = self._activate(name, Kind(first["kind"]), first["machine"], first["to"])
        job.journal.pump()
        started = [(event["pid"], event["start_time"]) for event in before.of_kind("started")]
        pid, began = started[0] if started else (0, 0)
        if pid and start_time(pid) == began:
            try:
                job.process = Watched(pid)
                job.commands = os.open(self._pipe(job), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                pass  # it ended in this very moment
        log.info("event=job-adopted job=%s machine=%s pid=%s", name, job.machine, pid)
        self._follow(job)

    # -- following -------------------------------------------------------------------------------------------------------

    def _follow(self, job: Job) -> None:
        task = asyncio.get_running_loop().create_task(self._follow_to_its_end(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow_to_its_end(self, job: Job) -> None:
        if job.process is not None:
            while job.last is None and not await job.process.wait(LOOK_SECONDS):
                job.journal.pump()
            if not await job.process.wait(END_SECONDS):
                log.warning("event=coordinator-lingers job=%s", job.id)
                await job.process.end(patience=END_SECONDS)
        await self._finish(job)

    async def _finish(self, job: Job) -> None:
        try:
            job.journal.pump()
            if job.journal.outcome is None:
                job.journal.append(await self._conclude(job))
        except (OSError, FerryError) as error:
            log.error("event=job-end job=%s error=%s", job.id, error)
        finally:
            self._close(job)
        log.info(
            "event=job-ended job=%s kind=%s machine=%s outcome=%s",
            *(job.id, job.kind, job.machine, (job.journal.outcome or {}).get("outcome")),
        )
        if job.last is not None:
            self._progress[job.id].take(job.journal.outcome or {})
            self._emit(job.id, *job.last)
            self._on_status(job.id, True)
        self._on_end(job)

    def _close(self, job: Job) -> None:
        self._active.pop(job.id, None)
        self._pipe(job).unlink(missing_ok=True)
        if job.commands >= 0:
            os.close(job.commands)
            job.commands = -1
        if job.process is not None:
            job.process.close()
        job.journal.close()
        job.ended.set()

    def _prune(self) -> None:
        kept = sorted(self.directory.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        for path in kept[: max(0, len(kept) - KEEP_JOURNALS)]:
            if path.stem not in self._active:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        path.with_suffix(".log").unlink(missing_ok=True)
        if self._progress.pop(path.stem, None) is not None:
            self._on_status(path.stem, True)

    # -- telling ---------------------------------------------------------------------------------------------------------

    def say(self, job: Job, command: str, **words: float) -> None:
        """Send a command to a source's coordinator. :raises FerryError: if it cannot be told any more."""
        try:
            os.write(job.commands, json.dumps({"cmd": command, **words}).encode() + b"\n")
        except OSError:
            raise FerryError(
                f"the coordinator of {job.machine} does not listen any more", remedy="see `ferry list`"
            ) from None
        if command == "continue":
            self._progress[job.id].went_on()
            self._on_status(job.id, True)

    async def end(self, job: Job) -> None:
        """End a job's coordinator and wait until its outcome is known. What that means is decided by the machine's state."""
        if job.process is not None:
            await job.process.end(patience=END_SECONDS)
        await job.ended.wait()

    async def stop(self) -> None:
        """The daemon ends: what can be taken back is, and waited for; no coordinator of ours is left."""
        self._stopping = True
        jobs = [job for job in self._active.values() if job.kind is not Kind.INCOMING]
        for job in jobs:
            if job.kind is Kind.RECOVER and job.process is not None:
                await self.end(job)  # the next daemon asks again
            elif job.commands >= 0:
                try:
                    self.say(job, "cancel")
                except FerryError as error:  # below it is ended by force
                    log.warning("event=not-cancelled job=%s error=%s", job.id, error)
        try:
            async with asyncio.timeout(ROLLBACK_SECONDS):
                await asyncio.gather(*(job.ended.wait() for job in jobs))
        except TimeoutError:
            for job in jobs:
                if job.process is not None:
                    log.warning("event=coordinator-ended-by-force job=%s", job.id)
                    await job.process.end(patience=END_SECONDS)
        await asyncio.gather(*self._tasks, return_exceptions=True)
