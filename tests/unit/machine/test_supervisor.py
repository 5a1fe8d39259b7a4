"""What the table of requests cannot show: failures half-way, deaths at the worst moment, disks that are full, and asking."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from one_machine import EPOCH, JOB, PEER, MadeUpChild, MadeUpRoster, OneMachine, full_disk

from migrate.errors import DeviceError, FerryError, LedgerError, UsageError
from migrate.machine import supervisor
from migrate.machine.config import VCPU_ID
from migrate.machine.ledger import Entry, Verdict
from migrate.machine.roster import Roster
from migrate.machine.states import MachineState as S


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def one(tmp_path: Path, runner: asyncio.Runner) -> Iterator[OneMachine]:
    async def make() -> OneMachine:
        return OneMachine(tmp_path)

    made = runner.run(make())
    yield made
    made.close()


# -- a participant fails while the machine comes to rest or back -------------------------------------------------------


def test_a_participant_that_does_not_stop_leaves_the_machine_running(
    one: OneMachine, runner: asyncio.Runner
) -> None:
    async def play() -> None:
        await one.to(S.OUTGOING)
        one.roster.will_fail("quiesce")
        with pytest.raises(DeviceError, match="quiesce failed"):
            await one.it.quiesce(JOB)

    runner.run(play())
    assert (one.state, one.executes, one.verdict) == (S.RUNNING, True, Verdict.RESUMED)
    assert one.roster.finished == ["aborted"]


@pytest.mark.parametrize("method", ["prepare", "release"])
@pytest.mark.parametrize("state", [S.STOPPED, S.IN_DOUBT])
def test_a_machine_that_cannot_be_resumed_stands_still_says_why_and_can_be_tried_again(
    one: OneMachine, runner: asyncio.Runner, state: S, method: str
) -> None:
    async def play() -> None:
        await one.to(state)
        one.roster.will_fail(method)
        back = (
            one.it.abort_outgoing(JOB, "why")
            if state is S.STOPPED
            else one.it.peer_said(JOB, EPOCH, "aborted", "")
        )
        with pytest.raises(DeviceError, match=f"{method} failed"):
            await back
        assert (one.state, one.roster.guest) == (S.PAUSED, "stopped")
        assert f"{method} failed" in one.changes[-1][1]
        assert one.verdict is Verdict.RESUMED  # it is this host's, and nobody else's
        await one.it.run()

    runner.run(play())
    assert (one.state, one.executes) == (S.RUNNING, True)


@pytest.mark.parametrize(
    "failure", [DeviceError("x"), LedgerError("x"), FerryError("x")], ids=lambda e: e.code
)
def test_whatever_keeps_it_from_running_the_machine_is_never_left_in_a_jobs_state(
    one: OneMachine, runner: asyncio.Runner, failure: FerryError
) -> None:
    async def play() -> None:
        await one.to(S.STOPPED)
        one.roster.fail = {"prepare": [failure], "halt": [failure]}
        await one.coordinator_goes()

    runner.run(play())
    assert one.state is S.FAILED  # told as Changed, and by `ferry list`
    assert one.it.job is None


def test_a_pause_that_fails_leaves_the_machine_running(one: OneMachine, runner: asyncio.Runner) -> None:
    async def play() -> None:
        await one.to(S.RUNNING)
        one.roster.will_fail("quiesce")
        with pytest.raises(DeviceError):
            await one.it.pause()

    runner.run(play())
    assert (one.state, one.executes) == (S.RUNNING, True)


def test_a_paused_machine_that_was_not_moved_stays_paused(one: OneMachine, runner: asyncio.Runner) -> None:
    async def play() -> None:
        await one.to(S.PAUSED)
        await one.it.begin_outgoing(JOB, PEER, ":1.7")
        assert (await one.it.quiesce(JOB))["paused"] is True
        await one.it.abort_outgoing(JOB, "why")

    runner.run(play())
    assert (one.state, one.executes, one.verdict) == (S.PAUSED, False, Verdict.RESUMED)


# -- commit ------------------------------------------------------------------------------------------------------------


def test_locks_are_let_go_before_commit_is_written_and_taken_again_by_a_resume(
    one: OneMachine, runner: asyncio.Runner
) -> None:
    async def play() -> None:
        await one.to(S.STOPPED)
        locked = [one.roster.locked]
        await one.it.commit(JOB, EPOCH)
        locked.append(one.roster.locked)
        await one.it.peer_said(JOB, EPOCH, "aborted", "[]")
        assert [*locked, one.roster.locked] == [True, False, True]

    runner.run(play())


def test_a_lock_that_is_not_let_go_is_no_commit(one: OneMachine, runner: asyncio.Runner) -> None:
    async def play() -> None:
        await one.to(S.STOPPED)
        one.roster.will_fail("release_locks")
        with pytest.raises(DeviceError):
            await one.it.commit(JOB, EPOCH)

    runner.run(play())
    assert (one.state, one.verdict) == (S.STOPPED, Verdict.OPEN)


@pytest.mark.parametrize("spare", [0, 1, 40, 90])
def test_a_commit_that_cannot_be_written_is_none_and_the_machine_goes_on(
    one: OneMachine, runner: asyncio.Runner, spare: int
) -> None:
    async def play() -> None:
        await one.to(S.STOPPED)
        before = (S.STOPPED, one.entries())
        with full_disk(one.ledger.path, spare), pytest.raises(LedgerError, match="nothing was committed"):
            await one.it.commit(JOB, EPOCH)
        assert (one.state, one.entries()) == before  # and the next reader finds no half of it
        await one.it.abort_outgoing(JOB, "the ledger cannot be written")

    runner.run(play())
    assert (one.state, one.executes, one.verdict) == (S.RUNNING, True, Verdict.RESUMED)


@pytest.mark.parametrize("state", [S.OUTGOING, S.STOPPED])
def test_a_full_disk_does_not_keep_a_machine_stopped_that_was_promised_to_nobody(
    one: OneMachine, runner: asyncio.Runner, state: S
) -> None:
    async def play() -> None:
        await one.to(state)
        with full_disk(one.ledger.path):
            await one.coordinator_goes()

    runner.run(play())
    assert (one.state, one.executes) == (S.RUNNING, True)
    assert one.verdict is Verdict.OPEN


@pytest.mark.parametrize("answer", ["aborted", "running"])
def test_a_doubt_whose_end_cannot_be_written_goes_on(
    one: OneMachine, runner: asyncio.Runner, answer: str
) -> None:
    async def play() -> None:
        await one.to(S.IN_DOUBT)
        with full_disk(one.ledger.path), pytest.raises(LedgerError):
            await one.it.peer_said(JOB, EPOCH, answer, "[]")
        assert (one.state, one.executes, one.verdict) == (S.IN_DOUBT, False, Verdict.IN_DOUBT)
        await one.it.peer_said(JOB, EPOCH, answer, "[]")

    runner.run(play())
    assert one.verdict is (Verdict.RESUMED if answer == "aborted" else Verdict.RELEASED)


@pytest.mark.parametrize(
    ("job", "epoch", "answer"),
    [
        ("b" * 32, EPOCH, "aborted"),
        (JOB, EPOCH + 1, "aborted"),
        (JOB, EPOCH, "unknown"),
        (JOB, EPOCH, "committed"),
    ],
)
def test_no_word_but_the_right_one_ends_a_doubt(
    one: OneMachine, runner: asyncio.Runner, job: str, epoch: int, answer: str
) -> None:
    async def play() -> None:
        await one.to(S.IN_DOUBT)
        with pytest.raises(UsageError):
            await one.it.peer_said(job, epoch, answer, "[]")

    runner.run(play())
    assert (one.state, one.executes, one.verdict) == (S.IN_DOUBT, False, Verdict.IN_DOUBT)


def test_a_death_in_doubt_ends_no_doubt_and_is_told(one: OneMachine, runner: asyncio.Runner) -> None:
    async def play() -> None:
        await one.to(S.IN_DOUBT)
        await one.dies()

    runner.run(play())
    assert one.verdict is Verdict.IN_DOUBT
    assert one.changes[-1][0] == "in-doubt"
    assert "killed" in one.changes[-1][1]


def test_an_abort_that_comes_after_commit_is_refused(one: OneMachine, runner: asyncio.Runner) -> None:
    async def play() -> None:
        await one.to(S.STOPPED)
        _, late = await asyncio.gather(
            one.it.commit(JOB, EPOCH), one.it.abort_outgoing(JOB, "late"), return_exceptions=True
        )
        assert isinstance(late, UsageError)

    runner.run(play())
    assert (one.state, one.executes) == (S.IN_DOUBT, False)


# -- taking over -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("also", ["", "halt", "release_locks"])
def test_a_take_over_that_fails_before_committed_is_aborted_and_holds_no_lock_when_it_says_so(
    one: OneMachine, runner: asyncio.Runner, also: str
) -> None:
    async def play() -> None:
        await one.to(S.READY)
        one.roster.will_fail("prepare")
        if also:  # it hangs: nobody knows what it does once it wakes
            one.roster.will_fail(also)
        with pytest.raises(DeviceError, match="prepare failed"):
            await one.it.commit_incoming(JOB, EPOCH, 1000, paused=False)
        # The source resumes as soon as it hears ABORTED, and takes the locks.
        assert not one.roster.locked
        assert await one.it.ask(JOB, EPOCH) == "aborted"

    runner.run(play())
    assert (one.state, one.executes, one.verdict) == (S.ENDED, False, Verdict.ABORTED)


@pytest.mark.parametrize("spare", [0, 30])
def test_a_take_over_that_cannot_be_written_is_none(
    one: OneMachine, runner: asyncio.Runner, spare: int
) -> None:
    async def play() -> None:
        await one.to(S.READY)
        with full_disk(one.ledger.path, spare):
            with pytest.raises(LedgerError):
                await one.it.commit_incoming(JOB, EPOCH, 1000, paused=False)
            assert (one.state, one.executes, one.roster.locked) == (S.ENDED, False, False)
            # ABORTED is not written either, so nobody is told of it yet.
            with pytest.raises(LedgerError):
                await one.it.ask(JOB, EPOCH)
        assert await one.it.ask(JOB, EPOCH) == "aborted"

    runner.run(play())
    assert one.entries() == ["incoming", "ready", "aborted"]


def test_after_committed_a_participant_that_does_not_start_is_tried_again_until_it_does(
    one: OneMachine, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RETRY_SECONDS", 0.0)

    async def play() -> None:
        await one.to(S.READY)
        one.roster.will_fail("release", times=3)
        await one.it.commit_incoming(JOB, EPOCH, 1000, paused=False)

    runner.run(play())
    assert (one.state, one.executes, one.verdict) == (S.RUNNING, True, Verdict.COMMITTED)
    assert one.roster.finished == ["completed"]


def test_after_committed_a_dead_participant_is_the_machines_failure_and_the_source_never_hears_aborted(
    one: OneMachine, runner: asyncio.Runner
) -> None:
    async def play() -> None:
        await one.to(S.READY)
        one.roster.will_fail("release")
        one.roster.children["uart0"].alive = False
        with pytest.raises(DeviceError):
            await one.it.commit_incoming(JOB, EPOCH, 1000, paused=False)
        assert await one.it.ask(JOB, EPOCH) == "committed"

    runner.run(play())
    assert (one.state, one.verdict) == (S.FAILED, Verdict.COMMITTED)


def test_an_ask_in_the_middle_of_a_take_over_waits_for_its_end(
    one: OneMachine, runner: asyncio.Runner
) -> None:
    async def play() -> None:
        await one.to(S.READY)
        one.roster.gate = asyncio.Event()
        over = asyncio.create_task(one.it.commit_incoming(JOB, EPOCH, 1000, paused=False))
        await one.settle()
        assert one.state is S.COMMITTED
        asked = asyncio.create_task(one.it.ask(JOB, EPOCH))
        await one.settle()
        assert not asked.done()
        one.roster.gate.set()
        await over
        assert await asked == "running"

    runner.run(play())


def test_a_commit_that_comes_after_an_ask_is_refused(one: OneMachine, runner: asyncio.Runner) -> None:
    async def play() -> None:
        await one.to(S.READY)
        answer, late = await asyncio.gather(
            one.it.ask(JOB, EPOCH),
            one.it.commit_incoming(JOB, EPOCH, 0, paused=False),
            return_exceptions=True,
        )
        assert answer == "aborted"
        assert isinstance(late, UsageError)

    runner.run(play())
    assert (one.executes, one.verdict) == (False, Verdict.ABORTED)


def test_a_coordinator_that_dies_right_after_the_take_over_changes_nothing(
    one: OneMachine, runner: asyncio.Runner
) -> None:
    async def play() -> None:
        await one.to(S.READY)
        gone = one.watched[":1.7"]
        over = asyncio.create_task(one.it.commit_incoming(JOB, EPOCH, 1000, paused=False))
        await asyncio.sleep(0)
        gone()  # seen while the take-over holds the lock
        await over
        await one.settle()

    runner.run(play())
    assert (one.state, one.executes) == (S.RUNNING, True)


def test_a_held_copy_is_given_up_in_time(
    one: OneMachine, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "HOLD_SECONDS", 0.0)

    async def play() -> None:
        await one.to(S.READY)
        await one.coordinator_goes()
        await asyncio.wait_for(one.it.ended.wait(), 5)

    runner.run(play())
    assert one.verdict is Verdict.ABORTED


def test_a_copy_ends_with_its_connection_also_where_aborted_cannot_be_written(
    one: OneMachine, runner: asyncio.Runner
) -> None:
    async def play() -> None:
        await one.to(S.INCOMING)
        with full_disk(one.ledger.path):
            await one.coordinator_goes()

    runner.run(play())
    assert one.state is S.ENDED
    assert one.it.ended.is_set()


def test_an_operator_who_keeps_a_held_copy_that_does_not_start_can_try_again(
    one: OneMachine, runner: asyncio.Runner
) -> None:
    async def play() -> None:
        await one.to(S.HELD)
        one.roster.will_fail("prepare")
        with pytest.raises(DeviceError):
            await one.it.resolve("destination")
        assert (one.state, one.roster.locked, one.verdict) == (S.HELD, False, Verdict.OPEN)
        assert await one.it.resolve("destination") == "running"

    runner.run(play())
    assert (one.executes, one.verdict) == (True, Verdict.COMMITTED)
    assert one.roster.finished == ["completed"]


# -- asking ------------------------------------------------------------------------------------------------------------


def test_a_job_that_the_ledger_never_heard_of_is_unknown_and_nothing_is_written(
    one: OneMachine, runner: asyncio.Runner
) -> None:
    # A source asks after COMMIT; by then INCOMING was synced here. A ledger without it has lost something.
    async def play() -> None:
        await one.to(S.READY)
        assert await one.it.ask("b" * 32, EPOCH) == "unknown"
        assert await one.it.ask(JOB, EPOCH + 1) == "unknown"

    runner.run(play())
    assert (one.state, one.entries()) == (S.READY, ["incoming", "ready"])


@pytest.mark.parametrize(
    ("then", "answer"),
    [
        ("run", "running"),
        ("pause", "running"),
        ("move on", "running"),
        ("fail", "committed"),
        ("end", "committed"),
    ],
)
def test_what_was_committed_is_running_only_while_it_is_seen_to_be_here(
    one: OneMachine, runner: asyncio.Runner, then: str, answer: str
) -> None:
    async def play() -> None:
        await one.to(S.READY)
        await one.it.commit_incoming(JOB, EPOCH, 0, paused=False)
        if then == "pause":
            await one.it.pause()
        elif then == "move on":
            await one.it.begin_outgoing("b" * 32, PEER, ":1.8")
            await one.it.quiesce("b" * 32)
            await one.it.commit("b" * 32, EPOCH + 1)
        elif then == "fail":
            await one.dies()
        elif then == "end":
            await one.it.quit(force=False)
        assert await one.it.ask(JOB, EPOCH) == answer

    runner.run(play())
    assert Verdict.ABORTED is not one.verdict


def test_a_machine_that_was_committed_here_is_not_taken_at_that_epoch_again(
    one: OneMachine, runner: asyncio.Runner
) -> None:
    one.ledger.write(Entry.INCOMING, JOB, 7)
    one.ledger.write(Entry.COMMITTED, JOB, 7)

    async def play() -> None:
        with pytest.raises(LedgerError, match="find out where the machine runs"):
            await one.it.begin_incoming("b" * 32, 7, PEER, ":1.7")
        await one.it.begin_incoming("b" * 32, 8, PEER, ":1.7")

    runner.run(play())


@pytest.mark.parametrize("state", [S.RUNNING, S.OUTGOING])
def test_a_guest_that_powers_off_ends_the_machine_and_its_job(
    one: OneMachine, runner: asyncio.Runner, state: S
) -> None:
    async def play() -> None:
        await one.to(state)
        one.roster.children[VCPU_ID] = MadeUpChild(VCPU_ID, powered_off=True)
        with full_disk(one.ledger.path):  # even where that cannot be written
            await one.dies(VCPU_ID)

    runner.run(play())
    assert one.state is S.ENDED
    assert one.changes[-1] == ("ended", "the guest powered off")


def test_the_roster_that_is_made_up_has_what_the_supervisor_asks_for() -> None:
    for name in ("quiesce", "prepare", "release", "resume", "halt", "release_locks", "end_migration"):
        assert hasattr(Roster, name)
        assert hasattr(MadeUpRoster, name)
