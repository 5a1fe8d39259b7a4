"""The checks of org.vmferry.Device1: states and arcs, versions, staging, tracking, the end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Final

from migrate.bus import DeviceInfo
from migrate.errors import BlobError, DeviceRefused, FerryError, SchemaError
from migrate.memory.memfd import create_memfd
from migrate.state import blob, catalog
from migrate.state.lifecycle import PATHS, SAVING_GROUP, DeviceState
from migrate.testing.conformance import fields
from migrate.testing.conformance.process import Process
from migrate.testing.conformance.vmstate import FAIL, OK, WARN, Seen, damages, readable

_S = DeviceState
#: How long a device is watched while it stands still, s, and how long it works before.
_STILL, _WORK = 0.4, 0.2
_MEMORY: Final = 4 << 20


class Device1:
    """The run against one process. :ivar good: a blob of its own, saved in STOP."""

    def __init__(self, process: Process, info: DeviceInfo) -> None:
        self.process, self.client, self.info = process, process.client, info
        self.good = b""

    async def check(self) -> AsyncIterator[Seen]:
        yield self._properties()
        yield await self._quiesce()
        async for seen in self._stopped():
            yield seen
        if self.good:
            yield await self._arcs()
            yield await self._forbidden()
            yield await self._check_incoming()
            yield await self._stage()
            if not self.info.streams:
                yield await fields.survive(self.process, self.info, self.good)
        yield await self._tracking()
        yield await self._memory_still()
        yield await self._finish()

    # -- what it says of itself -----------------------------------------------------------------------------------------------

    def _properties(self) -> Seen:
        info = self.info
        wrong = ""
        if info.version not in info.readable or info.version not in info.writable:
            wrong = f"SchemaVersion {info.version} is not among what it reads {info.readable} and writes {info.writable}"
        elif not set(info.writable) <= set(info.readable):
            wrong = f"it writes {info.writable} and reads only {info.readable}: it could not take back its own state"
        elif info.state not in {str(state) for state in _S}:
            wrong = f"State is {info.state!r}"
        if wrong:
            return "device.properties", FAIL, wrong
        try:
            known = catalog.load(info.type).at(info.version)
        except SchemaError as error:
            return "device.properties", WARN, error.reason
        if known.digest != info.digest:
            return "device.properties", FAIL, f"{info.type} version {info.version} is defined otherwise here"
        return (
            "device.properties",
            OK,
            f"{info.type}, reads {_list(info.readable)}, writes {_list(info.writable)}, tracker {info.tracker}",
        )

    async def _go(self, state: DeviceState) -> str:
        return await self.client.set_state(state, timeout=self.process.timeout)

    async def _state(self) -> str:
        return (await self.client.info(timeout=self.process.timeout)).state

    async def _quiesce(self) -> Seen:
        try:
            for state in (_S.RUNNING, _S.RUNNING_P2P, _S.STOP, _S.RUNNING_P2P, _S.RUNNING, _S.STOP):
                await self._go(state)
                if (found := await self._state()) != state:
                    return "device.quiesce", FAIL, f"asked for {state}, it says {found}"
        except FerryError as error:
            return "device.quiesce", FAIL, error.reason
        return "device.quiesce", OK, "RUNNING, RUNNING_P2P, STOP, and back"

    # -- stopped --------------------------------------------------------------------------------------------------------------

    async def _stopped(self) -> AsyncIterator[Seen]:
        try:
            await self._go(_S.STOP)
            first = await self.client.save_as(self.info.version, timeout=self.process.timeout)
            before = await self.client.fingerprint(timeout=self.process.timeout)
            await asyncio.sleep(_STILL)
            second = await self.client.save_as(self.info.version, timeout=self.process.timeout)
            after = await self.client.fingerprint(timeout=self.process.timeout)
        except FerryError as error:
            yield "device.saved-still", FAIL, error.reason
            return
        self.good = first
        same = (first, before) == (second, after)
        yield (
            "device.saved-still",
            OK if same else FAIL,
            f"{len(first)} bytes, the same after {_STILL} s" if same else "it changes",
        )
        if self.info.streams:
            yield readable(first)
        lost = []
        for version in self.info.writable:
            try:
                data = await self.client.save_as(version, timeout=self.process.timeout)
                header = blob.header_of(data)
            except BlobError as error:
                lost.append(f"{version}: {error.reason}")
                continue
            except FerryError as error:
                yield "device.versions", FAIL, f"version {version}: {error.reason}"
                return
            if (header.version, header.instance) != (version, self.info.id):
                yield (
                    "device.versions",
                    FAIL,
                    f"asked for version {version}, it gave {header.version} of {header.instance!r}",
                )
                return
        text = f"not in this state: {'; '.join(lost)}" if lost else f"versions {_list(self.info.writable)}"
        yield "device.versions", WARN if lost else OK, text

    # -- states ---------------------------------------------------------------------------------------------------------------

    async def _reach(self, state: DeviceState) -> None:
        """From wherever it is. A session of loading ends by a state that is applied."""
        now = DeviceState(await self._state())
        if now is _S.RESUMING and state is not _S.RESUMING:
            await self._applied()
            now = _S.RESUMING
        if (now, state) not in PATHS:
            await self._go(_S.RUNNING)
        await self._go(state)

    async def _applied(self) -> None:
        await self.client.stage(self.good, timeout=self.process.timeout)
        if self.info.streams:
            raise DeviceRefused(
                "a state that is streamed cannot be put back by this run", remedy="start it anew"
            )
        await self.client.apply(timeout=self.process.timeout)

    async def _arcs(self) -> Seen:
        count = 0
        for current, target in PATHS:
            if current is target or (self.info.streams and _S.RESUMING in (current, target)):
                continue
            try:
                await self._reach(current)
                if current is _S.RESUMING:
                    await self._applied()
                await self._go(target)
                found = await self._state()
            except FerryError as error:
                return "device.arcs", FAIL, f"{current} to {target}: {error.reason}"
            if found != target:
                return "device.arcs", FAIL, f"{current} to {target}: it says {found}"
            count += 1
        try:
            await self._reach(_S.STOP)
        except FerryError as error:
            return "device.arcs", FAIL, f"back to STOP: {error.reason}"
        return "device.arcs", OK, f"{count} moves"

    async def _forbidden(self) -> Seen:
        forbidden = [
            (current, target)
            for current in _S
            for target in _S
            if (current, target) not in PATHS and _S.ERROR not in (current, target) and current is not target
        ]
        try:
            for current, target in [*forbidden, (_S.STOP, _S.ERROR), (_S.STOP, "WALKING")]:
                await self._reach(current)
                refused = await self.process.refuses(
                    self.client.set_state(target, timeout=self.process.timeout)
                )
                if not refused or await self._state() != current:
                    return (
                        "device.forbidden",
                        FAIL,
                        f"{current} to {target} is not refused, or leads somewhere",
                    )
                if current in SAVING_GROUP:
                    await self._go(_S.RUNNING)
            await self._go(_S.STOP)
        except FerryError as error:
            return "device.forbidden", FAIL, error.reason
        return "device.forbidden", OK, f"{len(forbidden) + 2} moves, all refused"

    # -- state in -------------------------------------------------------------------------------------------------------------

    async def _check_incoming(self) -> Seen:
        client, timeout = self.client, self.process.timeout
        try:
            before = await client.fingerprint(timeout=timeout)
            await client.check_incoming(self.good, timeout=timeout)
            for what, damaged, _ in damages(self.good):
                if not await self.process.refuses(client.check_incoming(damaged, timeout=timeout)):
                    return "device.checks", FAIL, f"it takes a blob with {what}"
            if await client.fingerprint(timeout=timeout) != before:
                return "device.checks", FAIL, "the state is another than before"
        except FerryError as error:
            return "device.checks", FAIL, error.reason
        return "device.checks", OK, "the good one taken, all bad ones refused, nothing touched"

    async def _stage(self) -> Seen:
        client, timeout = self.client, self.process.timeout
        if self.info.streams:
            return (
                "device.stages",
                WARN,
                "not tried: what it streams beside its blob cannot be put back by this run",
            )
        try:
            await self._go(_S.RESUMING)
            if not await self.process.refuses(client.apply(timeout=timeout)):
                return "device.stages", FAIL, "it applies what was never staged"
            for what, damaged, _ in damages(self.good):
                if not await self.process.refuses(client.stage(damaged, timeout=timeout)):
                    return "device.stages", FAIL, f"it stages a blob with {what}"
            await self._applied()
            await self._go(_S.STOP)
            if await client.save_as(self.info.version, timeout=timeout) != self.good:
                return "device.stages", FAIL, "applied, its state is another than the one that was loaded"
        except FerryError as error:
            return "device.stages", FAIL, error.reason
        return "device.stages", OK, "bad ones refused, the good one applied, and saved again to the byte"

    # -- memory and the end ---------------------------------------------------------------------------------------------------

    async def _tracking(self) -> Seen:
        if self.info.tracker == "none":
            return "device.tracking", OK, "it says that it writes no guest memory"
        if self.info.tracker not in ("scan", "log"):
            return (
                "device.tracking",
                WARN,
                f"its tracker is {self.info.tracker!r}: all of memory would have to be compared",
            )
        client, timeout = self.client, self.process.timeout
        try:
            await client.start_tracking(timeout=timeout)
            for _ in range(2):
                fd, _ = await client.collect_dirty(timeout=timeout)
                os.close(fd)
            await client.stop_tracking(timeout=timeout)
        except FerryError as error:
            return "device.tracking", FAIL, error.reason
        return "device.tracking", OK, f"by {self.info.tracker}: started, collected, stopped"

    async def _memory_still(self) -> Seen:
        """Let it work on memory of ours for a moment, stop it, and see that nothing changes there any more."""
        client, timeout = self.client, self.process.timeout
        fd = create_memfd("conformance", _MEMORY)
        try:
            try:
                await client.attach_memory(0, _MEMORY, fd, timeout=timeout)
            except FerryError as error:
                return "device.memory-still", WARN, f"not tried, it takes no memory now: {error.reason}"
            await self._go(_S.RUNNING)
            await asyncio.sleep(_WORK)
            await self._go(_S.STOP)
            before = os.pread(fd, _MEMORY, 0)
            await asyncio.sleep(_STILL)
            after = os.pread(fd, _MEMORY, 0)
        except FerryError as error:
            return "device.memory-still", FAIL, error.reason
        finally:
            os.close(fd)
        if before != after:
            at = next(at for at, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
            return "device.memory-still", FAIL, f"in STOP it wrote to guest address {at:#x}"
        return "device.memory-still", OK, f"nothing written in {_STILL} s of standing still"

    async def _finish(self) -> Seen:
        client, timeout = self.client, self.process.timeout
        try:
            for outcome in ("aborted", "completed"):
                await client.finish(outcome, timeout=timeout)
            if not await self.process.refuses(client.finish("perhaps", timeout=timeout)):
                return "device.finish", FAIL, "it takes the word 'perhaps'"
        except FerryError as error:
            return "device.finish", FAIL, error.reason
        return "device.finish", OK, "completed and aborted, and no other word"


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
