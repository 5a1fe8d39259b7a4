"""The file ledger: what a host has promised about a machine, synced before it is said.

One file a machine's name in `DIR/ledger/`, one JSON object a line, appended and fsynced; it outlives the machine and the daemon.
Only the machine's supervisor writes it (an exclusive lock says so); where there is no supervisor left, the process that answers
an Ask takes the lock instead. A torn last line (power lost while writing) was never answered for and is cut.

Each host has an *incarnation*, a random name made with its directory: a ledger that was wiped has another one, and then the
answer is `unknown`, never `aborted`. So it is for a job that the ledger has never heard of: a source asks after COMMIT only, and
by then its INCOMING was synced here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from migrate.errors import LedgerError, Phase
from migrate.machine.config import NAME


class Entry(StrEnum):
    """What can be written. The word after the dot is who writes it."""

    OUTGOING = "outgoing"  #: source: a job begins (job, epoch, peer)
    PEER = "peer"  #: source: the peer's incarnation
    COMMIT = "commit"  #: source: from now on it does not resume by itself
    RELEASED = "released"  #: source: the peer runs it
    RESUMED = "resumed"  #: source: the job ended here (before COMMIT, by ABORTED, or by an operator)
    INCOMING = "incoming"  #: destination: a job begins
    READY = "ready"  #: destination: applied; the source may commit
    COMMITTED = "committed"  #: destination: it runs here
    ABORTED = "aborted"  #: destination: this epoch is never committed here


class Verdict(StrEnum):
    """What the ledger says of a machine's last job."""

    NONE = "none"
    OPEN = "open"  #: a job has begun and not ended, and nothing was promised
    IN_DOUBT = "in-doubt"  #: source, after COMMIT
    RELEASED = "released"
    RESUMED = "resumed"
    COMMITTED = "committed"
    ABORTED = "aborted"


#: entry → what the ledger says once it is the job's last word.
VERDICTS: Final[dict[Entry, Verdict]] = {
    Entry.OUTGOING: Verdict.OPEN,
    Entry.PEER: Verdict.OPEN,
    Entry.COMMIT: Verdict.IN_DOUBT,
    Entry.RELEASED: Verdict.RELEASED,
    Entry.RESUMED: Verdict.RESUMED,
    Entry.INCOMING: Verdict.OPEN,
    Entry.READY: Verdict.OPEN,
    Entry.COMMITTED: Verdict.COMMITTED,
    Entry.ABORTED: Verdict.ABORTED,
}
#: A machine that arrives and is not committed changes nothing about who had it before.
ARRIVALS: Final = frozenset({Entry.INCOMING, Entry.READY, Entry.ABORTED})
#: entry → the entries of the same job that must not be there already. Whoever breaks this loses a machine.
FORBIDDEN: Final[dict[Entry, frozenset[Entry]]] = {
    Entry.COMMIT: frozenset({Entry.RESUMED, Entry.RELEASED, Entry.COMMIT}),
    Entry.COMMITTED: frozenset({Entry.ABORTED, Entry.COMMITTED}),
    Entry.ABORTED: frozenset({Entry.COMMITTED}),
    Entry.RESUMED: frozenset({Entry.RELEASED}),
    Entry.RELEASED: frozenset({Entry.RESUMED}),
}
#: Synced with the entry after them. The machine stands still while READY is written, and a power cut takes the copy that it
#: speaks of along: whether READY or INCOMING is found then, the answer is ABORTED.
SYNCED_LATER: Final = frozenset({Entry.READY})


@dataclass(frozen=True, slots=True)
class Record:
    entry: Entry
    job: str
    epoch: int
    peer: str
    detail: str
    at: float  #: wall clock, seconds; for people, never for decisions

    def to_json(self) -> str:
        return json.dumps(
            {"entry": self.entry, "job": self.job, "epoch": self.epoch, "peer": self.peer, "detail": self.detail,
             "at": self.at}, separators=(",", ":"),
        )  # fmt: skip

    @classmethod
    def from_json(cls, line: str) -> Record:
        raw = json.loads(line)
        return cls(Entry(raw["entry"]), raw["job"], raw["epoch"], raw["peer"], raw["detail"], raw["at"])


