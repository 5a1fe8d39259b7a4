"""The two state machines of a migration, as tables. Everything that decides which message may come next is in this file.

An event is a message sent (`"send"`), a message received (`"recv"`) or something that a side did itself (`"did"`). What is not in
the table is a breach of protocol: ours (LocalProtocolError) when we were about to send, the peer's (RemoteProtocolError) else.
docs/protocol.md's diagrams are printed from these tables; the model checker's input will be.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from migrate.errors import LocalProtocolError, Phase, RemoteProtocolError
from migrate.protocol import messages as m


class Role(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class Stage(StrEnum):
    """Where a conversation is. The two sides pass through the same stages, each at its own moment."""

    START = "start"  #: nothing said
    GREETING = "greeting"  #: one HELLO said
    GREETED = "greeted"  #: both said
    OFFERED = "offered"  #: a manifest waits for its answer
    REFUSED = "refused"  #: END: all reasons are known, nothing was stopped
    ACCEPTED = "accepted"  #: the destination could take the machine
    CHECKED = "checked"  #: END: only a check was wanted
    JOINING = "joining"  #: page channels join
    PRECOPY = "precopy"  #: rounds; the guest runs on the source
    ROUND = "round"  #: ROUND waits for every MARK
    REHEARSING = "rehearsing"  #: REHEARSE waits for its answer
    SAVING = "saving"  #: the guest is stopped; last pages, chunks and blobs
    LOADING = "loading"  #: STOPPED was said; the destination validates and applies
    READY = "ready"  #: all is applied; until COMMIT every failure ends on the source
    VERIFYING = "verifying"  #: both memories are compared
    COMMITTED = "committed"  #: the source has written COMMIT / the destination COMMITTED
    COMMITTING = "committing"  #: COMMIT was said and not answered / was heard, and nothing is written yet
    RUNNING = "running"  #: END: the machine runs on the destination
    GONE = "gone"  #: END: contact lost where nothing hung on it
    FAILED = "failed"  #: END: before COMMIT; the source runs
    HELD = "held"  #: END: contact lost after READY; was COMMIT written? The destination keeps its copy until it is asked
    ABORTED = "aborted"  #: END: after COMMIT, the destination wrote ABORTED; the source runs
    DOUBT = "doubt"  #: END: after COMMIT, contact lost; the source is stopped, and asks anew
    ASKING = "asking"  #: who runs it?
    ANSWERED = "answered"  #: END


class Did(StrEnum):
    """What a side does by itself."""

    QUIESCED = "quiesced"  #: source: every participant is stopped
    WROTE_COMMIT = "wrote-commit"  #: source: COMMIT is in the ledger, synced
    WROTE_COMMITTED = "wrote-committed"  #: destination: COMMITTED is in the ledger, synced
    LOST = "lost"  #: the connection is gone


SEND, RECV, DID = "send", "recv", "did"
Event = tuple[str, type[m.Message] | Did]
Table = dict[Stage, dict[Event, Stage]]

_S = Stage
#: Stages in which either side may still end it all and the source goes on.
BEFORE_COMMIT: Final = (
    _S.ACCEPTED, _S.JOINING, _S.PRECOPY, _S.ROUND, _S.REHEARSING, _S.SAVING, _S.LOADING, _S.READY, _S.VERIFYING,
)  # fmt: skip
#: Stages that nothing follows in the same conversation.
ENDS: Final = frozenset(
    {_S.REFUSED, _S.CHECKED, _S.RUNNING, _S.GONE, _S.FAILED, _S.HELD, _S.ABORTED, _S.DOUBT, _S.ANSWERED}
)

SOURCE: Final[Table] = {
    _S.START: {(SEND, m.Hello): _S.GREETING},
    _S.GREETING: {(RECV, m.Hello): _S.GREETED},
    _S.GREETED: {(SEND, m.Manifest): _S.OFFERED, (SEND, m.Ask): _S.ASKING},
    _S.OFFERED: {(RECV, m.Accept): _S.ACCEPTED, (RECV, m.Refuse): _S.REFUSED},
    _S.ACCEPTED: {(SEND, m.Bye): _S.CHECKED, (SEND, m.Start): _S.JOINING},
    _S.JOINING: {(RECV, m.Started): _S.PRECOPY},
    _S.PRECOPY: {
        (SEND, m.Chunk): _S.PRECOPY,
        (SEND, m.Round): _S.ROUND,
        (SEND, m.Rehearse): _S.REHEARSING,
        (DID, Did.QUIESCED): _S.SAVING,
    },
    _S.ROUND: {(RECV, m.RoundDone): _S.PRECOPY},
    _S.REHEARSING: {(RECV, m.Rehearsed): _S.PRECOPY},
    _S.SAVING: {(SEND, m.Chunk): _S.SAVING, (SEND, m.State): _S.SAVING, (SEND, m.Stopped): _S.LOADING},
    _S.LOADING: {(RECV, m.Ready): _S.READY},
    _S.READY: {(SEND, m.Verify): _S.VERIFYING, (DID, Did.WROTE_COMMIT): _S.COMMITTED},
    _S.VERIFYING: {(RECV, m.Verified): _S.READY},
    # A REJECT crossed our COMMIT. Only ABORTED, which is written before it is said, lets the source resume: ask.
    _S.COMMITTED: {
        (SEND, m.Commit): _S.COMMITTING,
        (RECV, m.Reject): _S.DOUBT,
        (DID, Did.LOST): _S.DOUBT,
    },
    _S.COMMITTING: {
        (RECV, m.Running): _S.RUNNING,
        (RECV, m.Aborted): _S.ABORTED,
        (RECV, m.Reject): _S.DOUBT,
        (DID, Did.LOST): _S.DOUBT,
    },
    _S.ASKING: {(RECV, m.Answer): _S.ANSWERED, (DID, Did.LOST): _S.DOUBT},
}

DESTINATION: Final[Table] = {
    _S.START: {(RECV, m.Hello): _S.GREETING},
    _S.GREETING: {(SEND, m.Hello): _S.GREETED},
    _S.GREETED: {(RECV, m.Manifest): _S.OFFERED, (RECV, m.Ask): _S.ASKING},
    _S.OFFERED: {(SEND, m.Accept): _S.ACCEPTED, (SEND, m.Refuse): _S.REFUSED},
    _S.ACCEPTED: {(RECV, m.Bye): _S.CHECKED, (RECV, m.Start): _S.JOINING},
    _S.JOINING: {(SEND, m.Started): _S.PRECOPY},
    _S.PRECOPY: {
        (RECV, m.Chunk): _S.PRECOPY,
        (RECV, m.Round): _S.ROUND,
        (RECV, m.Rehearse): _S.REHEARSING,
        (RECV, m.State): _S.SAVING,
        (RECV, m.Stopped): _S.LOADING,
    },
    _S.ROUND: {(SEND, m.RoundDone): _S.PRECOPY},
    _S.REHEARSING: {(SEND, m.Rehearsed): _S.PRECOPY},
    _S.SAVING: {(RECV, m.Chunk): _S.SAVING, (RECV, m.State): _S.SAVING, (RECV, m.Stopped): _S.LOADING},
    _S.LOADING: {(SEND, m.Ready): _S.READY},
    _S.READY: {(RECV, m.Verify): _S.VERIFYING, (RECV, m.Commit): _S.COMMITTING},
    _S.VERIFYING: {(SEND, m.Verified): _S.READY},
    # From here on the destination goes on alone; the source asks what became of it.
    _S.COMMITTING: {
        (DID, Did.WROTE_COMMITTED): _S.COMMITTED,
        (SEND, m.Aborted): _S.ABORTED,
        (DID, Did.LOST): _S.COMMITTING,
    },
    _S.COMMITTED: {(SEND, m.Running): _S.RUNNING, (DID, Did.LOST): _S.COMMITTED},
    _S.ASKING: {(SEND, m.Answer): _S.ANSWERED, (DID, Did.LOST): _S.GONE},
}

for _stage in BEFORE_COMMIT:
    SOURCE[_stage] |= {
        (RECV, m.Reject): _S.FAILED, (SEND, m.Abort): _S.FAILED, (DID, Did.LOST): _S.FAILED,
    }  # fmt: skip
    DESTINATION[_stage] |= {
        (SEND, m.Reject): _S.FAILED, (RECV, m.Abort): _S.FAILED, (DID, Did.LOST): _S.FAILED,
    }  # fmt: skip
for _stage in (_S.READY, _S.VERIFYING):
    DESTINATION[_stage][(DID, Did.LOST)] = _S.HELD
for _table in (SOURCE, DESTINATION):
    for _stage in (_S.START, _S.GREETING, _S.GREETED, _S.OFFERED):
        _table[_stage][(DID, Did.LOST)] = _S.GONE
    # Liveness belongs to every stage that waits. A PING may cross the last word, so it is no breach at the end either.
    for _stage in (*_table, *ENDS):
        if _stage not in (_S.START, _S.GREETING):
            _row = _table.setdefault(_stage, {})
            _row |= {(SEND, m.Pong): _stage, (RECV, m.Ping): _stage, (RECV, m.Pong): _stage}
            if _stage not in ENDS:
                _row[(SEND, m.Ping)] = _stage

TABLES: Final[dict[Role, Table]] = {Role.SOURCE: SOURCE, Role.DESTINATION: DESTINATION}
#: Stages of a migration's conversation in which the source's supervisor may resume the machine without anybody's word.
SOURCE_RESUMES: Final = frozenset(
    {_S.START, _S.GREETING, _S.GREETED, _S.OFFERED, _S.GONE, _S.REFUSED, _S.CHECKED,
     *BEFORE_COMMIT, _S.FAILED, _S.ABORTED}
)  # fmt: skip


class Conversation:
    """One side of one control channel. Tell it every message before it is sent and after it was received."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.stage = Stage.START

    def sending(self, message: m.Message) -> None:
        """:raises LocalProtocolError: if it may not be sent now; the stage is unchanged."""
        target = self._target((SEND, type(message)))
        if target is None:
            raise LocalProtocolError(
                f"{message.name} may not be sent by the {self.role} in stage {self.stage}",
                phase=Phase.PRECOPY,
                remedy="this is a defect of vmferry; report it with the log",
            )
        self.stage = target

    def received(self, message: m.Message) -> None:
        """:raises RemoteProtocolError: if the peer may not say this now; the stage is unchanged."""
        target = self._target((RECV, type(message)))
        if target is None:
            raise RemoteProtocolError(
                f"the peer said {message.name} to the {self.role} in stage {self.stage}, where it may not",
                phase=Phase.PRECOPY,
                remedy="check that both hosts run versions of vmferry that talk to each other",
            )
        self.stage = target

    def did(self, what: Did) -> None:
        """:raises LocalProtocolError: if this side may not do that now."""
        target = self._target((DID, what))
        if target is None:
            raise LocalProtocolError(f"{what} in stage {self.stage}", phase=Phase.COMMIT)
        self.stage = target

    @property
    def ended(self) -> bool:
        return self.stage in ENDS

    def _target(self, event: Event) -> Stage | None:
        return TABLES[self.role].get(self.stage, {}).get(event)
