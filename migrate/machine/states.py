"""What a machine is doing on this host, and which change may follow which. The supervisor obeys this table and no other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class MachineState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"  #: stopped by an operator
    OUTGOING = "outgoing"  #: a job copies it; the guest runs
    STOPPED = "stopped"  #: stopped by a job, before COMMIT; resumes by itself when the job goes
    IN_DOUBT = "in-doubt"  #: COMMIT is written; stopped until the peer or an operator says
    INCOMING = "incoming"  #: being received; ends with its connection
    READY = "ready"  #: received and applied; the source may commit
    HELD = "held"  #: ready, and the connection is gone: kept until asked, told, or its time is up
    COMMITTED = "committed"  #: COMMITTED is written; being started
    FAILED = "failed"  #: a participant died, or hangs so that nobody knows what stands still: not a migration's failure
    ENDED = "ended"


_S = MachineState
MACHINE: Final[dict[MachineState, frozenset[MachineState]]] = {
    _S.STARTING: frozenset({_S.RUNNING, _S.PAUSED, _S.INCOMING, _S.FAILED, _S.ENDED}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.OUTGOING, _S.FAILED, _S.ENDED}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.OUTGOING, _S.FAILED, _S.ENDED}),
    _S.OUTGOING: frozenset({_S.STOPPED, _S.RUNNING, _S.PAUSED, _S.FAILED, _S.ENDED}),
    _S.STOPPED: frozenset({_S.IN_DOUBT, _S.RUNNING, _S.PAUSED, _S.FAILED, _S.ENDED}),
    _S.IN_DOUBT: frozenset({_S.RUNNING, _S.PAUSED, _S.FAILED, _S.ENDED}),
    _S.INCOMING: frozenset({_S.READY, _S.ENDED}),
    _S.READY: frozenset({_S.COMMITTED, _S.HELD, _S.ENDED}),
    _S.HELD: frozenset({_S.COMMITTED, _S.ENDED}),
    _S.COMMITTED: frozenset({_S.RUNNING, _S.PAUSED, _S.FAILED, _S.ENDED}),
    _S.FAILED: frozenset({_S.RUNNING, _S.PAUSED, _S.ENDED}),
    _S.ENDED: frozenset(),
}
#: States in which the guest may execute here. Never true on two hosts at once: what the whole project is about.
MAY_EXECUTE: Final = frozenset({_S.RUNNING, _S.OUTGOING, _S.COMMITTED})
#: States in which what was committed here is seen to have run here: what `running` means to a source that asks.
HAS_RUN: Final = frozenset({_S.RUNNING, _S.PAUSED, _S.OUTGOING, _S.STOPPED, _S.IN_DOUBT})
#: What to do where a request is refused because of the state.
REMEDIES: Final = {
    _S.IN_DOUBT: "run `ferry recover`, or `ferry resolve` after fencing the other host",
    _S.HELD: "it waits for its source; run `ferry resolve` after fencing that host",
    _S.FAILED: "`ferry resume` tries again where all its processes live; else `ferry stop` it and start it again",
}


@dataclass(slots=True)
class Job:
    """The migration that is going on, or whose end is awaited."""

    name: str
    epoch: int
    peer: str
    coordinator: str  #: unique name on the bus
    was_paused: bool = False
