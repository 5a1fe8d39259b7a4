"""What became of a job whose coordinator ended without saying so: asked of the machine and its ledger, never guessed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from migrate.errors import LedgerError, Phase, Reason
from migrate.host.jobs import Job, Kind
from migrate.host.machines import Machines
from migrate.machine import ledger
from migrate.machine.ledger import Entry
from migrate.machine.states import MachineState

#: How long a supervisor may take to resume its machine after its coordinator died, s.
SETTLE_SECONDS: Final = 60.0

#: outcome → running_on, exit code, what to do
_ENDS: Final[Mapping[str, tuple[str, int, str]]] = {
    "completed": ("destination", 0, ""),
    "aborted": ("source", 1, "start the migration again; {log} may say why"),
    "lost": ("neither", 1, "`ferry stop` it and start it anew; {log} may say why"),
    "in_doubt": ("neither", 4, "this host goes on asking; see `ferry recover {machine}`"),
}


async def conclude(job: Job, machines: Machines) -> dict[str, Any]:
    """The outcome of a job whose coordinator left none."""
    machine = await machines.settle(job.machine, SETTLE_SECONDS)
    # For a recovery, the job that is recovered.
    about = str(job.journal.first.get("of") or job.id)
    try:
        records = await asyncio.to_thread(ledger.read, machines.host.directory, job.machine)
    except LedgerError:
        records = []
    said = {record.entry for record in records if record.job == about}
    end = _end_of(job.kind, said, machine.state if machine is not None else None)
    running_on, exit_code, remedy = _ENDS[end]
    log = machines.host.directory / "jobs" / f"{job.id}.log"
    where = str(log) if log.exists() else "the daemon's log"
    reason = Reason(
        None,
        job.journal.last_phase or str(Phase.PRECOPY),
        f"the coordinator of the migration {job.how_it_ended()}",
        remedy.format(log=where, machine=job.machine),
    )
    return outcome(
        job,
        "aborted" if end == "lost" else end,
        running_on,
        exit_code,
        [] if end == "completed" else [reason],
    )


def _end_of(kind: Kind, said: set[Entry], state: str | None) -> str:
    if kind is Kind.INCOMING:
        return "completed" if Entry.COMMITTED in said else "aborted"
    if Entry.RELEASED in said:
        return "completed"
    if Entry.COMMIT in said and Entry.RESUMED not in said:
        return "in_doubt"
    return "lost" if state in (None, MachineState.FAILED) else "aborted"


def outcome(job: Job, word: str, running_on: str, exit_code: int, reasons: list[Reason]) -> dict[str, Any]:
    """An outcome as a coordinator gives it, with everything unknown that only it would know."""
    rounds = [event for event in job.journal.of_kind("round") if "bytes" in event]
    return {
        "event": "outcome",
        "outcome": word,
        "running_on": running_on,
        "exit_code": exit_code,
        "reasons": [reason.to_wire() for reason in reasons],
        "job": job.id,
        "machine": job.machine,
        "to": job.to,
        "ram_bytes": None,
        "ram_bytes_sent": sum(event["bytes"] for event in rounds),
        "rounds": [
            {key: event.get(key) for key in ("n", "pages", "bytes", "seconds", "dirty_rate")}
            for event in rounds
        ],
        "downtime_ms": None,
        "downtime": None,
        "slowest_device": None,
        "verified": {"ram": None, "devices": None},
    }
