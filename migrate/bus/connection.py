"""One connection to a message bus: calls with deadlines, signals, names, and what this process offers there.

Every call ends: by its answer, at its deadline, or at once when the connection ends. Every error is one of migrate.errors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from migrate.bus import failures, library
from migrate.bus.descriptors import descriptors, indexed, take_fds
from migrate.bus.link import Link
from migrate.bus.messages import NO_AUTO_START, NO_REPLY, Fields, Kind, Message, close_all, encode_header
from migrate.bus.service import Interface
from migrate.bus.serving import Server
from migrate.errors import (
    BusError,
    DeviceError,
    DeviceGone,
    DeviceRefused,
    DeviceTimeout,
    FerryError,
    Phase,
    RemoteProtocolError,
)

LOG = logging.getLogger(__name__)

#: Seconds that the bus itself may take to answer. It does nothing but pass messages.
DAEMON_TIMEOUT: Final = 5.0

_DAEMON: Final = "org.freedesktop.DBus"
_DAEMON_PATH: Final = "/org/freedesktop/DBus"
_DO_NOT_QUEUE: Final = 4
_PRIMARY_OWNER, _IN_QUEUE, _EXISTS, _ALREADY_OWNER = 1, 2, 3, 4

SignalCallback = Callable[[str, str, list[Any]], None]


class Bus:
    """A connection; make one with `Bus.connect`. All methods belong to the event loop that made it."""

    def __init__(self, link: Link, address: str) -> None:
        self._link = link
        self.address = address
        self.unique_name = ""
        #: Set when the connection has ended, by close() or by itself.
        self.closed = asyncio.Event()
        self._why_closed = ""
        self._serial = 0
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._server = Server(self._send, self._next_serial, self._spawn)
        self._tasks: set[asyncio.Task[None]] = set()
        self._signals: dict[tuple[str, str], list[tuple[str | None, SignalCallback]]] = {}
        self._on_disconnect: list[Callable[[], None]] = []

    @classmethod
    async def connect(cls, address: str, *, timeout: float = 5.0) -> Bus:
        """Connect to the bus at `address` within `timeout` seconds. Raises BusError, or UsageError for a bad address."""
        bus = cls(await Link.connect(address, timeout), address)
        bus._link.start(bus._on_message, bus._lost)
        try:
            (bus.unique_name,) = await bus._ask("Hello", timeout=timeout)
        except BaseException:
            await bus.close()
            raise
        return bus

    async def close(self) -> None:
        """End the connection, with what was sent on its way. Calls that wait fail; handlers that run are cancelled."""
        if not self.closed.is_set():
            try:
                async with asyncio.timeout(1.0):
                    await self._link.drain()
            except TimeoutError:
                LOG.warning("the bus at %s did not take the last messages", self.address)
            self._end("the connection to the bus was closed")
        await asyncio.sleep(0)  # a handler that was not entered yet could not close its descriptors
        running = self._tasks - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once when the connection ends by itself (not by close()); soon, if it has."""
        if self.closed.is_set():
            asyncio.get_running_loop().call_soon(callback)
        else:
            self._on_disconnect.append(callback)

    # -- calls -------------------------------------------------------------------------------------------------------

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float,
        device: str | None = None,
        phase: Phase | str | None = None,
        reply_signature: str | None = None,
    ) -> list[Any]:
        """Call a method and return the values of its answer, variants unwrapped.

        Descriptors in `body` (type `h`) stay the caller's. Those in the answer are the caller's to close, close-on-exec.

        :param timeout: seconds until DeviceTimeout.
        :param device: the participant's Id, where it is one: errors name it, and only what it may say is believed.
        :param phase: what errors say about when it happened.
        :param reply_signature: refuse an answer of another signature.
        :raises DeviceTimeout: no answer in time.
        :raises DeviceGone: the process, or our own connection, is gone.
        :raises DeviceRefused: any foreign error, or an answer that is not what was asked for.
        :raises FerryError: the error of ours that the other side raised.
        """
        whom = device or destination
        try:
            reply = await self._exchange(
                Fields(path, interface, member, None, 0, destination, None, signature, signature.count("h")),
                body,
                timeout,
            )
        except TimeoutError:
            raise DeviceTimeout(
                f"{whom} did not answer {member} within {timeout:g} s",
                device=device,
                phase=phase or Phase.RUNNING,
                remedy="see what its process is doing; its log has the last it did",
            ) from None
        except ConnectionError as error:
            raise DeviceGone(
                f"no answer of {whom} to {member}: {error}", device=device, phase=phase or Phase.RUNNING
            ) from None
        try:
            values = _values(reply)
        except RemoteProtocolError as error:
            raise DeviceRefused(
                f"{whom} answered {member} with something unreadable: {error.reason}",
                device=device,
                phase=phase or Phase.RUNNING,
            ) from error
        if reply.kind == Kind.ERROR:
            text = values[0] if values and isinstance(values[0], str) else ""
            raise failures.error_from_reply(
                reply.fields.error_name or "", text, device=device, whom=whom, phase=phase
            )
        if reply_signature is not None and reply.fields.signature != reply_signature:
            close_all(descriptors(reply.fields.signature, values))
            raise DeviceRefused(
                f"{whom} answered {member} with {reply.fields.signature!r} where {reply_signature!r} is agreed",
                device=device,
                phase=phase or Phase.RUNNING,
                remedy="it does not follow docs/dbus; is it of another version?",
            )
        return values

    async def _exchange(self, fields: Fields, body: Sequence[Any], timeout: float) -> Message:
        """Send a call and wait for its reply. Raises TimeoutError, ConnectionError; LocalProtocolError for a bad body."""
        if self.closed.is_set():
            raise ConnectionError(self._why_closed)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Message] = loop.create_future()
        serial = self._next_serial()
        self._pending[serial] = future
        timer = loop.call_later(timeout, _expire, future)
        try:
            self._send(Kind.CALL, serial, fields, body, flags=NO_AUTO_START)
            return await future
        except asyncio.CancelledError:
            # The answer may have come in the very moment that its waiter was cancelled.
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().close_fds()
            raise
        except BusError as error:
            raise ConnectionError(error.reason) from error
        finally:
            timer.cancel()
            self._pending.pop(serial, None)

    async def _ask(
        self, member: str, signature: str = "", *body: Any, timeout: float = DAEMON_TIMEOUT
    ) -> list[Any]:
        """Call a method of the bus itself. Raises BusError; DeviceGone where the name it is about has no owner."""
        try:
            return await self.call(_DAEMON, _DAEMON_PATH, _DAEMON, member, signature, body, timeout=timeout)
        except DeviceGone as error:
            if self.closed.is_set():
                raise BusError(self._why_closed, remedy="is the machine's supervisor running?") from error
            raise DeviceGone(f"{body[0]} is not on the bus", remedy="see why its process ended") from error
        except DeviceError as error:
            raise BusError(f"the bus did not {member}: {error.reason}") from error

    # -- names -------------------------------------------------------------------------------------------------------

    async def request_name(self, name: str, *, queue: bool) -> bool:
        """Own a name, or with `queue` wait in its queue. True where we are the primary owner. Raises BusError."""
        (answer,) = await self._ask("RequestName", "su", name, 0 if queue else _DO_NOT_QUEUE)
        if answer == _EXISTS:
            raise BusError(
                f"the name {name} is taken on this bus", remedy="is a second process of the kind running?"
            )
        return bool(answer in (_PRIMARY_OWNER, _ALREADY_OWNER))

    async def queued_owners(self, name: str) -> list[str]:
        """The unique names of all that own or queue for a name, primary owner first; empty where nobody does."""
        try:
            (owners,) = await self._ask("ListQueuedOwners", "s", name)
        except DeviceGone:
            return []
        return list(owners)

    async def pid_of(self, name: str) -> int:
        """The process id behind a name. Raises DeviceGone where there is none."""
        (pid,) = await self._ask("GetConnectionUnixProcessID", "s", name)
        return int(pid)

    async def uid_of(self, name: str) -> int:
        """The user id behind a name. Raises DeviceGone where there is none."""
        (uid,) = await self._ask("GetConnectionUnixUser", "s", name)
        return int(uid)

    def watch_name(self, name: str, on_vanished: Callable[[], None]) -> Callable[[], None]:
        """Have `on_vanished` called once when nobody owns `name` any more (or nobody does now); returns how to stop.

        The end of our own connection is not told here: see on_disconnect.
        """
        done = False

        def changed(_sender: str, _path: str, body: list[Any]) -> None:
            if body[0] == name and not body[2]:
                vanished()

        def vanished() -> None:
            nonlocal done
            if not done:
                done = True
                stop()
                on_vanished()

        async def check() -> None:
            try:
                # After AddMatch in the same stream: a name that went in between is seen by one of the two.
                (owned,) = await self._ask("NameHasOwner", "s", name)
            except FerryError:
                return
            if not owned:
                vanished()

        key = (_DAEMON, "NameOwnerChanged")
        rule = (
            f"type='signal',sender='{_DAEMON}',interface='{_DAEMON}',member='NameOwnerChanged',arg0='{name}'"
        )
        remove = self._subscribe(key, _DAEMON, changed, rule)
        self._send_quietly("AddMatch", rule)

        def stop() -> None:
            nonlocal done
            done = True
            remove()

        self._spawn(check())
        return stop

    # -- signals -----------------------------------------------------------------------------------------------------

    async def on_signal(
        self, interface: str, member: str, callback: SignalCallback, *, sender: str | None = None
    ) -> Callable[[], None]:
        """Have `callback(sender, path, body)` called for every such signal; returns how to stop. Raises BusError."""
        rule = f"type='signal',interface='{interface}',member='{member}'"
        if sender is not None:
            rule += f",sender='{sender}'"
        remove = self._subscribe((interface, member), sender, callback, rule)
        try:
            await self._ask("AddMatch", "s", rule)
        except BaseException:
            remove()
            raise
        return remove

    def emit(
        self, path: str, interface: str, signal: str, signature: str = "", body: Sequence[Any] = ()
    ) -> None:
        """Send a signal to whoever listens. Raises BusError where the connection has ended; no descriptors."""
        fields = Fields(path, interface, signal, None, 0, None, None, signature)
        self._send(Kind.SIGNAL, self._next_serial(), fields, body, flags=NO_REPLY)

    def _subscribe(
        self, key: tuple[str, str], sender: str | None, callback: SignalCallback, rule: str
    ) -> Callable[[], None]:
        entry = (sender, callback)
        self._signals.setdefault(key, []).append(entry)

        def remove() -> None:
            entries = self._signals.get(key, [])
            if entry in entries:
                entries.remove(entry)
                self._send_quietly("RemoveMatch", rule)

        return remove

    def _send_quietly(self, member: str, argument: str) -> None:
        """A call to the bus whose answer does not matter; nothing at all where the connection has ended."""
        fields = Fields(_DAEMON_PATH, _DAEMON, member, None, 0, _DAEMON, None, "s")
        try:
            self._send(Kind.CALL, self._next_serial(), fields, [argument], flags=NO_REPLY)
        except BusError:
            pass  # on_disconnect tells those who need to know

    # -- service -----------------------------------------------------------------------------------------------------

    def export(self, path: str, *interfaces: Interface) -> None:
        """Offer interfaces at a path. Export before requesting the name that others find us by."""
        self._server.exports.add(path, interfaces)

    def unexport(self, path: str) -> None:
        self._server.exports.remove(path)

    # -- messages ----------------------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        if message.kind in (Kind.RETURN, Kind.ERROR):
            future = self._pending.get(message.reply_serial)
            if future is not None and not future.done():
                future.set_result(message)
            else:
                message.close_fds()  # the answer to a call that nobody waits for any more
        elif message.kind == Kind.CALL:
            self._server.take(message)
        else:
            message.close_fds()
            if message.kind == Kind.SIGNAL:
                self._deliver(message)

    def _deliver(self, message: Message) -> None:
        fields = message.fields
        entries = self._signals.get((fields.interface or "", fields.member or ""))
        if not entries:
            return
        try:
            body = library.decode_body(fields.signature, message.body, message.big_endian)
        except RemoteProtocolError as error:
            LOG.warning("a signal %s of %s was dropped: %s", fields.member, fields.sender, error.reason)
            return
        for sender, callback in list(entries):
            if sender is None or sender == fields.sender:
                try:
                    callback(fields.sender or "", fields.path or "", body)
                except Exception:
                    LOG.exception("a callback for the signal %s failed", fields.member)

    def _send(
        self,
        kind: Kind,
        serial: int,
        fields: Fields,
        body: Sequence[Any],
        *,
        flags: int = 0,
        reply_serial: int = 0,
    ) -> None:
        fds: list[int] = []
        if fields.unix_fds:
            fds, body = descriptors(fields.signature, body), indexed(fields.signature, body)
        encoded = library.encode_body(fields.signature, body)
        header = encode_header(kind, serial, len(encoded), fields, flags=flags, reply_serial=reply_serial)
        self._link.send(header, encoded, fds)

    def _next_serial(self) -> int:
        self._serial = self._serial % 0xFFFFFFFF + 1
        return self._serial

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _lost(self, why: str) -> None:
        self._end(why)
        for callback in self._on_disconnect:
            asyncio.get_running_loop().call_soon(callback)
        self._on_disconnect.clear()

    def _end(self, why: str) -> None:
        self._why_closed = why
        self.closed.set()
        self._link.close()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(ConnectionError(why))


def _expire(future: asyncio.Future[Message]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def _values(reply: Message) -> list[Any]:
    """The values of a reply; descriptors that it does not name are closed. Raises RemoteProtocolError."""
    try:
        values = library.decode_body(reply.fields.signature, reply.body, reply.big_endian)
        if reply.fds or "h" in reply.fields.signature:
            take_fds(reply.fields.signature, values, reply)
        return values
    finally:
        reply.close_fds()
