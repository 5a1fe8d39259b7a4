"""The two state machines, pushed as a pair: what one side may say the other may hear, and one host at most runs the machine."""

from __future__ import annotations

from collections import deque
from functools import cache

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from messages_made import sample
from two_sides import PEER, SAMPLES, Channel, World, moves

from migrate.errors import LocalProtocolError, RemoteProtocolError
from migrate.protocol import messages as m
from migrate.protocol.states import (
    BEFORE_COMMIT,
    DID,
    ENDS,
    RECV,
    SEND,
    SOURCE_RESUMES,
    TABLES,
    Conversation,
    Did,
    Role,
    Stage,
)


def check(world: World) -> None:
    """What may never be otherwise."""
    assert not (world.source_executes and world.destination_executes), "both hosts run the machine"
    assert world.move.source in SOURCE_RESUMES or world.commit
    if world.source_executes:
        assert not world.commit or world.source_ended == "resumed"
    if world.destination_said == "committed":
        assert world.commit, "the destination committed what the source had not"
        assert world.source_ended != "resumed", "the source may resume, and the destination has committed"
    if world.source_ended == "released":
        assert world.destination_said == "committed"
    if world.move.source in SOURCE_RESUMES and world.move.source in ENDS:
        assert world.source_executes, "the source's conversation has ended, it may resume, and does not"


class TwoHosts(RuleBasedStateMachine):
    """Any course of events, pings and cuts and deaths among them, as long as Hypothesis likes."""

    @initialize()
    def begin(self) -> None:
        self.world = World()

    @rule(data=st.data())
    def something_happens(self, data: st.DataObject) -> None:
        possible = dict(moves(self.world))
        if possible:
            self.world = possible[data.draw(st.sampled_from(sorted(possible)))]

    @rule(data=st.data())
    def something_happens_that_loses_nothing(self, data: st.DataObject) -> None:
        # Else most courses are cut long before READY.
        possible = {
            name: world
            for name, world in moves(self.world, liveness=False)
            if not any(word in name for word in ("lost", "dies", "ABORT", "REJECT", "REFUSE", "BYE"))
        }
        if possible:
            self.world = possible[data.draw(st.sampled_from(sorted(possible)))]

    @invariant()
    def at_most_one_host_runs_it(self) -> None:
        check(self.world)


TwoHosts.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_any_course_of_events_leaves_one_host_at_most = TwoHosts.TestCase


@cache
def reachable() -> dict[World, list[World]]:
    """Every world that can come about with at most one message on each wire at a time, and what follows on it."""
    first = World()
    found: dict[World, list[World]] = {}
    waiting = deque([first])
    while waiting:
        world = waiting.popleft()
        if world in found:
            continue
        found[world] = [after for _, after in moves(world, liveness=False, most=2)]
        waiting.extend(after for after in found[world] if after not in found)
    return found


def test_no_reachable_pair_of_stages_lets_both_hosts_run_it() -> None:
    worlds = reachable()
    for world in worlds:
        check(world)
    seen = {(role, world.move.stage(role)) for world in worlds for role in Role}
    for role in Role:
        # Else the search proves nothing: every stage of the tables is reached.
        wanted = {*TABLES[role], *ENDS} - UNREACHED[role] - {Stage.ASKING, Stage.ANSWERED}
        assert wanted <= {stage for owner, stage in seen if owner is role}


#: Ends that only the other side can come to.
UNREACHED = {Role.SOURCE: {Stage.HELD}, Role.DESTINATION: {Stage.DOUBT}}


def test_from_everywhere_the_machine_can_come_to_run_on_exactly_one_host() -> None:
    worlds = reachable()
    before: dict[World, list[World]] = {world: [] for world in worlds}
    for world, following in worlds.items():
        for after in following:
            before[after].append(world)
    ends = [world for world in worlds if world.settled and not world.move.up]
    assert ends
    good = set(ends)
    waiting = deque(ends)
    while waiting:
        for world in before[waiting.popleft()]:
            if world not in good:
                good.add(world)
                waiting.append(world)
    assert not worlds.keys() - good


def test_before_commit_a_lost_connection_ends_with_the_source_running() -> None:
    for stage in Stage:
        row = TABLES[Role.SOURCE].get(stage, {})
        if (DID, Did.LOST) in row:
            lost = row[(DID, Did.LOST)]
            expected = SOURCE_RESUMES if stage in SOURCE_RESUMES else {Stage.DOUBT}
            assert lost in expected, stage


