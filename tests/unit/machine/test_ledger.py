"""The ledger: what was answered for survives a power cut, what was not is not there, and no promise contradicts another."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_machine import full_disk

from migrate.errors import LedgerError, UsageError
from migrate.machine import ledger
from migrate.machine.ledger import ARRIVALS, FORBIDDEN, VERDICTS, Entry, Ledger, Record, Verdict
from migrate.machine.process import check_ledger

JOB = "a" * 32

#: On a loaded machine a single example may take as long as it likes.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def record(entry: Entry, job: str = JOB, epoch: int = 1) -> Record:
    return Record(entry, job, epoch, "unix:/peer", "", 0.0)


def write(directory: Path, *entries: Entry, job: str = JOB, epoch: int = 1) -> None:
    opened = Ledger(directory, "web1")
    try:
        for entry in entries:
            opened.write(entry, job, epoch, peer="unix:/peer")
    finally:
        opened.close()


def entries(directory: Path) -> list[Entry]:
    return [record.entry for record in ledger.read(directory, "web1")]


# -- what is written ---------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_by_the_next_one(tmp_path: Path) -> None:
    opened = Ledger(tmp_path, "web1")
    opened.write(Entry.OUTGOING, JOB, 3, peer="tls://b:7", detail='x\n"y" ä')
    opened.close()
    [found] = ledger.read(tmp_path, "web1")
    assert (found.entry, found.job, found.epoch, found.peer) == (Entry.OUTGOING, JOB, 3, "tls://b:7")
    assert found.detail == 'x\n"y" ä'
    assert Ledger(tmp_path, "web1").records == [found]


def test_a_machine_without_a_ledger_has_none(tmp_path: Path) -> None:
    assert ledger.read(tmp_path, "web1") == []
    assert ledger.verdict_of([]) is Verdict.NONE
    assert ledger.machines(tmp_path) == []


def test_machines_are_known_by_their_ledgers(tmp_path: Path) -> None:
    for name in ("web2", "web1"):
        Ledger(tmp_path, name).close()
    assert ledger.machines(tmp_path) == ["web1", "web2"]


@pytest.mark.parametrize("name", ["../../etc/evil", "a/b", "", ".", "..", "-x", "a" * 64, "a\0b"])
def test_what_is_no_machines_name_touches_no_file(name: str, tmp_path: Path) -> None:
    # Names come over the wire with ASK.
    with pytest.raises(LedgerError, match="is no machine's name"):
        Ledger(tmp_path / "host", name)
    with pytest.raises(LedgerError, match="is no machine's name"):
        ledger.read(tmp_path / "host", name)
    assert list(tmp_path.iterdir()) == []


def test_a_second_opener_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = Ledger(tmp_path, "web1")
    with pytest.raises(LedgerError, match="another process holds the ledger of web1"):
        Ledger(tmp_path, "web1")
    first.close()
    Ledger(tmp_path, "web1").close()


# -- power cuts --------------------------------------------------------------------------------------------------------


def test_a_cut_at_any_byte_leaves_exactly_the_lines_that_were_whole(tmp_path: Path) -> None:
    written = [Entry.INCOMING, Entry.READY, Entry.COMMITTED]
    write(tmp_path / "whole", *written)
    data = (tmp_path / "whole" / "ledger" / "web1.jsonl").read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path = tmp_path / "cut" / "ledger" / "web1.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:cut])
        whole = sum(1 for end in ends if end <= cut)
        assert entries(tmp_path / "cut") == written[:whole]
        opened = Ledger(tmp_path / "cut", "web1")
        opened.write(Entry.OUTGOING, "b" * 32, 9)  # appended to whole lines, never to a torn one
        opened.close()
        assert entries(tmp_path / "cut") == [*written[:whole], Entry.OUTGOING]


@pytest.mark.parametrize("tail", [b"\0" * 100, b'{"entry":"committed"', b"\xff\xfe"])
def test_a_torn_end_of_any_kind_is_cut(tail: bytes, tmp_path: Path) -> None:
    write(tmp_path, Entry.INCOMING, Entry.READY)
    with (tmp_path / "ledger" / "web1.jsonl").open("ab") as file:
        file.write(tail)
    assert entries(tmp_path) == [Entry.INCOMING, Entry.READY]
    Ledger(tmp_path, "web1").close()
    assert entries(tmp_path) == [Entry.INCOMING, Entry.READY]


@pytest.mark.parametrize(
    "line",
    [b"not json\n", b"[]\n", b"\n", b'{"entry":"won"}\n', b'{"entry":"commit","job":"x"}\n', b"\xff\n"],
)
def test_a_whole_line_that_cannot_be_read_is_an_error_and_never_skipped(line: bytes, tmp_path: Path) -> None:
    write(tmp_path, Entry.OUTGOING, Entry.COMMIT)
    path = tmp_path / "ledger" / "web1.jsonl"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(LedgerError, match=r"line 3 of the ledger .* cannot be read"):
        ledger.read(tmp_path, "web1")
    with pytest.raises(LedgerError, match="line 3"):
        Ledger(tmp_path, "web1")
    path.unlink()
    Ledger(tmp_path, "web1").close()  # and the lock was let go


#: Writes COMMIT, says so, and is killed in the middle of what comes next.
KILLED = """
import os, sys
from pathlib import Path
from migrate.machine.ledger import Entry, Ledger
opened = Ledger(Path(sys.argv[1]), "web1")
opened.write(Entry.OUTGOING, "a" * 32, 1)
opened.write(Entry.COMMIT, "a" * 32, 1)
if sys.argv[2] == "torn":
    os.write(opened._fd, b'{"entry":"resumed","job":"')
