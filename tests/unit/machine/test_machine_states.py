"""The table of a machine's states."""

from __future__ import annotations

from migrate.machine.states import HAS_RUN, MACHINE, MAY_EXECUTE, REMEDIES
from migrate.machine.states import MachineState as S


def reachable(start: S, without: frozenset[S] = frozenset()) -> set[S]:
    found, waiting = {start}, [start]
    while waiting:
        for following in MACHINE[waiting.pop()] - without - found:
            found.add(following)
            waiting.append(following)
    return found


def test_every_state_has_its_row_and_is_reached_from_the_start() -> None:
    assert set(MACHINE) == set(S) == reachable(S.STARTING)


def test_every_state_can_end_and_nothing_follows_the_end() -> None:
    for state in S:
        assert state is S.ENDED or S.ENDED in MACHINE[state]
    assert MACHINE[S.ENDED] == frozenset()


def test_an_incoming_machine_runs_only_by_way_of_committed() -> None:
    assert not reachable(S.INCOMING, without=frozenset({S.COMMITTED})) & (MAY_EXECUTE | HAS_RUN)


def test_a_job_is_in_doubt_only_after_its_machine_was_stopped_and_comes_back_only_by_a_word() -> None:
    assert {state for state, following in MACHINE.items() if S.IN_DOUBT in following} == {S.STOPPED}
    assert S.IN_DOUBT not in MAY_EXECUTE
    assert not MACHINE[S.IN_DOUBT] & {S.OUTGOING, S.STOPPED}


def test_there_is_no_way_back_from_committed() -> None:
    assert not MACHINE[S.COMMITTED] & {S.READY, S.HELD, S.INCOMING}


def test_states_that_need_a_person_say_what_to_do() -> None:
    assert {S.IN_DOUBT, S.HELD, S.FAILED} <= set(REMEDIES)
