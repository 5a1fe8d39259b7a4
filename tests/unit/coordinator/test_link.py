"""The control channel over real sockets: order, deadlines, liveness, and peers that break off, refuse or talk garbage."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Coroutine
from typing import Any

import pytest
from links import HELLO, against_raw, both

from migrate.coordinator import link as module
from migrate.coordinator.link import PeerRejected
from migrate.errors import (
    ChannelClosed,
    FerryError,
    LocalProtocolError,
    Reason,
    RemoteProtocolError,
    TransportError,
)
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.protocol.states import Did, Role, Stage

WHY = Reason("uart0", "load", "it does not load", "upgrade it")


def run(play: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(play, 20))


def test_messages_come_in_the_order_they_were_said() -> None:
    async def play() -> None:
        async with both(Stage.PRECOPY) as (source, destination):
            for number in range(50):
                await source.send(m.Chunk("display0", bytes([number])))
            for number in range(50):
                assert await destination.receive(timeout=5) == m.Chunk("display0", bytes([number]))

    run(play())


def test_the_round_trip_is_measured_while_both_sides_are_busy() -> None:
    async def play() -> None:
        async with both(Stage.PRECOPY) as (source, destination):
            while not (source.round_trip_ns and destination.round_trip_ns):
                await asyncio.sleep(0.01)
            assert source.round_trip_ns < 10**9

    run(play())


def test_an_answer_that_does_not_come_is_told_with_the_peer_and_the_time() -> None:
    async def play() -> None:
        async with both(Stage.LOADING) as (source, _):
            with pytest.raises(ChannelClosed, match=r"the peer unix did not answer within 0\.05 s"):
                await source.expect(m.Ready, timeout=0.05)

    run(play())


def test_another_message_than_was_due_is_named() -> None:
    async def play() -> None:
        async with both(Stage.OFFERED) as (source, destination):
            await destination.send(m.Refuse((WHY,)))
            with pytest.raises(ChannelClosed, match="said REFUSE where ACCEPT was due"):
                await source.expect(m.Accept, timeout=5)

    run(play())


def test_what_may_not_be_said_is_not_sent() -> None:
    async def play() -> None:
        async with against_raw() as (link, raw):
            with pytest.raises(LocalProtocolError):
                await link.send(m.Bye())
            await link.send(HELLO)
            assert await raw.hear() == HELLO

    run(play())


# -- giving up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
def test_a_peer_that_gives_up_ends_our_work_with_its_reasons(role: Role) -> None:
    async def play() -> None:
        async with both(Stage.PRECOPY) as (source, destination):
            ours, theirs = (source, destination) if role is Role.SOURCE else (destination, source)
            work = Work()
            during = asyncio.create_task(ours.during(work()))
            await work.began.wait()
            await theirs.send(m.Reject((WHY,)) if role is Role.SOURCE else m.Abort((WHY,)))
            with pytest.raises(PeerRejected) as caught:
                await during
            assert caught.value.reasons() == [WHY]
            assert (caught.value.device, caught.value.phase) == ("uart0", "load")
            assert work.cancelled
            with pytest.raises(PeerRejected):  # and of whatever is tried next
                ours.check()
            with pytest.raises(PeerRejected):
                await ours.send(m.Ping(1))

    run(play())


class Work:
    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.cancelled = False

    async def __call__(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def test_a_reject_just_before_the_end_of_the_channel_says_more_than_the_end() -> None:
    async def play() -> None:
        async with against_raw(stage=Stage.PRECOPY) as (link, raw):
            await raw.say(m.Reject((WHY,)))
            await raw.hang_up()
            await link.closed(timeout=5)
            with pytest.raises(PeerRejected):
                await link.during(asyncio.Event().wait())
            with pytest.raises(PeerRejected):
                await link.receive(timeout=5)

    run(play())


def test_a_reject_without_a_reason_is_one() -> None:
    async def play() -> None:
        async with against_raw(stage=Stage.PRECOPY) as (link, raw):
            await raw.say(m.Reject(()))
            with pytest.raises(PeerRejected, match="the peer gave up without a reason"):
                await link.receive(timeout=5)

    run(play())


def test_work_that_ends_in_time_is_answered_with_its_result_and_its_own_errors() -> None:
    async def play() -> None:
        async with both(Stage.PRECOPY) as (source, _):
            assert await source.during(asyncio.sleep(0, result=7)) == 7
            with pytest.raises(ValueError, match="mine"):
                await source.during(fails())

    async def fails() -> None:
        raise ValueError("mine")

    run(play())


def test_work_that_waits_for_the_peer_has_its_time() -> None:
    async def play() -> None:
        async with both(Stage.JOINING) as (source, _):
            work = Work()
            with pytest.raises(ChannelClosed, match=r"a page channel did not come from unix within 0\.01 s"):
                await source.during(work(), timeout=0.01, what="a page channel")
            assert work.cancelled

    run(play())


# -- garbage -----------------------------------------------------------------------------------------------------------

HEAD_OF_4_GIB = struct.pack(">4sBBHI", b"VMF1", 1, 0, 0, 0xFFFFFFFF)
GARBAGE = {
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", RemoteProtocolError, "does not speak vmferry's protocol"),
    "4 GiB": (HEAD_OF_4_GIB + struct.pack(">I", zlib.crc32(HEAD_OF_4_GIB)), RemoteProtocolError, "claims 4294967295"),
    "a damaged body": (frames.encode_control(m.encode(m.Ping(1)))[:-1] + b"x", RemoteProtocolError, "checksum"),
    "no message": (frames.encode_control(b"\xc0"), RemoteProtocolError, "not [name, fields]"),
    "out of turn": (frames.encode_control(m.encode(m.Ready({}, 0))), RemoteProtocolError, "READY to the source"),
    "pages": (frames.encode_header(frames.Kind.MARK, 12) + bytes(12), FerryError, "where none were agreed"),
}  # fmt: skip


@pytest.mark.parametrize("what", GARBAGE)
def test_a_peer_that_talks_garbage_is_told_apart(what: str) -> None:
    data, kind, says = GARBAGE[what]

    async def play() -> None:
        async with against_raw(stage=Stage.PRECOPY) as (link, raw):
            work = Work()
            during = asyncio.create_task(link.during(work()))
            await work.began.wait()
            await raw.say(data)
            with pytest.raises(kind) as caught:
                await during
            assert says in str(caught.value)
            assert work.cancelled
            with pytest.raises(kind):
                await link.receive(timeout=5)

    run(play())


def test_a_peer_that_hangs_up_is_told() -> None:
    async def play() -> None:
        async with against_raw(stage=Stage.PRECOPY) as (link, raw):
            await raw.hang_up()
            with pytest.raises(ChannelClosed, match="closed the connection"):
                await link.receive(timeout=5)
            assert link.broken

    run(play())


def test_a_peer_that_says_nothing_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.1)

    async def play() -> None:
        async with against_raw(stage=Stage.PRECOPY) as (link, _):
            with pytest.raises(TransportError, match=r"has sent nothing for 0\.1 s"):
                await link.receive(timeout=5)

    run(play())


def test_a_peer_that_only_pings_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(module, "PING_SECONDS", 0.05)

    async def play() -> None:
        async with both(Stage.PRECOPY) as (source, _):
            with pytest.raises(ChannelClosed, match="did not answer within 1 s"):
                await source.receive(timeout=1)

    run(play())


def test_a_peer_that_sends_faster_than_we_work_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HELD", 1 << 20)
    size, count = 256 << 10, 64

    async def play() -> None:
        async with both(Stage.PRECOPY) as (source, destination):
            sending = asyncio.create_task(say_all(source))
            await asyncio.wait([sending], timeout=0.5)
            assert not sending.done()
            assert destination._held < (1 << 20) + 2 * size
            for number in range(count):
                message = await destination.expect(m.Chunk, timeout=5)
                assert message.data[0] == number
            await sending

    async def say_all(source: Any) -> None:
        for number in range(count):
            await source.send(m.Chunk("display0", bytes([number]) * size))

    run(play())


def test_many_small_messages_are_held_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HELD", 1 << 20)

    async def play() -> None:
        async with against_raw(Role.DESTINATION, Stage.PRECOPY) as (link, raw):
            sending = asyncio.create_task(raw.say(*[m.Chunk("d", b"")] * 20_000))
            await asyncio.wait([sending], timeout=0.5)
            assert link._inbox.qsize() < 4096
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    run(play())


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_ping_that_crosses_the_last_word_does_not_break_the_channel() -> None:
    # Else the destination closes with bytes unread, which can take RUNNING back from a source that has not read it.
    async def play() -> None:
        async with against_raw(Role.DESTINATION, Stage.COMMITTED) as (link, raw):
            await link.send(m.Running(1, 2))
            await raw.say(m.Ping(7))
            closed = asyncio.create_task(link.closed(timeout=10))
            while await raw.hear_any() != m.Pong(7):
                pass
            assert not link.broken
            assert not closed.done()
            await raw.hang_up()
            await closed

    run(play())


def test_a_lost_channel_is_told_to_the_conversation_where_that_means_something() -> None:
    async def play() -> None:
        for stage, after in (
            (Stage.PRECOPY, Stage.FAILED),
            (Stage.COMMITTING, Stage.DOUBT),
            (Stage.RUNNING, Stage.RUNNING),
        ):
            async with against_raw(stage=stage) as (link, _):
                link.lost()
                assert link.conversation.stage is after

    run(play())


def test_a_reject_that_crosses_commit_is_heard_as_a_doubt() -> None:
    async def play() -> None:
        async with against_raw(stage=Stage.READY) as (link, raw):
            link.conversation.did(Did.WROTE_COMMIT)
            await link.send(m.Commit("job", 1, 0, False))
            await raw.say(m.Reject((WHY,)))
            with pytest.raises(PeerRejected):
                await link.receive(timeout=5)
            assert link.conversation.stage is Stage.DOUBT

    run(play())
