"""Two supervisors, two real ledgers, and coordinators that do what the protocol says: in any order of requests, deaths and
failures the machine never executes on both hosts, and never on neither unless a host says why."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from one_machine import PEER, OneMachine, full_disk

from migrate.errors import FerryError
from migrate.machine.ledger import Verdict
from migrate.machine.states import MachineState as S

COORDINATOR = ":1.7"
FAILURES = ("quiesce", "prepare", "release_locks", "halt")


class TwoHosts(RuleBasedStateMachine):
    """One attempt after the other; an answer or a COMMIT is only heard where it was said."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp(prefix="vf-"))
        self.attempt = 0
        self.said: set[str] = set()  # what crossed the wire in this attempt
        self.heard_alive = True
        self.source = self.runner.run(self._host("source"))
        self.destination = self.runner.run(self._host("destination"))
        self._do(self.source.it.start())

    async def _host(self, name: str) -> OneMachine:
        return OneMachine(self.directory / name)

    def _do(self, work: Awaitable[object]) -> object:
        """What it answers, or the error."""

        async def done() -> object:
            try:
                return await work
            except FerryError as error:
                return error

        answer = self.runner.run(done())
        self.runner.run(self.source.settle())
        return answer

    @property
    def job(self) -> str:
        return f"{self.attempt:032x}"

    def _epoch(self) -> int:
        return max(r.epoch for r in self.source.ledger.records if r.job == self.job)

    # -- the course ----------------------------------------------------------------------------------------------------

    def a_migration_begins(self) -> None:
        self.attempt += 1
        self.said = set()
        if self.destination.state is S.ENDED:  # its process is gone, and a new one waits
            self.destination.close()
            self.destination = self.runner.run(self._host("destination"))
        self._do(self.source.it.begin_outgoing(self.job, PEER, COORDINATOR))

    def the_destination_takes_part(self) -> None:
        self._do(self.destination.it.begin_incoming(self.job, self._epoch(), PEER, COORDINATOR))

    def the_source_stops(self) -> None:
        self._do(self.source.it.quiesce(self.job))

    def the_destination_is_ready(self) -> None:
        if not isinstance(self._do(self.destination.it.ready(self.job)), FerryError):
            self.said.add("ready")

    def the_source_commits(self) -> None:
        if "ready" not in self.said:
            return
        answer = self._do(self.source.it.commit(self.job, self._epoch()))
        if not isinstance(answer, FerryError):
            self.said.add("commit")

    @precondition(lambda self: self.source.state in (S.OUTGOING, S.STOPPED))
    @rule()
    def it_goes_on(self) -> None:
        self.the_source_stops()
        self.the_destination_is_ready()
        self.the_source_commits()

    @precondition(lambda self: "commit" in self.said)
    @rule(paused=st.booleans())
    def the_destination_hears_commit(self, paused: bool) -> None:
        answer = self._do(self.destination.it.commit_incoming(self.job, self._epoch(), 1000, paused=paused))
        if not isinstance(answer, FerryError):
            self.said.add("running")
        elif self._do(self.destination.it.ask(self.job, self._epoch())) == "aborted":
            self.said.add("aborted")

    @precondition(lambda self: self.source.state is S.IN_DOUBT)
    @rule()
    def the_source_asks(self) -> None:
        answer = self._do(self.destination.it.ask(self.job, self._epoch()))
        if isinstance(answer, str):
            self.said.add(answer)

    @precondition(lambda self: self.said & {"running", "aborted"})
    @rule(data=st.data())
    def the_source_hears_an_answer(self, data: st.DataObject) -> None:
        answer = data.draw(st.sampled_from(sorted(self.said & {"running", "aborted"})))
        self._do(self.source.it.peer_said(self.job, self._epoch(), answer, "[]"))

    @precondition(lambda self: self.source.state in (S.RUNNING, S.PAUSED))
    @rule(steps=st.integers(1, 4) | st.just(5))
    def a_migration_goes_well_so_far(self, steps: int) -> None:
        for step in (
            self.a_migration_begins, self.the_destination_takes_part, self.the_source_stops,
            self.the_destination_is_ready, self.the_source_commits,
        )[:steps]:  # fmt: skip
            step()

    # -- and what crosses it ---------------------------------------------------------------------------------------------

    # One rule, so that trouble does not crowd out the way to COMMIT and beyond.
    @rule(source=st.booleans(), what=st.sampled_from(["give up", "coordinator", "pause", "run", *FAILURES]))
    def trouble(self, source: bool, what: str) -> None:
        one = self.source if source else self.destination
        if what == "give up":
            self._do(one.it.abort_outgoing(self.job, "cancelled"))
            self._do(one.it.abort_incoming(self.job, "rejected"))
        elif what == "coordinator":
            self._do(one.coordinator_goes())
        elif what in ("pause", "run"):
            self._do(one.it.pause() if what == "pause" else one.it.run())
        else:
            one.roster.will_fail(what)

    @precondition(lambda self: self.source.state is S.STOPPED and "ready" in self.said)
    @rule(spare=st.integers(0, 120))
    def the_sources_disk_is_full_at_commit(self, spare: int) -> None:
        with full_disk(self.source.ledger.path, spare):
            answer = self._do(self.source.it.commit(self.job, self._epoch()))
        if not isinstance(answer, FerryError):
            self.said.add("commit")

    @precondition(lambda self: "commit" in self.said and self.destination.state is S.READY)
    @rule(spare=st.integers(0, 120))
    def the_destinations_disk_is_full_at_commit(self, spare: int) -> None:
        with full_disk(self.destination.ledger.path, spare):
            answer = self._do(self.destination.it.commit_incoming(self.job, self._epoch(), 0, paused=False))
        if not isinstance(answer, FerryError):
            self.said.add("running")

    # -- what holds ------------------------------------------------------------------------------------------------------

    @invariant()
    def it_executes_on_one_host_at_most(self) -> None:
        assert not (self.source.executes and self.destination.executes)

    @invariant()
    def whoever_executes_owns_it_by_the_ledger(self) -> None:
        if self.source.executes:
            assert self.source.verdict in (Verdict.NONE, Verdict.OPEN, Verdict.RESUMED)
            if self.attempt:
                said = {r.entry for r in self.destination.ledger.records if r.job == self.job}
                assert "committed" not in said
        if self.destination.executes:
            assert self.destination.verdict is Verdict.COMMITTED
            assert self.source.verdict in (Verdict.IN_DOUBT, Verdict.RELEASED)

    @invariant()
    def where_it_executes_nowhere_a_state_says_why(self) -> None:
        if not (self.source.executes or self.destination.executes):
            assert self.source.state in (S.PAUSED, S.STOPPED, S.IN_DOUBT, S.FAILED, S.ENDED, S.OUTGOING)
            if self.source.state is S.OUTGOING:  # of a machine that was paused
                assert self.source.it.job is not None
                assert self.source.it.job.was_paused
            if self.source.state is S.ENDED:
                assert self.destination.state in (S.PAUSED, S.FAILED, S.COMMITTED)

    @invariant()
    def a_stopped_machine_belongs_to_a_job_that_goes_on(self) -> None:
        for one in (self.source, self.destination):
            if one.state in (S.STOPPED, S.OUTGOING, S.INCOMING, S.READY):
                assert one.it.job is not None
                assert COORDINATOR in one.watched  # so that its death is seen

    def teardown(self) -> None:
        for one in (self.source, self.destination):
            one.close()
        self.runner.close()
        shutil.rmtree(self.directory)


TwoHosts.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_in_any_order_of_requests_deaths_and_failures_nothing_is_lost = TwoHosts.TestCase
