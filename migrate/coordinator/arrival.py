"""What arrives before READY: rounds, chunks, a rehearsal, blobs; then all of it is validated, and all of it applied.

Used by destination.py once a machine was accepted; knows no ledger and no COMMIT. The counterpart of transfer.py.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from dataclasses import dataclass, field
from typing import Protocol

from migrate.coordinator.hold import Hold
from migrate.coordinator.link import Link
from migrate.coordinator.outcome import Emit
from migrate.coordinator.participants import Participants, Times
from migrate.errors import Phase, RemoteProtocolError
from migrate.memory import GuestMemory
from migrate.protocol import messages as m

#: A source between two messages of pre-copy; its pings tell of its life, so this bounds only a confused one.
PATIENCE = 3600.0
ROUND_SECONDS = 600.0
BLOCK = 1 << 20


class Receiver(Protocol):
    """Where memory arrives: PageReceiver's threads, or QEMU by its relay."""

    async def round_ended(self, number: int) -> tuple[bytes, ...]:
        """Everything of that round is there; the digest of each channel, where it was the last."""

    async def close(self) -> None: ...


@dataclass(slots=True)
class Arrival:
    """One machine's way in, from the first round to where READY can be said."""

    parts: Participants
    link: Link
    memory: GuestMemory
    pages: Receiver
    versions: dict[str, int]  #: what was agreed that the source writes, by participant
    emit: Emit
    hold: Hold
    began: int = 0  #: monotonic ns of STOPPED's arrival; what was staged before that cost the source no time
    _blobs: dict[str, bytes] = field(default_factory=dict)
    _staging: list[asyncio.Future[None]] = field(
        default_factory=list
    )  #: participants that validate their blobs
    _writing: asyncio.Future[None] | None = None  #: the last chunk, on its way into its device

    async def rounds(self) -> m.Stopped:
        """Everything up to STOPPED."""
        gc.freeze()  # no collection walks what is there by now, least of all while the machine stands still
        while True:
            message = await self.link.receive(timeout=PATIENCE)
            if isinstance(message, m.Round):
                await self.link.during(
                    self.pages.round_ended(message.n), timeout=ROUND_SECONDS, what="the end of the round"
                )
                await self._chunk_written()
                await self.link.send(m.RoundDone(message.n))
                self.emit({"event": "round", "n": message.n, "pages": message.pages})
                await self.hold.at(f"round:{message.n}")
            elif isinstance(message, m.Chunk):
                self._require_device(message.device)
                await self._chunk_written()  # one at a time: what is held is bounded
                self._writing = asyncio.ensure_future(self.parts.write_chunk(message.device, message.data))
            elif isinstance(message, m.Rehearse):
                await self._rehearse(message)
            elif isinstance(message, m.State):
                self._require_device(message.device)
                if message.device in self._blobs:
                    raise RemoteProtocolError("its state came twice", phase=Phase.LOAD, device=message.device)
                self._blobs[message.device] = message.blob
                self._staging.append(asyncio.ensure_future(self.parts.stage(message.device, message.blob)))
            elif isinstance(message, m.Stopped):
                self.began = time.monotonic_ns()
                return message
            else:
                raise RemoteProtocolError(f"{message.name} during pre-copy", phase=Phase.PRECOPY)

    def _require_device(self, device: str) -> None:
        if device not in self.parts.by_id:
            raise RemoteProtocolError(
                f"state came for {device[:40]!r}, which is not in the manifest", phase=Phase.LOAD
            )

    async def _rehearse(self, message: m.Rehearse) -> None:
        for device in message.blobs:
            self._require_device(device)
        times, reasons = await self.parts.check(message.blobs)
        # Applying comes on top of checking; what it costs is seen at READY, so the check is counted twice.
        loads = {name: 2 * ns for name, ns in times.devices.items()}
        await self.link.send(m.Rehearsed(loads, int(self.parts.description["sync_ns"]), tuple(reasons)))

    async def load(self, stopped: m.Stopped) -> Times:
        """Validate all, then apply all.

        :raises FerryError: naming what arrived damaged, or the participant that refuses; it is then known why.
        """
        digests = await self.link.during(
            self.pages.round_ended(stopped.n), timeout=ROUND_SECONDS, what="the end of the last pass"
        )
        check_arrival(stopped, digests, self._blobs, [member.id for member in self.parts.carried])
        await self.link.during(self._all_staged())  # all are valid before one is applied
        return await self.link.during(self.parts.apply(self._blobs))

    async def _chunk_written(self) -> None:
        """:raises FerryError: the device's, that refuses it."""
        if self._writing is not None:
            await self._writing

    async def _all_staged(self) -> None:
        """:raises FerryError: the first participant's refusal, once all have answered."""
        await self._chunk_written()
        results = await asyncio.gather(*self._staging, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def verify(self, message: m.Verify) -> m.Verified:
        """Compare the source's digests with ours, and what its devices saved with what ours save before they run."""
        mine, prints, (saved, _) = await asyncio.gather(
            asyncio.to_thread(self.memory.digest_blocks, BLOCK),
            self.parts.fingerprints(self.versions),
            self.parts.save(self.versions, phase=Phase.LOAD),
        )
        theirs = [message.blocks[low : low + 32] for low in range(0, len(message.blocks), 32)]
        differing = [
            index for index, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]
        ]
        count = len(differing) + abs(len(mine) - len(theirs))
        devices = [
            name
            for name in self.parts.by_id
            if saved.get(name) != self._blobs.get(name) or prints.get(name) != message.devices.get(name)
        ]
        return m.Verified(count, tuple(differing[:16]), tuple(devices))

    async def close(self) -> None:
        """Nothing of this is wanted any more."""
        waited = [*self._staging, *([self._writing] if self._writing else [])]
        for each in waited:
            each.cancel()
        await asyncio.gather(*waited, return_exceptions=True)


def check_arrival(
    stopped: m.Stopped, digests: tuple[bytes, ...], blobs: dict[str, bytes], devices: list[str]
) -> None:
    """Is what came what was sent?

    :raises RemoteProtocolError: naming the channel or the device that differs.
    """
    remedy = "the link damages data, or the peer is not vmferry; nothing was lost"
    if digests != stopped.channels:
        raise RemoteProtocolError("the last pages arrived damaged", phase=Phase.LOAD, remedy=remedy)
    for device in devices:
        if device not in blobs:
            raise RemoteProtocolError(
                "its state did not come", phase=Phase.LOAD, device=device, remedy=remedy
            )
        if stopped.blobs.get(device) != hashlib.sha256(blobs[device]).digest():
            raise RemoteProtocolError(
                "its state arrived damaged", phase=Phase.LOAD, device=device, remedy=remedy
            )