os.write(1, b"committed")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["between", "torn"])
def test_a_writer_that_is_killed_after_it_answered_leaves_its_promise_and_frees_the_lock(
    how: str, tmp_path: Path
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), how], stdout=subprocess.PIPE, check=False, timeout=60
    )
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, b"committed")
    opened = Ledger(tmp_path, "web1")
    assert opened.verdict() is Verdict.IN_DOUBT
    opened.write(Entry.RESUMED, JOB, 1)
    opened.close()
    assert entries(tmp_path) == [Entry.OUTGOING, Entry.COMMIT, Entry.RESUMED]


@pytest.mark.parametrize("spare", [0, 1, 20, 60, 100])
def test_a_full_disk_promises_nothing_and_leaves_no_half_a_line(spare: int, tmp_path: Path) -> None:
    opened = Ledger(tmp_path, "web1")
    opened.write(Entry.OUTGOING, JOB, 1)
    with full_disk(opened.path, spare), pytest.raises(LedgerError, match="nothing was committed"):
        opened.write(Entry.COMMIT, JOB, 1)
    assert entries(tmp_path) == [Entry.OUTGOING]
    opened.write(Entry.RESUMED, JOB, 1)
    assert entries(tmp_path) == [Entry.OUTGOING, Entry.RESUMED]


def test_a_sync_that_fails_promises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Ledger(tmp_path, "web1")
    opened.write(Entry.INCOMING, JOB, 1)
    with monkeypatch.context() as patch:
        calls = iter([OSError(5, "Input/output error"), None])

        def fdatasync(fd: int) -> None:
            error = next(calls)
            if error is not None:
                raise error

        patch.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(LedgerError, match="Input/output error"):
            opened.write(Entry.COMMITTED, JOB, 1)
    # Else a reader after a restart would find COMMITTED beside the ABORTED that was answered.
    opened.write(Entry.ABORTED, JOB, 1)
    assert entries(tmp_path) == [Entry.INCOMING, Entry.ABORTED]


@pytest.mark.parametrize("entry", Entry)
def test_every_entry_but_ready_is_synced_before_write_returns(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Ledger(tmp_path, "web1")
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(opened.path.read_bytes()))
    opened.write(entry, JOB, 1)
    assert entries(tmp_path) == [entry]
    assert synced == ([] if entry is Entry.READY else [opened.path.read_bytes()])


