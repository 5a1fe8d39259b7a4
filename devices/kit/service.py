"""A Runtime on the bus: each call goes to one thread, in order, so that the event loop always answers.

A device that hangs while it saves or loads misses the deadline of that call, and of those behind it; pings, properties and
SIGTERM are still served.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from devices.kit.runtime import BUS, Runtime
from migrate.bus import Bus
from migrate.bus.device import DEVICE, MAX_BLOB, VMSTATE, Disk
from migrate.errors import DeviceRefused, Phase
from migrate.state.blob import MAX_BLOB as MAX_ENVELOPE
from migrate.state.schema import MAX_PAYLOAD

#: The most that the envelope adds to a payload, bytes.
_ENVELOPE = MAX_ENVELOPE - MAX_PAYLOAD

_P = ParamSpec("_P")
_R = TypeVar("_R")


class ControlThread:
    """Runs calls of the event loop one after the other. A daemon thread: a call that hangs does not keep the process."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name="control", daemon=True).start()

    async def run(self, function: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """What `function` returns or raises. It runs to its end also where the waiter is cancelled."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_R] = loop.create_future()

        def settle(result: _R | None, error: BaseException | None) -> None:
            if not future.done():
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(result)  # type: ignore[arg-type]

        def call() -> None:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, result, None)

        self._calls.put(call)
        return await future

    def _loop(self) -> None:
        while True:
            self._calls.get()()


class Service:
    """What migrate.bus.device.DeviceService wants; the words of docs/dbus/*.xml say what each means."""

    def __init__(self, runtime: Runtime, control: ControlThread) -> None:
        self._runtime = runtime
        self._run = control.run

    async def _move(self, function: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """For what moves the device or its state: only one may, and it is not always the bus."""
        self._require_bus()
        return await self._run(function, *args, **kwargs)

    def _require_bus(self) -> None:
        if self._runtime.moved_by != BUS:
            raise DeviceRefused(
                "its VMM moves it, by vfio-user: it was started with --migration vfio-user",
                remedy="ask the VMM, or start it without that argument",
                phase=Phase.SETUP,
                device=self.id,
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The well-known names to queue for, in this order: whoever finds the second finds the first as well."""
        # QEMU drops a helper with a larger state from its stream and loses the guest by it.
        fits_qemu = (
            self._runtime.moved_by == BUS
            and self._runtime.participant.for_qemu
            and not self._runtime.streams
            and self._runtime.format.version.max_size + _ENVELOPE <= MAX_BLOB
        )
        return (DEVICE, VMSTATE) if fits_qemu else (DEVICE,)

    def on_bus(self, bus: Bus) -> None:
        self._runtime.participant.on_bus(bus)

    @property
    def id(self) -> str:
        return self._runtime.participant.id

    @property
    def type(self) -> str:
        return self._runtime.participant.type

    @property
    def schema_version(self) -> int:
        return self._runtime.format.version.version

    @property
    def readable_versions(self) -> Sequence[int]:
        return self._runtime.format.readable

    @property
    def writable_versions(self) -> Sequence[int]:
        return self._runtime.format.writable

    @property
    def schema_digest(self) -> bytes:
        return self._runtime.format.version.digest

    @property
    def state(self) -> str:
        return self._runtime.participant.state

    @property
    def tracker(self) -> str:
        return self._runtime.tracking.name

    @property
    def streams(self) -> bool:
        return self._runtime.streams

    @property
    def obstacle(self) -> str:
        return self._runtime.participant.obstacle()

    @property
    def disks(self) -> Sequence[Disk]:
        return self._runtime.participant.disks()

    async def save(self) -> bytes:
        return await self._run(self._runtime.save)

    async def load(self, data: bytes) -> None:
        await self._move(self._runtime.load, data)

    async def attach_memory(self, gpa: int, size: int, memory: int, offset: int) -> None:
        await self._run(self._runtime.attach_memory, gpa, size, memory, offset)

    async def set_state(self, state: str, options: Mapping[str, Any]) -> str:
        return await self._move(self._runtime.set_state, state, options)

    async def start_tracking(self) -> None:
        await self._run(self._runtime.start_tracking)

    async def collect_dirty(self) -> tuple[int, int]:
        return await self._run(self._runtime.collect_dirty)

    async def stop_tracking(self) -> None:
        await self._run(self._runtime.stop_tracking)

    async def save_as(self, version: int) -> bytes:
        return await self._run(self._runtime.save_as, version)

    async def check_incoming(self, data: bytes) -> None:
        await self._run(self._runtime.check_incoming, data)

    async def stage(self, data: bytes) -> None:
        await self._move(self._runtime.stage, data)

    async def apply(self) -> None:
        await self._move(self._runtime.apply)

    async def stream_read(self, max_bytes: int) -> tuple[int, int, int]:
        return await self._move(self._runtime.stream_read, max_bytes)

    async def stream_write(self, chunk: int, size: int) -> None:
        try:
            self._require_bus()
        except DeviceRefused:
            os.close(chunk)
            raise
        await self._run(self._runtime.stream_write, chunk, size)

    async def fingerprint(self, version: int) -> bytes:
        return await self._run(self._runtime.fingerprint, version)

    async def release_locks(self) -> None:
        await self._move(self._runtime.release_locks)

    async def serving(self) -> None:
        await self._run(self._runtime.serving)

    async def finish(self, outcome: str) -> None:
        await self._move(self._runtime.finish, outcome)
