"""A QEMU that leaves: its own migration, relayed; its devices' states by us. The counterpart of qemu_in.py.

QEMU sends its memory by itself and stops its guest by itself, at pre-switchover, when what is left fits the limit that we give
it: our downtime limit less what saving, loading and committing were measured to cost. From there on it is as with every machine.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from migrate.coordinator.limits import RateLimit
from migrate.coordinator.outcome import RoundStats
from migrate.coordinator.pages_out import Sent
from migrate.coordinator.participants import Participants
from migrate.coordinator.transfer import Transfer
from migrate.errors import DeviceTimeout, FerryError, Phase, Reason
from migrate.memory import PAGE_SIZE
from migrate.protocol import frames
from migrate.qemu import facts as compared
from migrate.qemu.facts import Facts
from migrate.qemu.monitor import ENDED, MAX_DOWNTIME_MS, Qemu
from migrate.qemu.relay import RelayOut, back_of

T = TypeVar("T")

#: QEMU's last pass and its own devices' states, and the destination's word that it has loaded them, s.
LAST_PASS_SECONDS = 60.0
END_SECONDS = 10.0
PROGRESS_SECONDS = 0.25
#: The least downtime limit that QEMU is given, ms.
LEAST_MS = 1.0
#: Where a test waits for a pass, bytes/s.
HELD_RATE = 32 << 20


async def inspect(qemu: Qemu, parts: Participants) -> tuple[Facts, list[Reason]]:
    """What travels in the manifest, and every reason against moving this QEMU at all."""
    facts = await qemu.facts()
    parts.by_id[qemu.client.device].entry["options"] = facts.to_options()
    return facts, compared.against(facts, qemu.client.device)


def multifd_of(connections: int, most: int) -> int:
    """Connections beside QEMU's main one, of as many page channels as are wanted and as the destination takes."""
    return min(connections, most - 1) if connections > 1 else 0


@dataclass(slots=True)
class QemuTransfer(Transfer):
    qemu: Qemu
    facts: Facts
    limit: RateLimit  #: what was asked for, which may change at any time
    multifd: int
    relay: RelayOut = field(init=False)
    _broken: asyncio.Future[None] = field(init=False)
    _told: tuple[int, int] = (-1, -1)  #: the limits that QEMU was given

    def open(self, stack: AsyncExitStack, channels: Any) -> None:
        """Ready for QEMU to connect. Taken down by the stack."""
        loop = asyncio.get_running_loop()
        self._broken = loop.create_future()
        directory = tempfile.mkdtemp(prefix="ferry-")
        stack.callback(shutil.rmtree, directory, ignore_errors=True)

        def failed(error: FerryError) -> None:
            loop.call_soon_threadsafe(self._break, error)

        self.relay = RelayOut(Path(directory) / "out.sock", channels, failed)
        stack.push_async_callback(asyncio.to_thread, self.relay.close)
        self.link.pages = self._came_back

    def _break(self, error: FerryError) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)
            self._broken.exception()  # seen: whoever waits raises it again

    async def _came_back(self, header: frames.Header, body: bytes) -> None:
        await asyncio.to_thread(self.relay.take_back, *back_of(header, body))

    async def _unless_broken(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([task, self._broken], return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
            if not task.done():
                self._broken.result()
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # -- pre-copy ------------------------------------------------------------------------------------------------------------

    async def precopy(self) -> None:
        """Until QEMU has stopped its guest. :raises NotConvergingError: if it never will."""
        gc.freeze()
        await self.link.during(self._rehearse(self.policy))
        self._unless_hopeless(self.policy.decide(0, 0.0))  # QEMU knows nothing of what its devices cost
        self.relay.start()
        downtime, bandwidth = self._limits(0)
        await self.qemu.outgoing(self.facts, self.relay.path, self.multifd, downtime, bandwidth)
        self._told = (downtime, bandwidth)
        await self.link.during(self._unless_broken(self._passes()))

    def _limits(self, number: int) -> tuple[int, int]:
        """For QEMU, ms and bytes/s. The least before its first pass has ended; but never nothing: QEMU 7.2 then looks for dirty
        pages no more, and stops the guest with all of them left."""
        own, rate = max(self.policy.limit_ms - self.policy.overhead_ms, LEAST_MS), self.limit.rate
        if number < 1:
            own = LEAST_MS
        if self.hold.wants_round_after(number):  # for tests: slowly enough that none is missed
            own, rate = LEAST_MS, min(rate or HELD_RATE, HELD_RATE)
        return int(min(own, MAX_DOWNTIME_MS)), int(rate)

    async def _tell(self, limits: tuple[int, int]) -> None:
        if limits != self._told:
            await self.qemu.limit(downtime_ms=limits[0], bandwidth=limits[1])
            self._told = limits

    async def _passes(self) -> None:
        number, began, base = 0, time.monotonic(), 0
        left: dict[str, int] = {}
        told_at = 0.0
        while True:
            now = await self.qemu.progress()
            if now.status == "pre-switchover":
                if sent := self.relay.sent_bytes - base:
                    seconds = time.monotonic() - began
                    self._account(
                        RoundStats(number + 1, sent // PAGE_SIZE, sent, seconds, now.dirty_rate), sent
                    )
                return
            if now.status in ENDED:
                raise self.qemu.failed(now, Phase.PRECOPY)
            if now.passes - 1 > number:  # QEMU counts the look before the first pass, too
                number, sent = now.passes - 1, self.relay.sent_bytes - base
                streamed = await self._send_chunks(left, Phase.PRECOPY)
                stats = RoundStats(number, sent // PAGE_SIZE, sent, time.monotonic() - began, now.dirty_rate)
                began, base = time.monotonic(), base + sent
                self._account(stats, sent)
                self.policy.sent(sent + streamed, stats.seconds)
                if self.hold.waits_at(f"round:{number}"):
                    await self._tell((int(LEAST_MS), HELD_RATE // 256))  # it would converge while we wait
                await self._enough(stats, now.remaining + sum(left.values()))
            elif time.monotonic() - told_at > PROGRESS_SECONDS:
                told_at, sent = time.monotonic(), self.relay.sent_bytes - base
                self.emit({"event": "progress", "n": number + 1, "sent": sent, "remaining": now.remaining})
            await self._tell(self._limits(number))
            await self.qemu.changed()

    # -- the last pass -------------------------------------------------------------------------------------------------------

    async def stopped_since(self, began_ns: int) -> int:
        return min(self.qemu.stopped_ns or began_ns, began_ns)

    async def _last_pages(self, number: int) -> Sent:
        return await self._unless_broken(self._finish())

    async def _finish(self) -> Sent:
        start = time.monotonic()
        before = self.relay.sent_bytes
        self.relay.guest_stopped()
        await self.qemu.proceed()
        await self.qemu.until({"completed"}, seconds=LAST_PASS_SECONDS, phase=Phase.SAVE)
        if not await asyncio.to_thread(self.relay.ended.wait, END_SECONDS):
            raise DeviceTimeout(
                f"QEMU has completed its migration and not closed its channel within {END_SECONDS:g} s",
                device=self.qemu.client.device,
                phase=Phase.SAVE,
                remedy="see its log",
            )
        pages = (self.relay.sent_bytes - before) // PAGE_SIZE
        return Sent(pages, time.monotonic() - start, tuple(self.relay.digests))

    async def before_commit(self) -> None:
        await self.qemu.check_committable()