def test_a_disk_that_cannot_even_take_back_is_trusted_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Ledger(tmp_path, "web1")

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        with pytest.raises(LedgerError):
            opened.write(Entry.INCOMING, JOB, 1)
    with pytest.raises(LedgerError, match="an earlier failure could not be undone"):
        opened.write(Entry.ABORTED, JOB, 1)


# -- what may follow what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "before"), [(e, b) for e in FORBIDDEN for b in sorted(FORBIDDEN[e])])
def test_what_contradicts_a_promise_is_refused(entry: Entry, before: Entry, tmp_path: Path) -> None:
    opened = Ledger(tmp_path, "web1")
    opened.write(before, JOB, 1)
    with pytest.raises(LedgerError, match=f"says {before} of job {JOB}; {entry} cannot follow"):
        opened.write(entry, JOB, 1)
    assert entries(tmp_path) == [before]
    opened.write(entry, JOB, 2)  # another attempt is another matter
    opened.write(entry, "b" * 32, 1)


def test_a_ledger_never_says_both_committed_and_aborted_of_one_attempt() -> None:
    assert Entry.ABORTED in FORBIDDEN[Entry.COMMITTED]
    assert Entry.COMMITTED in FORBIDDEN[Entry.ABORTED]
    assert Entry.RELEASED in FORBIDDEN[Entry.RESUMED]
    assert Entry.RESUMED in FORBIDDEN[Entry.RELEASED]
    assert FORBIDDEN[Entry.COMMIT] >= {Entry.RESUMED, Entry.RELEASED}


def test_every_entry_has_a_verdict() -> None:
    assert set(VERDICTS) == set(Entry)
    for entry in Entry:
        assert ledger.verdict_of([record(entry)]) is VERDICTS[entry]


@pytest.mark.parametrize(
    "gone", [[Entry.OUTGOING, Entry.COMMIT], [Entry.OUTGOING, Entry.COMMIT, Entry.RELEASED]]
)
@pytest.mark.parametrize(
    "arrival",
    [[Entry.INCOMING], [Entry.INCOMING, Entry.READY], [Entry.INCOMING, Entry.ABORTED], [Entry.ABORTED]],
)
def test_an_arrival_that_came_to_nothing_does_not_bring_the_machine_back(
    gone: list[Entry], arrival: list[Entry]
) -> None:
    # Else `ferry run` starts here what runs elsewhere, after it was moved away and its way back was broken off.
    records = [record(entry) for entry in gone]
    verdict = ledger.verdict_of(records)
    assert verdict in (Verdict.IN_DOUBT, Verdict.RELEASED)
    records += [record(entry, "b" * 32, 2) for entry in arrival]
    assert ledger.verdict_of(records) is verdict
    assert ledger.decisive(records) == records[len(gone) - 1]


def test_a_machine_that_came_back_is_here() -> None:
    away = [record(entry) for entry in (Entry.OUTGOING, Entry.COMMIT, Entry.RELEASED)]
    back = [record(entry, "b" * 32, 2) for entry in (Entry.INCOMING, Entry.READY, Entry.COMMITTED)]
    assert ledger.verdict_of([*away, *back]) is Verdict.COMMITTED


@patient
@given(st.lists(st.sampled_from(Entry), max_size=12))
def test_only_what_ends_it_ends_a_doubt_or_an_absence(history: list[Entry]) -> None:
    records = [record(entry, f"{at:032x}", at) for at, entry in enumerate(history)]
    for before, after in itertools.pairwise(range(len(records) + 1)):
        was, now = ledger.verdict_of(records[:before]), ledger.verdict_of(records[:after])
        if was in (Verdict.IN_DOUBT, Verdict.RELEASED) and history[before] in ARRIVALS:
            assert now is was