def incarnation_of(directory: Path) -> str:
    """The host directory's incarnation, made at the first call."""
    path = directory / "incarnation"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = secrets.token_hex(8)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(made + "\n")
        _sync(draft)
        try:
            os.link(draft, path)
        except FileExistsError:
            made = path.read_text().strip()
        finally:
            draft.unlink()
        _sync(directory)
        return made


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Ledger:
    """One machine's ledger, open for writing by one process."""

    def __init__(self, directory: Path, machine: str) -> None:
        """:param directory: the host's directory.

        :raises LedgerError: if another process holds it, or it cannot be read.
        """
        self.path = _path_of(directory, machine)
        self._broken = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LedgerError(
                f"the ledger {self.path} cannot be opened: {error.strerror}",
                remedy="check the directory's owner and free space",
            ) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise LedgerError(
                f"another process holds the ledger of {machine}",
                remedy="its supervisor is alive: see `ferry list`",
            ) from None
        try:
            for made in (self.path.parent, directory):
                _sync(made)
            data = self._read()
            self.records = list(_parse(data, self.path))
            self._size = data.rfind(b"\n") + 1
            os.ftruncate(self._fd, self._size)
        except BaseException:
            self.close()
            raise

    def _read(self) -> bytes:
        return self.path.read_bytes()

    def write(self, entry: Entry, job: str, epoch: int, *, peer: str = "", detail: str = "") -> None:
        """Append and sync; when this returns, the promise survives a power cut (and what is SYNCED_LATER the process's end).

        :raises LedgerError: if the ledger already says something that forbids it, or the disk fails; nothing is promised then.
        """
        said = {record.entry for record in self.records if record.job == job and record.epoch == epoch}
        against = said & FORBIDDEN.get(entry, frozenset())
        if against:
            raise LedgerError(
                f"the ledger says {', '.join(sorted(against))} of job {job}; {entry} cannot follow",
                phase=Phase.COMMIT,
                remedy="ask for the machine's state: `ferry list`",
            )
        record = Record(entry, job, epoch, peer, detail, time.time())
        line = record.to_json().encode() + b"\n"
        try:
            if self._broken:
                raise OSError(errno.EIO, "an earlier failure could not be undone")
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, "No space left on device")
            if entry not in SYNCED_LATER:
                os.fdatasync(self._fd)
        except OSError as error:
            self._undo()
            raise LedgerError(
                f"the ledger {self.path} cannot be written: {error.strerror}",
                phase=Phase.COMMIT,
                remedy="free space on that disk; nothing was committed",
            ) from None
        self._size += len(line)
        self.records.append(record)

    def _undo(self) -> None:
        """What was half written, or not synced, must not be found by the next reader: it was never promised."""
        try:
            os.ftruncate(self._fd, self._size)
            os.fdatasync(self._fd)
        except OSError:
            self._broken = True  # nothing is promised on this disk any more

    def said(self, entry: Entry, job: str, epoch: int) -> bool:
        return any(r.entry is entry and r.job == job and r.epoch == epoch for r in self.records)

    def last(self) -> Record | None:
        return self.records[-1] if self.records else None

    def verdict(self) -> Verdict:
        return verdict_of(self.records)

    def next_epoch(self) -> int:
        """Above every epoch in which the machine was this host's. What only arrived may bear any number that a peer liked."""
        return max((record.epoch for record in self.records if record.entry not in ARRIVALS), default=0) + 1

    def highest(self, entry: Entry) -> int:
        """The highest epoch that has such a record; 0 where none has."""
        return max((record.epoch for record in self.records if record.entry is entry), default=0)

    def sync_cost_ns(self) -> int:
        """How long one sync of this file takes now, in ns; a commit costs two, one on each side."""
        start = time.monotonic_ns()
        os.fdatasync(self._fd)
        return time.monotonic_ns() - start

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def verdict_of(records: Iterable[Record]) -> Verdict:
    deciding = decisive(records)
    return VERDICTS[deciding.entry] if deciding else Verdict.NONE


def decisive(records: Iterable[Record]) -> Record | None:
    """The record that says whose the machine is: the last, unless that one only tells of an arrival that came to nothing.

    Where the machine has moved away, or is in doubt, that stands until it comes back (COMMITTED), or the doubt ends.
    """
    found = None
    for record in records:
        gone = found is not None and VERDICTS[found.entry] in (Verdict.IN_DOUBT, Verdict.RELEASED)
        if not (gone and record.entry in ARRIVALS):
            found = record
    return found


def heard_of(records: Iterable[Record], job: str, epoch: int) -> bool:
    """Has this job arrived here?"""
    return any(r.entry is Entry.INCOMING and r.job == job and r.epoch == epoch for r in records)


def _path_of(directory: Path, machine: str) -> Path:
    """:raises LedgerError: for what is no machine's name: it may come from a peer."""
    if not NAME.fullmatch(machine):
        raise LedgerError(f"{machine[:64]!r} is no machine's name", remedy="see `ferry list`")
    return directory / "ledger" / f"{machine}.jsonl"


def read(directory: Path, machine: str) -> list[Record]:
    """A machine's ledger, read only; empty where there is none."""
    path = _path_of(directory, machine)
    try:
        return list(_parse(path.read_bytes(), path))
    except FileNotFoundError:
        return []


def machines(directory: Path) -> list[str]:
    """Names that have a ledger on this host."""
    return sorted(path.stem for path in (directory / "ledger").glob("*.jsonl"))


def _parse(data: bytes, path: Path) -> Iterable[Record]:
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return  # torn: its writer never answered for it
        try:
            yield Record.from_json(line.decode())
        except (ValueError, KeyError, TypeError):
            raise LedgerError(
                f"line {number} of the ledger {path} cannot be read",
                phase=Phase.RECOVER,
                remedy="a ledger is never edited by hand; fence the other host, then `ferry resolve`",
            ) from None
