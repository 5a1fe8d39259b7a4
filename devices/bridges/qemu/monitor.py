"""QMP for callers that are no coroutines: the client's event loop runs on a thread of its own, and every call has a deadline.

QEMU's own words are carried into our reasons; what the library raises never leaves this module.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from migrate.errors import DeviceGone, DeviceRefused, DeviceTimeout, FerryError, Phase

log = logging.getLogger(__name__)

#: Seconds that QEMU may take to answer, and to offer its monitor after it was started.
ANSWER_SECONDS: Final = 5.0
CONNECT_SECONDS: Final = 20.0
_AGAIN: Final = 0.02
#: The library calls each attempt to connect an error; what comes of them is told here.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

#: Told an event's name, its data, and our monotonic clock in ns when it was read. On the monitor's thread: it may not wait.
OnEvent = Callable[[str, dict[str, Any], int], None]


class Monitor:
    """One connection to QEMU's monitor, from `connect` to `close`. Its methods may be called from any thread but its own."""

    def __init__(self, device: str, on_event: OnEvent, on_lost: Callable[[], None]) -> None:
        """:param device: whom errors name. :param on_lost: QEMU has closed the connection; on the monitor's thread."""
        self.device = device
        self._on_event = on_event
        self._on_lost = on_lost
        self._qmp = QMPClient(device)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="monitor", daemon=True)
        self._thread.start()
        self._tasks: list[asyncio.Future[None]] = []
        self._closing = False

    def connect(self, path: str, *, seconds: float = CONNECT_SECONDS, alive: Callable[[], bool]) -> None:
        """:param alive: whether it is worth while to go on trying.
        :raise DeviceGone: it is not there any more, or refuses. :raise DeviceTimeout: it never answered."""
        self._run(self._connect(path, seconds, alive), seconds + 1.0, "its greeting")

    async def _connect(self, path: str, seconds: float, alive: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                await asyncio.wait_for(self._qmp.connect(path), max(deadline - time.monotonic(), 0.1))
                break
            except (QMPError, OSError, EOFError) as error:
                if not alive():
                    raise DeviceGone(
                        "QEMU ended before its monitor answered", device=self.device, phase=Phase.SETUP
                    ) from None
                if time.monotonic() > deadline:
                    raise DeviceGone(
                        f"QEMU's monitor at {path} cannot be reached: {error}",
                        device=self.device,
                        phase=Phase.SETUP,
                        remedy="is it another client's? QEMU's monitor takes one at a time",
                    ) from None
                await asyncio.sleep(_AGAIN)
        listener = EventListener()
        self._qmp.register_listener(listener)
        self._tasks = [
            asyncio.ensure_future(self._listen(listener)),
            asyncio.ensure_future(self._watch()),
        ]

    async def _listen(self, listener: EventListener) -> None:
        async for event in listener:
            name, data = event.get("event"), event.get("data", {})
            if isinstance(name, str) and isinstance(data, dict):
                self._on_event(name, data, time.monotonic_ns())

    async def _watch(self) -> None:
        while self._qmp.runstate.name == "RUNNING":
            await self._qmp.runstate_changed()
        if not self._closing:
            self._on_lost()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        seconds: float = ANSWER_SECONDS,
        phase: Phase = Phase.RUNNING,
    ) -> Any:
        """What QEMU answers.

        :raise DeviceRefused: with QEMU's own words. :raise DeviceTimeout: it hangs. :raise DeviceGone: it is gone.
        """
        try:
            return self._run(self._execute(command, arguments), seconds, command)
        except FerryError as error:
            error.phase = str(phase)
            raise

    async def _execute(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
        try:
            # Shielded: an answer that comes after its deadline belongs to somebody, or the library would take offence.
            answer = asyncio.ensure_future(self._qmp.execute(command, dict(arguments) if arguments else None))
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
            return await asyncio.shield(answer)
        except ExecuteError as error:
            raise DeviceRefused(
                f"QEMU refuses {command}: {error}",
                device=self.device,
                remedy="these are QEMU's own words; see its log beside this one",
            ) from None
        except (QMPError, OSError, EOFError) as error:
            raise DeviceGone(
                f"QEMU's monitor was lost at {command}: {error}", device=self.device, remedy="see QEMU's log"
            ) from None

    def give(
        self, name: str, fd: int, *, seconds: float = ANSWER_SECONDS, phase: Phase = Phase.RUNNING
    ) -> None:
        """Pass QEMU a descriptor, which it calls `name` until it takes it (`fd:NAME`). Ours stays open.

        :raise DeviceRefused, DeviceTimeout, DeviceGone: as `execute`.
        """
        try:
            self._run(self._give(name, fd), seconds, "getfd")
        except FerryError as error:
            error.phase = str(phase)
            raise

    async def _give(self, name: str, fd: int) -> None:
        try:
            self._qmp.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise DeviceGone(
                f"QEMU's monitor was lost at getfd: {error}", device=self.device, remedy="see QEMU's log"
            ) from None
        await self._execute("getfd", {"fdname": name})

    def _run(self, work: Any, seconds: float, what: str) -> Any:
        future: concurrent.futures.Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise DeviceTimeout(
                f"QEMU did not answer {what} within {seconds:g} s",
                device=self.device,
                remedy="it hangs: see its log, and what its process waits for",
            ) from None

    def close(self) -> None:
        self._closing = True

        async def end() -> None:
            try:
                await asyncio.wait_for(self._qmp.disconnect(), 1.0)
            except (QMPError, OSError, EOFError, TimeoutError, asyncio.CancelledError) as error:
                log.debug("event=monitor-closed why=%r", str(error))
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        try:
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(2.0)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            pass  # the thread is a daemon; the process ends
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._loop.close()
