"""Every state × every request: what a supervisor does, who may execute, and what its ledger says afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from one_machine import EPOCH, JOB, PEER, OneMachine

from migrate.errors import FerryError, UsageError
from migrate.machine.ledger import Entry, Verdict
from migrate.machine.states import MAY_EXECUTE
from migrate.machine.states import MachineState as S

#: "-" is refused, "=" changes nothing, else the state that follows.
TABLE = """
             starting running  paused   outgoing stopped  in-doubt incoming ready    held     failed   ended
start        running  -        -        -        -        -        -        -        -        -        -
pause        -        paused   -        -        -        -        -        -        -        -        -
run          -        -        running  -        -        -        -        -        -        -        -
quit         ended    ended    ended    ended    ended    -        ended    -        -        ended    =
quit-force   ended    ended    ended    ended    ended    ended    ended    ended    ended    ended    =
begin        -        outgoing outgoing -        -        -        -        -        -        -        -
peer-is      -        -        -        =        -        -        -        -        -        -        -
quiesce      -        -        -        stopped  -        -        -        -        -        -        -
abort        =        =        =        running  running  -        -        -        -        =        =
commit       -        -        -        -        in-doubt -        -        -        -        -        -
said-running -        -        -        -        -        ended    -        -        -        -        -
said-aborted -        -        -        -        -        running  -        -        -        -        -
arrive       incoming -        -        -        -        -        -        -        -        -        -
ready        -        -        -        -        -        -        ready    -        -        -        -
take-over    -        -        -        -        -        -        -        running  -        -        -
take-paused  -        -        -        -        -        -        -        paused   -        -        -
abort-in     =        =        =        -        -        -        ended    ended    ended    =        =
ask          =        =        =        =        =        =        ended    ended    ended    =        =
keep-source  -        -        -        -        -        running  -        -        ended    -        -
keep-dest    -        -        -        -        -        ended    -        -        running  -        -
coord-gone   =        =        =        running  running  =        ended    held     =        =        =
died         =        failed   failed   failed   failed   =        ended    ended    ended    =        =
"""

REQUESTS: dict[str, Callable[[OneMachine], Awaitable[object]]] = {
    "start": lambda one: one.it.start(),
    "pause": lambda one: one.it.pause(),
    "run": lambda one: one.it.run(),
    "quit": lambda one: one.it.quit(force=False),
    "quit-force": lambda one: one.it.quit(force=True),
    "begin": lambda one: one.it.begin_outgoing(JOB, PEER, ":1.7"),
    "peer-is": lambda one: one.it.peer_is(JOB, "incarnation"),
    "quiesce": lambda one: one.it.quiesce(JOB),
    "abort": lambda one: one.it.abort_outgoing(JOB, "why"),
    "commit": lambda one: one.it.commit(JOB, EPOCH),
    "said-running": lambda one: one.it.peer_said(JOB, EPOCH, "running", "[]"),
    "said-aborted": lambda one: one.it.peer_said(JOB, EPOCH, "aborted", "[]"),
    "arrive": lambda one: one.it.begin_incoming(JOB, EPOCH, PEER, ":1.7"),
    "ready": lambda one: one.it.ready(JOB),
    "take-over": lambda one: one.it.commit_incoming(JOB, EPOCH, 1000, paused=False),
    "take-paused": lambda one: one.it.commit_incoming(JOB, EPOCH, 1000, paused=True),
    "abort-in": lambda one: one.it.abort_incoming(JOB, "why"),
    "ask": lambda one: one.it.ask(JOB, EPOCH),
    "keep-source": lambda one: one.it.resolve("source"),
    "keep-dest": lambda one: one.it.resolve("destination"),
    "coord-gone": lambda one: one.coordinator_goes(),
    "died": lambda one: one.dies(),
}

#: What the ledger says where the request changed the state; in every other cell it says what it said before.
VERDICTS = {
    ("begin", S.OUTGOING): Verdict.OPEN,
    ("quiesce", S.STOPPED): Verdict.OPEN,
    ("abort", S.RUNNING): Verdict.RESUMED,
    ("commit", S.IN_DOUBT): Verdict.IN_DOUBT,
    ("said-running", S.ENDED): Verdict.RELEASED,
    ("said-aborted", S.RUNNING): Verdict.RESUMED,
    ("arrive", S.INCOMING): Verdict.OPEN,
    ("ready", S.READY): Verdict.OPEN,
    ("take-over", S.RUNNING): Verdict.COMMITTED,
    ("take-paused", S.PAUSED): Verdict.COMMITTED,
    ("abort-in", S.ENDED): Verdict.ABORTED,
    ("ask", S.ENDED): Verdict.ABORTED,
    ("keep-source", S.RUNNING): Verdict.RESUMED,
    ("keep-source", S.ENDED): Verdict.ABORTED,
    ("keep-dest", S.ENDED): Verdict.RELEASED,
    ("keep-dest", S.RUNNING): Verdict.COMMITTED,
    ("coord-gone", S.RUNNING): Verdict.RESUMED,
    ("coord-gone", S.ENDED): Verdict.ABORTED,
}


def cells() -> list[tuple[str, S, str]]:
    head, *rows = TABLE.strip().splitlines()
    states = [S(name) for name in head.split()]
    assert set(states) == set(S) - {S.COMMITTED}  # passed through under the lock: see test_supervisor.py
    found = []
    for row in rows:
        request, *outcomes = row.split()
        found += [(request, state, what) for state, what in zip(states, outcomes, strict=True)]
    assert {request for request, _, _ in found} == set(REQUESTS)
    return found


@pytest.mark.parametrize(("request_name", "state", "expected"), cells(), ids=lambda value: str(value))
def test_every_request_in_every_state(request_name: str, state: S, expected: str, tmp_path: Path) -> None:
    asyncio.run(_one_cell(request_name, state, expected, tmp_path))


async def _one_cell(request: str, state: S, expected: str, directory: Path) -> None:
    one = await OneMachine(directory).to(state)
    try:
        before, verdict, executed = one.entries(), one.verdict, one.executes
        refusal: FerryError | None = None
        try:
            await REQUESTS[request](one)
        except FerryError as error:
            refusal = error
        await one.settle()
        if expected == "-":
            assert isinstance(refusal, UsageError)
            assert refusal.reason
            assert refusal.remedy
            assert (one.state, one.entries(), one.executes) == (state, before, executed)
            return
        assert refusal is None
        assert one.state is (state if expected == "=" else S(expected))
        if expected == "=":
            assert one.executes == executed
        after = VERDICTS.get((request, one.state)) if expected != "=" else None
        # A quit or a death ends a job only where the ledger must say so.
        if request in ("quit", "quit-force", "died") and expected != "=":
            after = _after_the_end(request, state) or verdict
        assert one.verdict is (after or verdict)
        _check(one)
    finally:
        one.close()


def _after_the_end(request: str, state: S) -> Verdict | None:
    if state in (S.INCOMING, S.READY, S.HELD):
        return Verdict.ABORTED
    return Verdict.RESUMED if request == "died" and state in (S.OUTGOING, S.STOPPED) else None


def _check(one: OneMachine) -> None:
    """What holds in every state."""
    if one.executes and one.state not in (S.ENDED, S.FAILED):  # there, the process around it ends them all
        assert one.state in MAY_EXECUTE
        assert one.verdict not in (Verdict.IN_DOUBT, Verdict.RELEASED, Verdict.ABORTED)
    if one.state is S.RUNNING:
        assert one.executes
    said = one.entries()
    assert not {Entry.COMMITTED, Entry.ABORTED} <= set(said)
    if one.state is not S.ENDED:  # a machine in doubt that was ended by force is in doubt still
        assert (one.state is S.IN_DOUBT) == (one.verdict is Verdict.IN_DOUBT)
    assert one.entries() == [str(record.entry) for record in one.ledger.records]
