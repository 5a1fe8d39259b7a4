"""After COMMIT with a silent peer: who is asked, what is believed, and what a source does until somebody knows."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from links import HELLO, both

from migrate.coordinator import doubt
from migrate.coordinator.dialling import Dialler
from migrate.coordinator.hold import Hold
from migrate.coordinator.link import Link
from migrate.coordinator.participants import Participants
from migrate.coordinator.source import SourceMigration
from migrate.coordinator.spec import Agreed, Committed, Spec
from migrate.errors import DeviceRefused, FerryError, InDoubtError, Reason
from migrate.machine import ledger as ledgers
from migrate.machine.ledger import Entry, Ledger
from migrate.protocol import messages as m
from migrate.protocol.states import Role, Stage
from migrate.transport import preamble
from migrate.transport.channel import SocketChannel
from migrate.transport.stream import ControlStream

JOB, EPOCH, THEIRS = "ab" * 16, 3, "incarnation of the destination"
QUESTION = doubt.Question("web1", JOB, EPOCH, THEIRS)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as name:
        yield Path(name)


@dataclass
class Peer:
    """A destination that answers one connection after the other as it is told; a word that is no state hangs up."""

    path: Path
    words: list[str]
    asked: list[m.Ask] = field(default_factory=list)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Peer]:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        listener.setblocking(False)
        serving = asyncio.create_task(self._serve(listener))
        try:
            yield self
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            listener.close()

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            sock.setblocking(True)
            stream = ControlStream(SocketChannel(sock, "unix", "a source"))
            first = preamble.decode(await stream.read_exactly(preamble.SIZE, timeout=5))
            assert first.session.hex() == JOB
            word = self.words.pop(0) if len(self.words) > 1 else self.words[0]
            if word == "garbage":
                await stream.write(b"GET / HTTP/1.1\r\n", timeout=5)
                with suppress(FerryError):  # until the other side has had enough of it
                    await stream.read_exactly(1 << 20, timeout=5)
                await stream.close()
                continue
            if word == "hang up":
                await stream.close()
                continue
            link = Link(stream, Role.DESTINATION)
            await link.expect(m.Hello, timeout=5)
            await link.send(HELLO)
            self.asked.append(await link.expect(m.Ask, timeout=5))
            await link.send(m.Answer(word, "because"))
            await link.closed(timeout=5)
            await link.close()


def ask(
    directory: Path, words: list[str], seconds: float = 5.0
) -> tuple[str | InDoubtError, Peer, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    peer = Peer(directory / "s", words)

    async def play() -> str | InDoubtError:
        async with peer.listening():
            dialler = Dialler(f"unix:{peer.path}", None, JOB)
            try:
                return await doubt.ask_until(dialler, QUESTION, "a", "mine", seconds, events.append)
            except InDoubtError as error:
                return error

    return asyncio.run(asyncio.wait_for(play(), 30)), peer, events


@pytest.mark.parametrize("word", ["running", "aborted"])
def test_the_two_words_that_end_a_doubt_are_believed_at_once(word: str, directory: Path) -> None:
    answer, peer, events = ask(directory, [word])
    assert answer == word
    assert events == []
    assert peer.asked == [m.Ask("web1", JOB, EPOCH, THEIRS)]


def test_a_peer_that_breaks_off_or_has_not_started_it_yet_is_asked_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubt, "FIRST_PAUSE", 0.01)
    answer, peer, events = ask(directory, ["hang up", "garbage", "committed", "whatever", "running"])
    assert answer == "running"
    assert len(peer.asked) == 3
    reasons = [event["reason"] for event in events]
    assert len(reasons) == 4
    assert "closed the connection" in reasons[0]
    assert "does not speak vmferry" in reasons[1]
    assert "does not run it yet (because)" in reasons[2]


def test_a_peer_that_cannot_know_is_not_asked_again_and_both_ways_out_are_named(directory: Path) -> None:
    answer, peer, _ = ask(directory, ["unknown"])
    assert isinstance(answer, InDoubtError)
    assert answer.exit_code == 4
    assert "because" in answer.reason
    assert "ferry recover web1" in answer.remedy
    assert "ferry resolve web1 --keep source --fenced" in answer.remedy
    assert len(peer.asked) == 1


def test_after_the_time_that_was_given_it_says_in_doubt_and_why(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubt, "FIRST_PAUSE", 0.01)
    answer, _, events = ask(directory, ["hang up"], seconds=0.05)
    assert isinstance(answer, InDoubtError)
    assert "closed the connection" in answer.reason
    assert events


# -- a source whose COMMIT is written -----------------------------------------------------------------------------------


@dataclass
class Supervisor:
    """The one thing that a source in this state asks of its supervisor; the ledger behind it is real."""

    ledger: Ledger
    failure: FerryError | None = None

    async def peer_said(self, job: str, epoch: int, answer: str, reasons: str) -> None:
        if self.failure is not None:
            raise self.failure
        self.ledger.write(Entry.RELEASED if answer == "running" else Entry.RESUMED, job, epoch)


@dataclass
class Parts:
    supervisor: Supervisor


def hand_over(
    directory: Path,
    peer_says: Callable[[Link], Any],
    words: list[str],
    *,
    before: bool = False,
    failure: FerryError | None = None,
) -> tuple[SourceMigration, list[str]]:
    """What becomes of a source that has written COMMIT, when its peer says this on the wire and those words when asked."""
    ledger = Ledger(directory, "web1")
    ledger.write(Entry.OUTGOING, JOB, EPOCH)
    ledger.write(Entry.COMMIT, JOB, EPOCH)
    spec = Spec(
        job=JOB,
        machine="web1",
        bus="",
        to=f"unix:{directory}/s",
        host_name="a",
        incarnation="mine",
        doubt_seconds=5.0,
    )
    parts = cast(Participants, Parts(Supervisor(ledger, failure)))

    async def play() -> SourceMigration:
        it = SourceMigration(spec, lambda _: None, Hold([], lambda _: None))
        it._epoch, it._committing = EPOCH, True
        agreed = Agreed({}, bytes(32), 1, THEIRS, 16)
        async with Peer(directory / "s", words).listening(), both(Stage.READY) as (link, peer):
            if before:
                await peer_says(peer)
                await link.closed(timeout=5)
                talking = None
            else:
                talking = asyncio.create_task(peer_says(peer))
            committed = Committed(1000, 0, 1)
            await it._hand_over(parts, link, agreed, committed, paused=False)
            if talking is not None:
                await talking
        return it

    it = asyncio.run(asyncio.wait_for(play(), 30))
    ledger.close()
    return it, [str(record.entry) for record in ledgers.read(directory, "web1")][2:]


async def says_running(peer: Link) -> None:
    await peer.expect(m.Commit, timeout=5)
    peer.conversation.stage = Stage.COMMITTED
    await peer.send(m.Running(1, 2))
    await peer.closed(timeout=0.01)


async def says_aborted(peer: Link) -> None:
    await peer.expect(m.Commit, timeout=5)
    await peer.send(m.Aborted((Reason("disk0", "commit", "its image is locked", "see who has it"),)))


async def hangs_up(peer: Link) -> None:
    await peer.expect(m.Commit, timeout=5)
    await peer.close()


async def rejects(peer: Link) -> None:
    await peer.send(m.Reject((Reason("uart0", "load", "its process died", ""),)))


def test_running_is_released(directory: Path) -> None:
    it, said = hand_over(directory, says_running, ["aborted"])
    assert (it.outcome.outcome, it.outcome.running_on, it.outcome.exit_code) == (
        "completed",
        "destination",
        0,
    )
    assert said == ["released"]


def test_aborted_resumes_with_the_destinations_reason(directory: Path) -> None:
    it, said = hand_over(directory, says_aborted, ["running"])
    assert (it.outcome.outcome, it.outcome.running_on, it.outcome.exit_code) == ("aborted", "source", 1)
    assert it.outcome.reasons[0].device == "disk0"
    assert said == ["resumed"]


@pytest.mark.parametrize(
    ("word", "entry", "where"), [("running", "released", "destination"), ("aborted", "resumed", "source")]
)
def test_a_peer_that_hangs_up_is_asked_and_its_answer_is_done(
    word: str, entry: str, where: str, directory: Path
) -> None:
    it, said = hand_over(directory, hangs_up, [word])
    assert it.outcome.running_on == where
    assert said == [entry]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("word", "entry"), [("running", "released"), ("aborted", "resumed")])
def test_a_reject_that_crosses_commit_resumes_nothing_until_the_peer_was_asked(
    word: str, entry: str, before: bool, directory: Path
) -> None:
    it, said = hand_over(directory, rejects, [word], before=before)
    assert said == [entry]
    assert it.outcome.outcome in ("completed", "aborted")


def test_with_a_peer_that_cannot_know_nothing_is_written_and_it_says_in_doubt(directory: Path) -> None:
    it, said = hand_over(directory, hangs_up, ["unknown"])
    assert (it.outcome.outcome, it.outcome.running_on, it.outcome.exit_code) == ("in_doubt", "neither", 4)
    assert said == []


def test_a_machine_that_was_given_back_and_does_not_resume_runs_nowhere_and_that_is_said(
    directory: Path,
) -> None:
    failure = DeviceRefused("its image is locked", device="disk0")
    it, _ = hand_over(directory, says_aborted, ["running"], failure=failure)
    assert (it.outcome.outcome, it.outcome.running_on, it.outcome.exit_code) == ("aborted", "neither", 1)
    assert it.outcome.reasons[-1].reason == "its image is locked"


def test_a_machine_that_runs_over_there_does_so_whatever_its_old_supervisor_says(directory: Path) -> None:
    it, _ = hand_over(
        directory, says_running, ["aborted"], failure=DeviceRefused("it does not finish", device="rtc0")
    )
    assert (it.outcome.outcome, it.outcome.running_on, it.outcome.exit_code) == (
        "completed",
        "destination",
        0,
    )
    assert it.outcome.reasons[-1].device == "rtc0"
