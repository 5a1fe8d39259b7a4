"""What moves while the source decides nothing: pre-copy, the last pass of a machine that stands still, verification.

Used by source.py once both sides have agreed; knows no ledger and no COMMIT. `Transfer` is what is the same for every VMM,
`PageTransfer` moves memory that is ours, round by round; QEMU moves its own (qemu_out.py).
"""

from __future__ import annotations

import asyncio
import gc
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from migrate.coordinator.convergence import Convergence, Decision, Verdict
from migrate.coordinator.hold import Hold
from migrate.coordinator.kept import Kept
from migrate.coordinator.link import Link, PeerRejected
from migrate.coordinator.outcome import Emit, Outcome, RoundStats
from migrate.coordinator.pages_out import PageSender, Sent
from migrate.coordinator.participants import Participants, Times
from migrate.errors import NotConvergingError, Phase, Reason
from migrate.memory import PAGE_SIZE, DirtyBitmap, GuestMemory
from migrate.protocol import messages as m

#: Deadlines of answers, s.
ROUND_SECONDS = 600.0
READY_SECONDS = 60.0
VERIFY_SECONDS = 600.0


@dataclass(slots=True)
class Transfer(ABC):
    """One migration's road, from the first byte to READY."""

    parts: Participants
    link: Link
    memory: GuestMemory
    versions: dict[str, int]  #: what the destination reads, by participant
    policy: Convergence
    outcome: Outcome
    emit: Emit
    hold: Hold
    kept: Kept

    @abstractmethod
    async def precopy(self) -> None:
        """Until what is left fits the downtime limit. :raises NotConvergingError: if it never will."""

    @abstractmethod
    async def _last_pages(self, number: int) -> Sent: ...

    async def stopped_since(self, began_ns: int) -> int:
        """When the guest stopped, monotonic ns, where its VMM did so before the supervisor began to stop the machine."""
        return began_ns

    @abstractmethod
    async def before_commit(self) -> None:
        """Is everything true that COMMIT needs beside READY? :raises FerryError: it is not."""

    def _account(self, stats: RoundStats, sent_bytes: int) -> None:
        self.outcome.rounds.append(stats)
        self.outcome.ram_bytes_sent += sent_bytes

    async def _enough(self, stats: RoundStats, remaining: int) -> bool:
        """Tell of a round, and decide by what it left (bytes): True to stop the guest now.

        :raises NotConvergingError: it never will be enough.
        """
        number, policy = stats.n, self.policy
        decision = policy.decide(remaining, stats.dirty_rate)
        self.emit(
            {
                "event": "round", "n": number, "pages": stats.pages, "bytes": stats.bytes,
                "seconds": round(stats.seconds, 6), "dirty_rate": round(stats.dirty_rate),
                "send_rate": round(policy.rate), "remaining": remaining,
                "expected_downtime_ms": round(decision.expected_downtime_ms, 3),
            }
        )  # fmt: skip
        await self.link.during(self.hold.at(f"round:{number}"))
        self._unless_hopeless(decision)
        if decision.why:
            self.emit({"event": "warning", "warning": decision.why})
        return decision.verdict is Verdict.SWITCH_OVER and not self.hold.wants_round_after(number)

    def _unless_hopeless(self, decision: Decision) -> None:
        if decision.verdict is Verdict.GIVE_UP:
            policy = self.policy
            raise NotConvergingError(
                decision.why,
                phase=Phase.PRECOPY,
                device=policy.slowest if policy.overhead_ms > policy.limit_ms else None,
                remedy="raise --downtime, add --connections, or slow the guest down",
            )

    async def _send_chunks(self, left: dict[str, int], phase: Phase) -> int:
        size = 0
        async for device, data in self.parts.chunks(left, phase=phase):
            await self.link.send(m.Chunk(device, data))
            self.kept.chunk(device, data)
            size += len(data)
        return size

    async def _rehearse(self, policy: Convergence) -> None:
        """Save the running devices and let the destination check the blobs: what a load would refuse is known before the
        stop, and what saving, loading and committing cost is measured."""
        blobs, saves = await self.parts.save(self.versions, phase=Phase.PRECOPY, everybody=True)
        await self.link.send(m.Rehearse(blobs))
        answer = await self.link.expect(m.Rehearsed, timeout=READY_SECONDS)
        if answer.reasons:
            raise PeerRejected(answer.reasons)
        own_commit = int(self.parts.description["sync_ns"])
        loads = max(answer.load_ns.values(), default=0)
        policy.overhead_ms = (
            saves.total_ns + loads + own_commit + answer.commit_ns + 3 * self.link.round_trip_ns
        ) / 1e6  # READY, COMMIT and RUNNING each cross once
        both = {name: ns + answer.load_ns.get(name, 0) for name, ns in saves.devices.items()}
        policy.slowest = max(both, key=both.__getitem__, default=None)

    # -- the last pass -----------------------------------------------------------------------------------------------------

    async def last_pass(self, number: int) -> tuple[tuple[dict[str, bytes], Times], Sent]:
        """The last pages, chunks and blobs of a machine that stands still; each goes as soon as it is there, then STOPPED."""
        start = time.monotonic()
        pages = asyncio.ensure_future(self._last_pages(number))
        chunks = asyncio.ensure_future(self._send_chunks({}, Phase.SAVE))
        try:
            saved = await self.parts.save(self.versions, phase=Phase.SAVE)
            for device, blob in saved[0].items():
                await self.link.send(m.State(device, blob))
            sent, _ = await asyncio.gather(pages, chunks)
        finally:
            pages.cancel()
            chunks.cancel()
            await asyncio.gather(pages, chunks, return_exceptions=True)
        self._account(RoundStats(number, sent.pages, sent.size, time.monotonic() - start, 0.0), sent.size)
        return saved, sent

    async def verify(self) -> int:
        """Compare all of both memories and all device state while both are stopped. Answers with the ns it took."""
        start = time.monotonic_ns()
        blocks, prints = await asyncio.gather(
            asyncio.to_thread(self.memory.digest_blocks), self.parts.fingerprints(self.versions)
        )
        await self.link.send(m.Verify(b"".join(blocks), prints))
        answer = await self.link.expect(m.Verified, timeout=VERIFY_SECONDS)
        self.outcome.verified_ram = answer.differing == 0
        self.outcome.verified_devices = not answer.devices
        if answer.differing or answer.devices:
            where = ", ".join(f"{block} MiB" for block in answer.first)
            raise PeerRejected(
                (
                    Reason(
                        answer.devices[0] if answer.devices else None,
                        str(Phase.LOAD),
                        f"verification failed: {answer.differing} blocks of memory differ"
                        + (f" (at {where})" if where else "")
                        + (f", and the state of {', '.join(answer.devices)}" if answer.devices else ""),
                        "nothing was lost, the machine runs on here; report this with both logs",
                    ),
                )
            )
        return time.monotonic_ns() - start


