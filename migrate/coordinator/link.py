"""The control channel between two coordinators: frames and messages over a stream, with a conversation that allows or refuses
each, a deadline on every wait, and liveness both ways."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from migrate.errors import ChannelClosed, FerryError, Phase, Reason
from migrate.protocol import frames, messages
from migrate.protocol.states import Conversation, Did, Role

#: A peer that says nothing for this long, s, is taken for dead; each side says something every PING_SECONDS.
SILENCE_SECONDS = 12.0
PING_SECONDS = 2.0
#: Bytes of messages that wait to be looked at, each with what it costs beside them; one more of the largest may come on top.
MAX_HELD = 16 << 20
COST = 512

T = TypeVar("T")
M = TypeVar("M", bound=messages.Message)


class Stream(Protocol):
    """What migrate.transport gives: bytes both ways, with deadlines and our errors."""

    peer: str

    async def read_exactly(self, size: int, *, timeout: float) -> bytes: ...
    async def write(self, data: bytes, *, timeout: float) -> None: ...
    async def close(self) -> None: ...


class PeerRejected(FerryError):
    """The other side said REJECT or ABORT, with its reasons."""

    code = "Rejected"

    def __init__(self, reasons: tuple[Reason, ...]) -> None:
        first = (
            reasons[0]
            if reasons
            else Reason(None, str(Phase.PRECOPY), "the peer gave up without a reason", "")
        )
        super().__init__(first.reason, remedy=first.remedy, phase=first.phase, device=first.device)
        self._all = list(reasons) or [first]

    def reasons(self) -> list[Reason]:
        return list(self._all)


#: Takes a page frame that came in line on the control channel: its header and its body.
PageSink = Callable[[frames.Header, bytes], Awaitable[None]]


class Link:
    """One side of a control channel. One task reads; `expect` and `during` see what it read, in order.

    :ivar pages: takes frames that are no messages; None where none were agreed.
    """

    def __init__(self, stream: Stream, role: Role, *, pages: PageSink | None = None) -> None:
        self.stream = stream
        self.conversation = Conversation(role)
        self.round_trip_ns = 0
        self.pages = pages
        self._inbox: asyncio.Queue[tuple[messages.Message, int]] = asyncio.Queue()
        self._held = 0  #: bytes of what is in the inbox
        self._room = asyncio.Event()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writing = asyncio.Lock()
        self._pinged: dict[int, int] = {}
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._ping())]

    # -- sending ---------------------------------------------------------------------------------------------------------

    async def send(self, message: messages.Message) -> None:
        """:raises LocalProtocolError: if it may not be said now. :raises ChannelClosed, PeerRejected: as `check`."""
        self.check()
        self.conversation.sending(message)
        await self.write(frames.encode_control(messages.encode(message)))

    async def write(self, frame: bytes) -> None:
        """A whole frame, never mixed with another."""
        async with self._writing:
            await self.stream.write(frame, timeout=SILENCE_SECONDS)

    # -- receiving -------------------------------------------------------------------------------------------------------

    async def expect(self, kind: type[M], *, timeout: float) -> M:
        """The next message, which has to be of this kind.

        :raises PeerRejected: if it is REJECT or ABORT instead. :raises ChannelClosed: if it does not come.
        """
        message = await self.receive(timeout=timeout)
        if not isinstance(message, kind):
            raise ChannelClosed(
                f"the peer said {message.name} where {kind.name} was due",
                phase=Phase.PRECOPY,
                remedy="see its log",
            )
        return message

    async def receive(self, *, timeout: float) -> messages.Message:
        """The next message of any kind but REJECT and ABORT."""
        getter = asyncio.ensure_future(self._inbox.get())
        try:
            await asyncio.wait([getter, self._broken], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
            if not getter.done():
                if self._broken.done():
                    self._broken.result()
                raise ChannelClosed(
                    f"the peer {self.stream.peer} did not answer within {timeout:g} s",
                    phase=Phase.PRECOPY,
                    remedy="see what its host is doing",
                )
            message = self._taken(getter.result())
        finally:
            getter.cancel()
        if isinstance(message, messages.Reject | messages.Abort):
            raise PeerRejected(message.reasons)
        return message

    async def during(self, work: Awaitable[T], *, timeout: float | None = None, what: str = "this") -> T:
        """Await our own work, unless the channel breaks or the peer gives up first; then the work is cancelled.

        :param timeout: for work that waits for the peer, s. :param what: did not come by then.
        :raises ChannelClosed: when the time is up.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([task, self._broken], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
            if not task.done() and not self._broken.done():
                raise ChannelClosed(
                    f"{what} did not come from {self.stream.peer} within {timeout:g} s",
                    phase=Phase.PRECOPY,
                    remedy="see what its host is doing",
                )
            if not task.done():
                # A REJECT may have come just before the end of the channel; it says more.
                while not self._inbox.empty():
                    message = self._taken(self._inbox.get_nowait())
                    if isinstance(message, messages.Reject | messages.Abort):
                        raise PeerRejected(message.reasons)
                self._broken.result()
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                raw = await self.stream.read_exactly(frames.HEADER_SIZE, timeout=SILENCE_SECONDS)
                header = frames.decode_header(raw)
                body = await self.stream.read_exactly(header.length, timeout=SILENCE_SECONDS)
                if header.kind is not frames.Kind.CONTROL:
                    await self._page(header, body)
                    continue
                message = messages.decode(frames.decode_control(body))
                self.conversation.received(message)
                if isinstance(message, messages.Ping):
                    await self.send(messages.Pong(message.n))
                elif isinstance(message, messages.Pong):
                    sent = self._pinged.pop(message.n, None)
                    if sent is not None:
                        self.round_trip_ns = time.monotonic_ns() - sent
                else:
                    self._held += header.length + COST
                    self._inbox.put_nowait((message, header.length + COST))
                    if isinstance(message, messages.Reject | messages.Abort):
                        self._break(PeerRejected(message.reasons))
                    await self._wait_for_room()
        except FerryError as error:
            self._break(error)

    def _taken(self, item: tuple[messages.Message, int]) -> messages.Message:
        message, size = item
        self._held -= size
        self._room.set()
        return message

    async def _wait_for_room(self) -> None:
        """Read no further while much is unread: a peer that sends faster than we work waits, and our pings go on."""
        while self._held > MAX_HELD:
            self._room.clear()
            await self._room.wait()

    async def _page(self, header: frames.Header, body: bytes) -> None:
        if self.pages is None:
            raise ChannelClosed(
                "page frames came on the control channel, where none were agreed",
                phase=Phase.PRECOPY,
                remedy="see the log of the peer; it may be no vmferry",
            )
        await self.pages(header, body)

    def _break(self, error: FerryError) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)
            self._broken.exception()  # seen: whoever waits raises it again

    def check(self) -> None:
        """Before a step that a broken conversation would not allow: why it broke says more than that.

        :raises PeerRejected: the peer has said REJECT or ABORT. :raises ChannelClosed: the channel is gone.
        """
        if self._broken.done():
            self._broken.result()

    @property
    def broken(self) -> bool:
        return self._broken.done()

    async def closed(self, *, timeout: float) -> None:
        """Wait until the peer has closed the channel, or the time is up."""
        await asyncio.wait([self._broken], timeout=timeout)

    async def _ping(self) -> None:
        number = 0
        try:
            while True:
                await asyncio.sleep(
                    PING_SECONDS if number > 2 else 0.05
                )  # a first measure soon, then now and then
                try:
                    self.conversation.sending(messages.Ping(number))
                except FerryError:
                    continue  # nothing was said yet, or all is over
                self._pinged = {number: time.monotonic_ns()}
                await self.write(frames.encode_control(messages.encode(messages.Ping(number))))
                number += 1
        except FerryError as error:
            self._break(error)

    def lost(self) -> None:
        """Tell the conversation that the channel is gone, where its table knows that event."""
        try:
            self.conversation.did(Did.LOST)
        except FerryError:
            pass  # a stage in which nothing was promised yet, or all is over

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.stream.close()
