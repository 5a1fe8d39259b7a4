"""The participants of one machine as a coordinator sees them: what they say of themselves, and what is asked of all at once."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from migrate.bus import Bus, DeviceClient, DeviceInfo, discover
from migrate.bus.qemu import QemuClient
from migrate.bus.supervisor import SupervisorClient
from migrate.errors import DeviceGone, Phase, Reason
from migrate.machine.config import VCPU_ID
from migrate.memory import DirtyBitmap, GuestMemory, read_sealed, sealed_bytes
from migrate.protocol.messages import MAX_CHUNK, DeviceEntry, DiskEntry
from migrate.state import DeviceState

T = TypeVar("T")

#: The schema of a QEMU as a machine's vCPU.
QEMU_TYPE = "qemu"
#: Rounds take at most this much of a device's stream, so that one that is rewritten all the time ends them too.
STREAM_ROUND_BYTES = 256 << 20


@dataclass(slots=True)
class Member:
    entry: dict[str, Any]  #: what the supervisor says of it
    client: DeviceClient
    info: DeviceInfo

    @property
    def id(self) -> str:
        return self.info.id

    def to_entry(self, tokens: Mapping[tuple[str, str], str]) -> DeviceEntry:
        """Its line in the manifest. Of a disk only the file's name travels."""
        info, entry = self.info, self.entry
        disks = [
            DiskEntry(
                disk.option,
                os.path.basename(entry["images"][disk.option]),
                disk.size,
                disk.read_only,
                tokens.get((info.id, disk.option), ""),
            )
            for disk in info.disks
            if disk.option in entry["images"]
        ]
        return DeviceEntry(
            id=info.id,
            type=entry["type"] if info.opaque else info.type,
            protocol=entry["protocol"],
            versions=info.writable,
            digest=info.digest,
            tracker=tracker_of(self),
            opaque=info.opaque,
            gpa=entry["gpa"],
            irq=entry["irq"],
            vectors=entry["vectors"],
            options=entry["options"],
            disks=tuple(disks),
        )


def tracker_of(member: Member) -> str:
    """How writes of this participant to guest memory are seen: scan, log, none, compare or (then it is refused) untracked."""
    if member.info.tracker in ("scan", "log", "none"):
        return member.info.tracker
    return "compare" if member.entry["tracker"] == "compare" else "untracked"


@dataclass(slots=True)
class Times:
    """Of one operation on all participants, ns."""

    total_ns: int = 0
    devices: dict[str, int] = field(default_factory=dict)