# -- starting a machine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "incoming", "fresh", "says"),
    [
        ([], False, False, ""),
        ([Entry.OUTGOING], False, False, ""),
        ([Entry.OUTGOING, Entry.COMMIT], False, False, "in doubt: COMMIT was sent to unix:/peer"),
        ([Entry.OUTGOING, Entry.COMMIT], True, False, "in doubt"),
        ([Entry.OUTGOING, Entry.COMMIT], False, True, "in doubt"),
        ([Entry.OUTGOING, Entry.COMMIT, Entry.RESUMED], False, False, ""),
        ([Entry.OUTGOING, Entry.COMMIT, Entry.RELEASED], False, False, "was moved to unix:/peer"),
        ([Entry.OUTGOING, Entry.COMMIT, Entry.RELEASED], False, True, ""),
        ([Entry.OUTGOING, Entry.COMMIT, Entry.RELEASED], True, False, ""),
        (
            [Entry.OUTGOING, Entry.COMMIT, Entry.RELEASED, Entry.ABORTED],
            False,
            False,
            "was moved to unix:/peer",
        ),
        ([Entry.INCOMING, Entry.COMMITTED], False, False, ""),
        ([Entry.INCOMING, Entry.ABORTED], False, False, ""),
    ],
)
def test_a_machine_is_started_where_the_ledger_says_it_is(
    history: list[Entry], incoming: bool, fresh: bool, says: str, tmp_path: Path
) -> None:
    write(tmp_path, *history)
    opened = Ledger(tmp_path, "web1")
    if not says:
        check_ledger(opened, "web1", incoming=incoming, fresh=fresh)
        return
    with pytest.raises(UsageError, match=says) as caught:
        check_ledger(opened, "web1", incoming=incoming, fresh=fresh)
    assert caught.value.remedy


# -- epochs and incarnations -------------------------------------------------------------------------------------------


def test_an_epoch_is_above_all_in_which_the_machine_was_here(tmp_path: Path) -> None:
    opened = Ledger(tmp_path, "web1")
    assert opened.next_epoch() == 1
    opened.write(Entry.INCOMING, JOB, 4)
    opened.write(Entry.COMMITTED, JOB, 4)
    assert opened.next_epoch() == 5
    opened.write(Entry.OUTGOING, "b" * 32, 5)
    assert opened.next_epoch() == 6


def test_a_peer_cannot_use_up_all_epochs(tmp_path: Path) -> None:
    opened = Ledger(tmp_path, "web1")
    opened.write(Entry.INCOMING, JOB, (1 << 64) - 1)
    opened.write(Entry.ABORTED, JOB, (1 << 64) - 1)
    assert opened.next_epoch() == 1


def test_only_a_job_that_arrived_was_heard_of() -> None:
    records = [record(Entry.OUTGOING), record(Entry.INCOMING, "b" * 32, 2)]
    assert ledger.heard_of(records, "b" * 32, 2)
    assert not ledger.heard_of(records, JOB, 1)
    assert not ledger.heard_of(records, "b" * 32, 3)


def test_a_directory_has_one_incarnation_and_a_new_one_has_another(tmp_path: Path) -> None:
    first = ledger.incarnation_of(tmp_path / "a")
    assert ledger.incarnation_of(tmp_path / "a") == first
    assert len(first) == 16
    assert ledger.incarnation_of(tmp_path / "b") != first
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["incarnation"]


def test_processes_that_make_the_incarnation_at_one_time_agree(tmp_path: Path) -> None:
    code = "import pathlib, sys; import migrate.machine.ledger as m; print(m.incarnation_of(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    assert len({process.communicate(timeout=60)[0] for process in started}) == 1


def test_a_line_is_one_json_object_for_people(tmp_path: Path) -> None:
    write(tmp_path, Entry.OUTGOING)
    [line] = (tmp_path / "ledger" / "web1.jsonl").read_text().splitlines()
    said = json.loads(line)
    assert (said["entry"], said["job"], said["epoch"], said["peer"]) == ("outgoing", JOB, 1, "unix:/peer")
