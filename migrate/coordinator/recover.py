"""`recover`: a machine that is in doubt, and nobody is asking: ask its destination, then do what it says.

Where a supervisor still holds the stopped machine it resumes or releases it. Where there is none any more (the host was started
again), memory is gone: the ledger alone is brought to an end, and it is said plainly what that means.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate.bus import Bus
from migrate.bus.supervisor import SupervisorClient
from migrate.coordinator import doubt
from migrate.coordinator.dialling import Dialler
from migrate.coordinator.outcome import Emit, Outcome, wire_reasons
from migrate.errors import FerryError, InDoubtError, Phase, Reason
from migrate.machine.ledger import Entry, Ledger


@dataclass(frozen=True, slots=True)
class Spec:
    job: str
    machine: str
    bus: str  #: address, or "" where there is no supervisor any more
    to: str
    host: str
    host_name: str
    incarnation: str
    epoch: int
    peer_incarnation: str
    credentials: dict[str, Any] | None = None
    doubt_seconds: float = 0.0


async def recover(spec: Spec, emit: Emit) -> Outcome:
    """:returns: the outcome; never raises for what goes wrong with asking."""
    outcome = Outcome(spec.job, spec.machine, spec.to)
    question = doubt.Question(spec.machine, spec.job, spec.epoch, spec.peer_incarnation)
    try:
        answer = await doubt.ask_until(
            Dialler(spec.to, spec.credentials, spec.job), question, spec.host_name, spec.incarnation,
            spec.doubt_seconds, emit,
        )  # fmt: skip
        reason = Reason(None, str(Phase.RECOVER), f"asked, the peer says: {answer}", "")
        outcome.reasons = [reason]
        if spec.bus:
            bus = await Bus.connect(spec.bus)
            try:
                await SupervisorClient(bus).peer_said(spec.job, spec.epoch, answer, wire_reasons([reason]))
            finally:
                await bus.close()
        else:
            outcome.reasons += _end_ledger(spec, answer)
    except InDoubtError as error:
        outcome.outcome, outcome.running_on, outcome.exit_code = "in_doubt", "neither", error.exit_code
        outcome.reasons = error.reasons()
        return outcome
    except FerryError as error:
        outcome.outcome, outcome.running_on, outcome.exit_code = "in_doubt", "neither", InDoubtError.exit_code
        outcome.reasons += error.reasons()
        return outcome
    if answer == "running":
        outcome.outcome, outcome.running_on, outcome.exit_code = "completed", "destination", 0
    elif spec.bus:
        outcome.outcome, outcome.running_on, outcome.exit_code = "aborted", "source", 1
    else:
        outcome.outcome, outcome.running_on, outcome.exit_code = "aborted", "neither", 1
    return outcome


def _end_ledger(spec: Spec, answer: str) -> list[Reason]:
    ledger = Ledger(Path(spec.host), spec.machine)
    try:
        entry = Entry.RELEASED if answer == "running" else Entry.RESUMED
        ledger.write(entry, spec.job, spec.epoch, peer=spec.to, detail="recovered without a supervisor")
    finally:
        ledger.close()
    if answer == "running":
        return []
    return [
        Reason(
            None,
            str(Phase.RECOVER),
            "the destination never committed, and this host has lost the machine's memory since: it runs nowhere",
            f"start it anew: `ferry run` the machine.toml of {spec.machine}",
        )
    ]