class Participants:
    """All of a machine's participants, on its private bus."""

    def __init__(
        self, bus: Bus, supervisor: SupervisorClient, description: dict[str, Any], members: list[Member]
    ):
        self.bus = bus
        self.supervisor = supervisor
        self.description = description
        self.members = members
        self.by_id = {member.id: member for member in members}
        vcpu = self.by_id.get(VCPU_ID)
        #: The QEMU of a machine whose VMM is one.
        self.qemu = (
            QemuClient(bus, vcpu.client.unique_name, VCPU_ID)
            if vcpu is not None and vcpu.entry["type"] == QEMU_TYPE
            else None
        )
        #: Devices' states go by QEMU's dbus-vmstate, as machine.toml asks; QEMU itself is still told by us.
        self.by_qemu = description.get("qemu") == "qemu"

    @classmethod
    async def find(cls, bus: Bus) -> Participants:
        """:raises DeviceGone: naming a configured participant that is not on the bus."""
        supervisor = SupervisorClient(bus)
        description, found = await asyncio.gather(supervisor.describe(), discover(bus))
        members = []
        for entry in description["devices"]:
            if entry["id"] not in found:
                raise DeviceGone(
                    "it is not on the machine's bus",
                    device=entry["id"],
                    phase=Phase.PREFLIGHT,
                    remedy="see its log",
                )
            client = found[entry["id"]]
            members.append(Member(entry, client, await client.info(phase=Phase.PREFLIGHT)))
        return cls(bus, supervisor, description, members)

    def blame(self, detail: str) -> tuple[str | None, str]:
        """A machine's detail as its supervisor words it, parted: the participant that it begins with, or None, and the rest."""
        name, _, rest = detail.partition(": ")
        return (name, rest) if name in self.by_id else (None, detail)

    @property
    def carried(self) -> list[Member]:
        """Those whose blobs go by us. QEMU's dbus-vmstate takes neither QEMU's own nor what streams."""
        return [m for m in self.members if not self.by_qemu or m.id == VCPU_ID or m.info.streams]

    async def map_memory(self) -> GuestMemory:
        """The machine's memory, mapped here; the caller closes it."""
        memory = GuestMemory()
        if not self.description["mapped"]:
            return memory  # an adopted QEMU's own
        try:
            for index in range(len(self.description["regions"])):
                gpa, size, fd, offset = await self.supervisor.region(index)
                try:
                    memory.attach(gpa, size, fd, offset)  # type: ignore[arg-type]
                finally:
                    os.close(fd)
        except BaseException:
            memory.close()
            raise
        return memory

    # -- dirty pages -----------------------------------------------------------------------------------------------------

    def trackers(self) -> list[Member]:
        return [member for member in self.members if tracker_of(member) in ("scan", "log")]

    def needs_compare(self) -> list[str]:
        return [member.id for member in self.members if tracker_of(member) == "compare"]

    async def start_tracking(self) -> None:
        await self._each(self.trackers(), lambda member: member.client.start_tracking(phase=Phase.PRECOPY))

    async def collect(self, into: DirtyBitmap, *, phase: Phase = Phase.PRECOPY) -> None:
        """Every tracker's bitmap, got and cleared, ORed into `into`."""

        async def one(member: Member) -> None:
            fd, _ = await member.client.collect_dirty(phase=phase)
            try:
                into.or_bytes(read_sealed(fd, into.nbytes, limit=into.nbytes))
            finally:
                os.close(fd)

        await self._each(self.trackers(), one)

    # -- blobs -----------------------------------------------------------------------------------------------------------

    async def save(
        self, versions: dict[str, int], *, phase: Phase, everybody: bool = False
    ) -> tuple[dict[str, bytes], Times]:
        """Every participant's blob, at the version that the destination reads.

        :param everybody: also of those whose blobs go by QEMU: for a rehearsal.
        """
        blobs: dict[str, bytes] = {}
        members = self.members if everybody else self.carried

        async def one(member: Member) -> None:
            if member.info.opaque:
                blobs[member.id] = await member.client.save(phase=phase)
            else:
                blobs[member.id] = await member.client.save_as(versions[member.id], phase=phase)

        times = await self._timed(members, one)
        return {member.id: blobs[member.id] for member in members}, times

    async def check(self, blobs: dict[str, bytes]) -> tuple[Times, list[Reason]]:
        """Would these load? All reasons against it; nothing is touched."""
        reasons: list[Reason] = []

        async def one(member: Member) -> None:
            if not member.info.opaque:
                await member.client.check_incoming(blobs[member.id], phase=Phase.LOAD)

        known = [member for member in self.members if member.id in blobs]
        times = await self._timed(known, one, reasons)
        return times, reasons

    async def stage(self, device: str, blob: bytes) -> None:
        """Give a participant its blob to validate and keep. An opaque one can only load it, which comes last."""
        member = self.by_id[device]
        if not member.info.opaque:
            await member.client.stage(blob, phase=Phase.LOAD)

    async def apply(self, blobs: dict[str, bytes]) -> Times:
        """All apply what they staged and stop; opaque ones load. The first failure is raised when all have answered."""

        async def one(member: Member) -> None:
            if member.id not in blobs:
                if not member.info.opaque:  # QEMU has loaded it
                    await member.client.set_state(DeviceState.STOP, phase=Phase.LOAD)
            elif member.info.opaque:
                await member.client.load(blobs[member.id], phase=Phase.LOAD)
            else:
                # Not waited for between the two: calls reach a participant in order, and without a state STOP is refused.
                await asyncio.gather(
                    member.client.apply(phase=Phase.LOAD),
                    member.client.set_state(DeviceState.STOP, phase=Phase.LOAD),
                )

        return await self._timed(self.members, one)

    async def fingerprints(self, versions: Mapping[str, int]) -> dict[str, bytes]:
        """SHA-256 of each participant's whole state in the version that was agreed on; opaque ones cannot tell."""
        found: dict[str, bytes] = {}

        async def one(member: Member) -> None:
            found[member.id] = await member.client.fingerprint(versions.get(member.id, 0), phase=Phase.LOAD)

        await self._each((member for member in self.members if not member.info.opaque), one)
        return found

    # -- streams ---------------------------------------------------------------------------------------------------------

    def streaming(self) -> list[Member]:
        return [member for member in self.members if member.info.streams]

    async def start_streams(self) -> None:
        """Into PRE_COPY; of a paused machine into STOP_COPY, for nothing of it may run because it is looked at."""
        paused = self.description["state"] == "paused"
        state = DeviceState.STOP_COPY if paused else DeviceState.PRE_COPY
        await self._each(self.streaming(), lambda member: member.client.set_state(state, phase=Phase.PRECOPY))

    async def chunks(self, left: dict[str, int], *, phase: Phase) -> AsyncIterator[tuple[str, bytes]]:
        """What streams have now, chunk by chunk; `left` is kept up to date, bytes by device. After the stop, all of it."""
        most = STREAM_ROUND_BYTES if phase is Phase.PRECOPY else sys.maxsize
        for member in self.streaming():
            taken = 0
            while taken < most:
                fd, size, remaining = await member.client.stream_read(MAX_CHUNK, phase=phase)
                try:
                    left[member.id] = remaining
                    if not size:
                        break
                    data = read_sealed(fd, size, limit=MAX_CHUNK + 65536)
                finally:
                    os.close(fd)
                taken += size
                yield member.id, data
                if not remaining:
                    break

    async def write_chunk(self, device: str, data: bytes) -> None:
        fd = sealed_bytes(data, "chunk")
        try:
            await self.by_id[device].client.stream_write(fd, len(data), phase=Phase.LOAD)
        finally:
            os.close(fd)

    # -- all at once -----------------------------------------------------------------------------------------------------

    async def _timed(
        self,
        members: Iterable[Member],
        action: Callable[[Member], Awaitable[None]],
        reasons: list[Reason] | None = None,
    ) -> Times:
        times = Times()

        async def one(member: Member) -> None:
            start = time.monotonic_ns()
            await action(member)
            times.devices[member.id] = time.monotonic_ns() - start

        start = time.monotonic_ns()
        await self._each(members, one, reasons)
        times.total_ns = time.monotonic_ns() - start
        return times

    async def _each(
        self,
        members: Iterable[Member],
        action: Callable[[Member], Awaitable[Any]],
        reasons: list[Reason] | None = None,
    ) -> None:
        """All at once, every one waited for. Failures go into `reasons`, or the first of them is raised."""
        results = await asyncio.gather(*(action(member) for member in members), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                if reasons is None or not hasattr(result, "as_reason"):
                    raise result
                reasons.append(result.as_reason())
