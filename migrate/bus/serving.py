"""Answers the calls that come in on one connection: a task a call of ours, an answer or an error for each."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from migrate.bus import failures
from migrate.bus.descriptors import descriptors
from migrate.bus.exports import Answer, Exports
from migrate.bus.messages import NO_REPLY, Fields, Kind, Message, close_all
from migrate.errors import BusError

LOG = logging.getLogger(__name__)


class Send(Protocol):
    """How a connection sends a message; raises BusError where it has ended."""

    def __call__(
        self, kind: Kind, serial: int, fields: Fields, body: Any, *, flags: int = 0, reply_serial: int = 0
    ) -> None: ...


class Server:
    """`take` gets every call; the rest of the connection is lent by its owner."""

    def __init__(
        self, send: Send, next_serial: Callable[[], int], spawn: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        self.exports = Exports()
        self._send = send
        self._next_serial = next_serial
        self._spawn = spawn

    def take(self, message: Message) -> None:
        """Answer a call, at once where nothing has to be waited for. Descriptors that nobody claims are closed."""
        try:
            answer = self.exports.answer(message)
        except Exception as error:
            self._reply_error(message, error)
            return
        finally:
            message.close_fds()
        if isinstance(answer, Answer):
            self._reply(message, answer)
        else:
            self._spawn(self._answer_later(message, answer))

    async def _answer_later(self, message: Message, awaitable: Awaitable[Answer]) -> None:
        try:
            answer = await awaitable
        except Exception as error:
            self._reply_error(message, error)
        else:
            self._reply(message, answer)

    def _reply(self, call: Message, answer: Answer) -> None:
        try:
            if not call.flags & NO_REPLY:
                fields = Fields(
                    destination=call.fields.sender,
                    signature=answer.signature,
                    unix_fds=answer.signature.count("h"),
                )
                self._send(Kind.RETURN, self._next_serial(), fields, answer.body, reply_serial=call.serial)
        except BusError:
            pass  # nobody is left to be told
        except Exception as error:
            self._reply_error(call, error)
        finally:
            close_all(descriptors(answer.signature, answer.body))

    def _reply_error(self, call: Message, error: Exception) -> None:
        name, text = failures.error_reply(error)
        if name == failures.INTERNAL:
            LOG.error("%s.%s failed", call.fields.interface, call.fields.member, exc_info=error)
        if call.flags & NO_REPLY:
            return
        fields = Fields(error_name=name, destination=call.fields.sender, signature="s")
        try:
            self._send(Kind.ERROR, self._next_serial(), fields, [text], reply_serial=call.serial)
        except BusError:
            pass  # nobody is left to be told
