"""Both sides of a migration as one value: their conversations, what is on the wire, both ledgers, and who executes.

What may be said when is asked of migrate.protocol.states; what each side does when a conversation ends is DESIGN 2.6. A
message that the tables let one side say and not let the other hear is an AssertionError here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from messages_made import sample

from migrate.errors import RemoteProtocolError
from migrate.protocol import messages as m
from migrate.protocol.states import DID, ENDS, RECV, SEND, TABLES, Conversation, Did, Role, Stage

SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION
LIVENESS = (m.Ping, m.Pong)
SAMPLES = {kind: sample(kind) for kind in m.REGISTRY.values()}
PEER = {SOURCE: DESTINATION, DESTINATION: SOURCE}

#: On the wire: a kind, and for an Answer what it says.
Said = tuple[type[m.Message], str]


@dataclass(frozen=True)
class Channel:
    """One control channel: the stage of each side, and what was said and not heard yet."""

    source: Stage = Stage.START
    destination: Stage = Stage.START
    from_source: tuple[Said, ...] = ()
    from_destination: tuple[Said, ...] = ()
    up: bool = True

    def stage(self, role: Role) -> Stage:
        found: Stage = getattr(self, role)
        return found

    def wire(self, sender: Role) -> tuple[Said, ...]:
        found: tuple[Said, ...] = getattr(self, f"from_{sender}")
        return found

    def at(self, role: Role, stage: Stage) -> Channel:
        change: dict[str, Any] = {str(role): stage}
        return replace(self, **change)

    def with_wire(self, sender: Role, wire: tuple[Said, ...]) -> Channel:
        change: dict[str, Any] = {f"from_{sender}": wire}
        return replace(self, **change)

    def says(self, role: Role, kind: type[m.Message], what: str = "") -> Channel:
        conversation = _conversation(role, self.stage(role))
        conversation.sending(SAMPLES[kind])
        return self.at(role, conversation.stage).with_wire(role, (*self.wire(role), (kind, what)))

    def did(self, role: Role, what: Did) -> Channel:
        conversation = _conversation(role, self.stage(role))
        conversation.did(what)
        return self.at(role, conversation.stage)

    def hears(self, role: Role) -> tuple[Channel, Said]:
        """The oldest of what the peer said. A side whose conversation has ended reads no more."""
        said, *rest = self.wire(PEER[role])
        here = self.with_wire(PEER[role], tuple(rest))
        conversation = _conversation(role, self.stage(role))
        if not conversation.ended:
            try:
                conversation.received(SAMPLES[said[0]])
            except RemoteProtocolError as error:
                raise AssertionError(f"{error.reason} ({self})") from error
        return here.at(role, conversation.stage), said

    def lost(self) -> Channel:
        """Cut. What was on the way never arrives; what did arrive before is another course of events."""
        return replace(self, up=False, from_source=(), from_destination=())


def _conversation(role: Role, stage: Stage) -> Conversation:
    conversation = Conversation(role)
    conversation.stage = stage
    return conversation


@dataclass(frozen=True)
class World:
    move: Channel = Channel()  #: the conversation that carries the migration
    ask: Channel | None = None  #: the one that asks, after a doubt
    source_executes: bool = True
    commit: bool = False  #: in the source's ledger
    source_ended: str = ""  #: the last word of its ledger: resumed, released
    copy: bool = False  #: the destination has an incoming machine
    destination_said: str = ""  #: the last word of its ledger: committed, aborted

    @property
    def destination_executes(self) -> bool:
        return self.destination_said == "committed"

    @property
    def in_doubt(self) -> bool:
        return self.commit and not self.source_ended

    @property
    def settled(self) -> bool:
        return self.source_executes != self.destination_executes and not self.in_doubt


Moves = Iterator[tuple[str, World]]


def moves(world: World, *, liveness: bool = True, most: int = 99) -> Moves:
    """Everything that may happen next, with a name. `most`: so many messages are on one wire."""
    yield from _events(world, world.move, "move", liveness, most)
    if world.ask is not None:
        yield from _events(world, world.ask, "ask", liveness, most)
    yield from _failures(world)


def _events(world: World, channel: Channel, name: str, liveness: bool, most: int) -> Moves:
    for role in Role:
        label = f"{name}: {role}"
        for way, what in TABLES[role].get(channel.stage(role), {}):
            if way == SEND and channel.up and len(channel.wire(role)) < most:
                assert isinstance(what, type)
                if liveness or what not in LIVENESS:
                    yield from _send(world, channel, name, role, what)
            elif way == DID and isinstance(what, Did) and _may_do(world, channel, what):
                yield f"{label} did {what}", _took(world, name, role, channel, channel.did(role, what), what)
            assert way in (SEND, RECV, DID)
        if channel.wire(PEER[role]):
            after, said = channel.hears(role)
            yield f"{label} hears {said[0].name} {said[1]}", _took(world, name, role, channel, after, *said)
    if channel.up:
        yield f"{name}: the connection is lost", _with(world, name, channel.lost())


def _may_do(world: World, channel: Channel, what: Did) -> bool:
    if what is Did.WROTE_COMMITTED:
        return world.copy and not world.destination_said
    return what is not Did.LOST or not channel.up


def _send(world: World, channel: Channel, name: str, role: Role, kind: type[m.Message]) -> Moves:
    what = ""
    if kind is m.Manifest and world.commit:
        return  # a source in doubt begins nothing
    if kind is m.Ask and name == "move":
        return
    if kind is m.Manifest and name == "ask":
        return
    if kind is m.Aborted:  # written before it is said; what was committed cannot be aborted
        if world.destination_said == "committed":
            return
        world = replace(world, destination_said="aborted", copy=False)
    if kind is m.Answer:
        if world.destination_said != "committed":
            world = replace(world, destination_said="aborted", copy=False)
        what = "running" if world.destination_said == "committed" else "aborted"
    after = channel.says(role, kind, what)
    yield f"{name}: {role} says {kind.name} {what}", _took(world, name, role, channel, after, kind)


def _took(
    world: World, name: str, role: Role, before: Channel, after: Channel, event: object, what: str = ""
) -> World:
    """What a side does beside the conversation when its stage changes."""
    world = _with(world, name, after)
    old, new = before.stage(role), after.stage(role)
    if old is new:
        return world
    if role is DESTINATION:
        if new is Stage.OFFERED:
            return replace(world, copy=True)
        if new is Stage.COMMITTED and event is Did.WROTE_COMMITTED:
            return replace(world, destination_said="committed", copy=False)
        if new in ENDS and new not in (Stage.HELD, Stage.RUNNING, Stage.ANSWERED) and name == "move":
            return replace(world, copy=False, destination_said=world.destination_said or "aborted")
        return world
    if event is Did.QUIESCED:
        return replace(world, source_executes=False)
    if event is Did.WROTE_COMMIT:
        return replace(world, commit=True)
    if new is Stage.RUNNING or (new is Stage.ANSWERED and what == "running"):
        return _end_doubt(world, "released")
    if new is Stage.ABORTED or (new is Stage.ANSWERED and what == "aborted"):
        return _end_doubt(world, "resumed")
    if new in (Stage.FAILED, Stage.GONE, Stage.REFUSED, Stage.CHECKED) and name == "move":
        return replace(world, source_executes=True)
    return world


def _end_doubt(world: World, word: str) -> World:
    if world.source_ended:
        return world
    return replace(world, source_ended=word, source_executes=word == "resumed")


def _with(world: World, name: str, channel: Channel) -> World:
    change: dict[str, Any] = {name: channel}
    return replace(world, **change)


def _failures(world: World) -> Moves:
    """What is in no table: deaths, a copy that is kept no longer, and asking."""
    source, destination = world.move.source, world.move.destination
    cut = world.move.lost()
    if source not in ENDS:
        if world.commit:
            after = replace(world, move=cut.at(SOURCE, Stage.DOUBT))
        else:
            after = replace(world, move=cut.at(SOURCE, Stage.FAILED), source_executes=True)
        yield "the source's coordinator dies", after
    if destination not in ENDS:
        if destination in (Stage.READY, Stage.VERIFYING, Stage.COMMITTING):
            after = replace(world, move=cut.at(DESTINATION, Stage.HELD))
        elif destination is Stage.COMMITTED:
            after = replace(world, move=cut.at(DESTINATION, Stage.RUNNING))
        else:
            after = replace(
                world, move=cut.at(DESTINATION, Stage.FAILED), copy=False,
                destination_said=world.destination_said or "aborted",
            )  # fmt: skip
        yield "the destination's coordinator dies", after
    if destination is Stage.HELD and world.copy:
        yield "a held copy is kept no longer", replace(world, copy=False, destination_said="aborted")
    if world.in_doubt and source is Stage.DOUBT and (world.ask is None or world.ask.source in ENDS):
        yield "the source asks", replace(world, ask=Channel())
