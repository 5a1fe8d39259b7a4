"""The asyncio stream that carries control frames, over any kind of channel. It knows no frames.

Not asyncio's own streams: here TLS, sockets and pipes are the channels that page threads use too, with one table of
errors, and every wait has its deadline.
"""

from __future__ import annotations

import asyncio
import ssl
from types import TracebackType
from typing import Self

from migrate.errors import ChannelClosed, TransportError
from migrate.transport import sockets
from migrate.transport.channel import Buffer, ByteChannel, PipeChannel

_READ_SIZE = 64 << 10


class ControlStream:
    """An asyncio view of a channel, which it takes over. One task reads while others write; writes do not mix.

    A `read_exactly` that is cancelled or runs into its timeout loses no byte and may be tried again. A write that is cut
    short has left part of a frame behind: later writes say so.
    """

    def __init__(self, channel: ByteChannel) -> None:
        channel.set_deadline(0)
        self.peer = channel.peer
        self.label = channel.label
        self._channel = channel
        self._fds = {False: channel.read_fd, True: channel.write_fd}
        self._waiting: dict[bool, set[asyncio.Future[None]]] = {False: set(), True: set()}
        self._buffer = bytearray()
        self._chunk = memoryview(bytearray(_READ_SIZE))
        self._writing = asyncio.Lock()
        self._cut_short = False
        self._closed = False

    async def read_exactly(self, size: int, *, timeout: float) -> bytes:
        """The next `size` bytes. What size is sane is the protocol's to check first.

        :param timeout: seconds without any byte.
        :raise ChannelClosed: the peer is gone.
        :raise TransportError: `timeout` passed; what had come is kept for the next call.
        """
        while len(self._buffer) < size:
            count = await self._transfer(self._chunk, False, timeout)
            self._buffer += self._chunk[:count]
        with memoryview(self._buffer) as buffer:
            data = buffer[:size].tobytes()
        del self._buffer[:size]
        return data

    async def read_into(self, view: memoryview, *, timeout: float) -> None:
        """Fill a view (of bytes), for pages in line. Raises as `read_exactly`, but cannot be tried again."""
        got = min(len(view), len(self._buffer))
        view[:got] = self._buffer[:got]
        del self._buffer[:got]
        while got < len(view):
            got += await self._transfer(view[got:], False, timeout)

    async def write(self, data: Buffer, *, timeout: float) -> None:
        """Send all of `data`; when this returns the kernel has it.

        :param timeout: seconds in which the peer takes no byte.
        :raise ChannelClosed: the peer is gone, or an earlier write was cut short.
        :raise TransportError: `timeout` passed.
        """
        async with self._writing:
            if self._cut_short and not self._closed:
                raise ChannelClosed(
                    f"an earlier message to {self.label} was cut short", remedy="connect anew"
                )
            self._cut_short = True
            view = memoryview(data).cast("B")
            while len(view):
                view = view[await self._transfer(view, True, timeout) :]
            self._cut_short = False

    def abort(self) -> None:
        """Break the connection now, without waiting; readers and writers get ChannelClosed. `close` is still needed."""
        self._channel.abort()
        self._wake(False)
        self._wake(True)

    async def close(self) -> None:
        """Close; for a command, wait for its end (up to about 4 s). Idempotent. Bytes the peer has not read may be lost."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        for writing, fd in self._fds.items():
            # now, not when the waiter runs: by then the descriptor's number may be another's
            (loop.remove_writer if writing else loop.remove_reader)(fd)
            self._wake(writing)
        if isinstance(self._channel, PipeChannel):
            await asyncio.shield(asyncio.to_thread(self._channel.close))
        else:
            self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _transfer(self, view: memoryview, writing: bool, timeout: float) -> int:
        """Move at least one byte of `view`."""
        # First of all: a peer that never pauses must not starve the other tasks; and bytes read are never lost to a cancel here.
        await asyncio.sleep(0)
        while True:
            if self._closed:
                raise sockets.given_up(self.label)
            try:
                count = self._channel.send_some([view]) if writing else self._channel.recv_some(view)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                # TLS may want to write in order to read, and the other way round
                if isinstance(error, ssl.SSLError):
                    await self._ready(isinstance(error, ssl.SSLWantWriteError), writing, timeout)
                else:
                    await self._ready(writing, writing, timeout)
            except OSError as error:
                raise await self._explain(error) from error
            else:
                if count:
                    return count
                raise await self._explain(None)

    async def _ready(self, direction: bool, writing: bool, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        waiting = self._waiting[direction]
        future: asyncio.Future[None] = loop.create_future()
        if not waiting:
            add = loop.add_writer if direction else loop.add_reader
            add(self._fds[direction], self._wake, direction)
        waiting.add(future)
        try:
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError as error:
            what = "has taken" if writing else "has sent"
            raise TransportError(
                f"{self.label} {what} nothing for {timeout:g} s",
                remedy="look at the load and the log of that host",
            ) from error
        finally:
            waiting.discard(future)
            if not waiting and not self._closed:
                (loop.remove_writer if direction else loop.remove_reader)(self._fds[direction])

    def _wake(self, direction: bool) -> None:
        for future in self._waiting[direction]:
            if not future.done():
                future.set_result(None)

    async def _explain(self, error: OSError | None) -> TransportError:
        if isinstance(self._channel, PipeChannel):  # may wait for a command's last words
            return await asyncio.to_thread(self._channel.explain, error)
        return self._channel.explain(error)