def test_every_stage_that_is_no_end_says_what_a_lost_connection_leads_to() -> None:
    for role in Role:
        for stage, row in TABLES[role].items():
            assert ((DID, Did.LOST) in row) == (stage not in ENDS), (role, stage)


def test_what_is_said_in_a_stage_is_heard_in_some_stage_and_the_other_way_round() -> None:
    for role in Role:
        said = {what for row in TABLES[role].values() for way, what in row if way == SEND}
        heard = {what for row in TABLES[PEER[role]].values() for way, what in row if way == RECV}
        assert said == heard


def test_every_message_but_join_belongs_to_the_control_channel() -> None:
    spoken = {what for table in TABLES.values() for row in table.values() for way, what in row if way != DID}
    assert set(m.REGISTRY.values()) - spoken == {m.Join}


def test_nothing_follows_an_end_but_liveness() -> None:
    for role in Role:
        for stage in ENDS:
            events = {event for event, after in TABLES[role][stage].items() if after is not stage}
            assert not events
            assert (SEND, m.Ping) not in TABLES[role][stage]


def test_a_ping_that_crossed_the_last_word_is_no_breach() -> None:
    channel = Channel(source=Stage.COMMITTING, destination=Stage.COMMITTED)
    channel = channel.says(Role.DESTINATION, m.Running).says(Role.SOURCE, m.Ping)
    conversation = Conversation(Role.DESTINATION)
    conversation.stage = channel.destination
    assert conversation.ended
    conversation.received(SAMPLES[m.Ping])
    conversation.sending(SAMPLES[m.Pong])
    assert conversation.stage is Stage.RUNNING


# -- the class ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("stage", Stage)
def test_what_is_not_in_the_table_is_a_breach_and_changes_nothing(role: Role, stage: Stage) -> None:
    row = TABLES[role].get(stage, {})
    for kind in m.REGISTRY.values():
        conversation = Conversation(role)
        conversation.stage = stage
        if (SEND, kind) not in row:
            with pytest.raises(
                LocalProtocolError, match=f"{kind.name} may not be sent by the {role} in stage {stage}"
            ):
                conversation.sending(sample(kind))
            assert conversation.stage is stage
        if (RECV, kind) not in row:
            with pytest.raises(RemoteProtocolError, match=f"said {kind.name} to the {role} in stage {stage}"):
                conversation.received(sample(kind))
            assert conversation.stage is stage
    for what in Did:
        conversation = Conversation(role)
        conversation.stage = stage
        if (DID, what) not in row:
            with pytest.raises(LocalProtocolError):
                conversation.did(what)
            assert conversation.stage is stage


def test_commit_is_said_once_and_only_after_it_was_written() -> None:
    conversation = Conversation(Role.SOURCE)
    conversation.stage = Stage.READY
    with pytest.raises(LocalProtocolError):
        conversation.sending(sample(m.Commit))
    conversation.did(Did.WROTE_COMMIT)
    conversation.sending(sample(m.Commit))
    with pytest.raises(LocalProtocolError):
        conversation.sending(sample(m.Commit))


def test_after_commit_the_source_cannot_abort() -> None:
    for stage in (Stage.COMMITTED, Stage.COMMITTING, Stage.DOUBT):
        conversation = Conversation(Role.SOURCE)
        conversation.stage = stage
        with pytest.raises(LocalProtocolError):
            conversation.sending(sample(m.Abort))


def test_a_reject_that_crosses_commit_leaves_the_source_in_doubt_and_not_running() -> None:
    # REJECT is said before ABORTED is in the ledger; it is no promise.
    channel = Channel(source=Stage.READY, destination=Stage.READY)
    channel = channel.did(Role.SOURCE, Did.WROTE_COMMIT).says(Role.SOURCE, m.Commit)
    channel = channel.says(Role.DESTINATION, m.Reject)
    channel, _ = channel.hears(Role.SOURCE)
    assert channel.source is Stage.DOUBT


@pytest.mark.parametrize("stage", BEFORE_COMMIT)
def test_either_side_may_end_it_before_commit(stage: Stage) -> None:
    for role, word in ((Role.SOURCE, m.Abort), (Role.DESTINATION, m.Reject)):
        channel = Channel(source=stage, destination=stage).says(role, word)
        channel, _ = channel.hears(PEER[role])
        assert (channel.source, channel.destination) == (Stage.FAILED, Stage.FAILED)