@dataclass(slots=True)
class PageTransfer(Transfer):
    """Memory that is ours: rounds of what its writers have dirtied, over the page channels."""

    sender: PageSender
    dirty: DirtyBitmap  #: what is to be sent

    async def precopy(self) -> None:
        """Rounds until what is left fits the downtime limit; `dirty` then holds what is left.

        :raises NotConvergingError: if it never will.
        """
        gc.freeze()  # no collection walks what is there by now, least of all while the machine stands still
        policy, dirty = self.policy, self.dirty
        left: dict[str, int] = {}
        number = 0
        collected = time.monotonic()
        while True:
            number += 1
            stats, collected = await self.link.during(self._round(number, dirty, left, policy, collected))
            if number == 1:
                await self.link.during(self._rehearse(policy))
            if await self._enough(stats, dirty.count() * PAGE_SIZE + sum(left.values())):
                return

    async def _round(
        self, number: int, dirty: DirtyBitmap, left: dict[str, int], policy: Convergence, collected: float
    ) -> tuple[RoundStats, float]:
        """Send what `dirty` holds, then collect what was written meanwhile into it."""
        start = time.monotonic()
        pages_before = dirty.take()
        progress = asyncio.create_task(self._progress(number, pages_before.count() * PAGE_SIZE))
        try:
            sent = await self.sender.send_round(number, pages_before)
            streamed = await self._send_chunks(left, Phase.PRECOPY)
            await self.link.send(m.Round(number, sent.pages))
            await self.link.expect(m.RoundDone, timeout=ROUND_SECONDS)
        finally:
            progress.cancel()
        seconds = time.monotonic() - start
        policy.sent(sent.size + streamed, seconds)
        await self._collect(dirty, Phase.PRECOPY)
        now = time.monotonic()
        stats = RoundStats(
            number, sent.pages, sent.size, seconds, dirty.count() * PAGE_SIZE / max(now - collected, 1e-9)
        )
        self._account(stats, sent.size)
        return stats, now

    async def _collect(self, dirty: DirtyBitmap, phase: Phase) -> None:
        """What every tracker has seen since it was last asked, ORed into `dirty`."""
        await self.parts.collect(dirty, phase=phase)
        if self.sender.compare is not None:
            await asyncio.to_thread(self.sender.compare.collect, dirty)

    async def _progress(self, number: int, size: int) -> None:
        base = self.sender.sent_bytes
        while True:
            await asyncio.sleep(0.25)
            done = self.sender.sent_bytes - base
            self.emit({"event": "progress", "n": number, "sent": done, "remaining": max(0, size - done)})

    async def before_commit(self) -> None:
        """Nothing beside READY: what stops this machine is the supervisor alone."""

    async def _last_pages(self, number: int) -> Sent:
        await self._collect(self.dirty, Phase.SAVE)
        return await self.sender.send_round(number, self.dirty, last=True)
