"""The coordinator's side of docs/dbus/*.xml: one typed client a participant, and finding all participants of a machine.

A participant is another process: what it answers is checked before it is used, and every error names it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from migrate.bus import library
from migrate.bus.connection import Bus
from migrate.bus.device import DEVICE, MAX_BLOB, PATH, VMSTATE, Disk
from migrate.errors import DeviceGone, DeviceRefused, DeviceTimeout, Phase

#: Seconds that a participant may take for each method, unless the caller says otherwise. Those that are called while the
#: machine stands still are bounds for a process in trouble; a healthy one needs milliseconds.
DEADLINES: Final[Mapping[str, float]] = MappingProxyType(
    {
        "GetAll": 2.0,
        "Ping": 2.0,
        "Save": 5.0,
        "Load": 5.0,
        "AttachMemory": 5.0,
        "SetState": 5.0,
        "StartTracking": 5.0,
        "CollectDirty": 5.0,
        "StopTracking": 5.0,
        "SaveAs": 5.0,
        "CheckIncoming": 5.0,
        "Stage": 5.0,
        "Apply": 5.0,
        "StreamRead": 10.0,
        "StreamWrite": 10.0,
        "Fingerprint": 30.0,  # reads the whole state, streamed part included
        "ReleaseLocks": 5.0,
        "Serving": 5.0,
        "Finish": 5.0,
    }
)

_PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_PEER: Final = "org.freedesktop.DBus.Peer"
_MAX_ID: Final = 255
_MAX_VERSIONS: Final = 1000
_MAX_DISKS: Final = 8
_DIGEST: Final = 32


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a participant says about itself. An opaque one (org.qemu.VMState1 only) says nothing beyond its Id."""

    id: str
    unique_name: str
    pid: int
    opaque: bool
    type: str = ""
    version: int = 0
    readable: tuple[int, ...] = ()
    writable: tuple[int, ...] = ()
    digest: bytes = b""
    state: str = ""
    tracker: str = ""
    streams: bool = False
    disks: tuple[Disk, ...] = ()
    obstacle: str = ""  #: why it cannot be moved, where it cannot


class DeviceClient:
    """One participant. Every method may raise DeviceTimeout, DeviceGone, DeviceRefused, and the error of migrate.errors that
    the device raised; each carries the device's Id and `phase`. `timeout` (seconds) defaults to DEADLINES.

    An opaque participant has ping, info, save and load; the rest is refused without asking it.
    """

    def __init__(self, bus: Bus, unique_name: str, device_id: str, opaque: bool = False) -> None:
        self.bus = bus
        self.unique_name = unique_name
        self.id = device_id
        self.opaque = opaque

    def __repr__(self) -> str:
        return f"DeviceClient({self.id!r}, {self.unique_name!r}, opaque={self.opaque})"

    async def ping(self, *, timeout: float | None = None, phase: Phase | str | None = None) -> None:
        """Whether its event loop runs: answered without the device being asked."""
        await self._call(_PEER, "Ping", "", (), "", timeout, phase)

    async def info(self, *, timeout: float | None = None, phase: Phase | str | None = None) -> DeviceInfo:
        """What it says about itself now. DeviceRefused where that is not what the interface promises."""
        if self.opaque:
            await self.ping(timeout=timeout, phase=phase)
            return DeviceInfo(self.id, self.unique_name, await self.bus.pid_of(self.unique_name), True)
        (found,), pid = await asyncio.gather(
            self._call(_PROPERTIES, "GetAll", "s", (DEVICE,), "a{sv}", timeout, phase),
            self.bus.pid_of(self.unique_name),
        )

        def read(name: str, kind: type, longest: int = 255) -> Any:
            value = found.get(name)
            if not isinstance(value, kind) or (
                isinstance(value, (str, bytes, list)) and len(value) > longest
            ):
                raise self._refused(f"its property {name} is missing or not what {DEVICE} promises", phase)
            return value

        digest = read("SchemaDigest", bytes, _DIGEST)
        return DeviceInfo(
            id=self.id,
            unique_name=self.unique_name,
            pid=pid,
            opaque=False,
            type=read("Type", str),
            version=read("SchemaVersion", int),
            readable=tuple(read("ReadableVersions", list, _MAX_VERSIONS)),
            writable=tuple(read("WritableVersions", list, _MAX_VERSIONS)),
            digest=digest,
            state=read("State", str),
            tracker=read("Tracker", str),
            streams=read("Streams", bool),
            disks=tuple(self._disk(item, phase) for item in read("Disks", list, _MAX_DISKS)),
            obstacle=read("Obstacle", str) if "Obstacle" in found else "",
        )

    def _disk(self, item: Any, phase: Phase | str | None) -> Disk:
        option, size, read_only = (item.get(key) for key in ("option", "size", "read_only"))
        if not isinstance(option, str) or not isinstance(size, int) or not isinstance(read_only, bool):
            raise self._refused(f"its property Disks is not what {DEVICE} promises", phase)
        return Disk(option, size, read_only)

    async def save(self, *, timeout: float | None = None, phase: Phase | str | None = None) -> bytes:
        """org.qemu.VMState1.Save: an atomic snapshot; the device goes on."""
        (data,) = await self._call(VMSTATE, "Save", "", (), "ay", timeout, phase)
        return self._blob(data, phase)

    async def load(
        self, data: bytes, *, timeout: float | None = None, phase: Phase | str | None = None
    ) -> None:
        await self._call(VMSTATE, "Load", "ay", (self._blob(data, phase),), "", timeout, phase)

    async def attach_memory(
        self,
        gpa: int,
        size: int,
        memory: int,
        offset: int = 0,
        *,
        timeout: float | None = None,
        phase: Phase | str | None = None,
    ) -> None:
        """Give it one region of guest memory; the descriptor stays the caller's."""
        await self._device("AttachMemory", "ttht", (gpa, size, memory, offset), "", timeout, phase)

    async def set_state(
        self,
        state: str,
        *,
        stopped_ns: int | None = None,
        timeout: float | None = None,
        phase: Phase | str | None = None,
    ) -> str:
        """Move it to a state; the state reached. `stopped_ns`: how long the machine has stood still, nanoseconds."""
        options = {} if stopped_ns is None else {"stopped_ns": library.variant("t", stopped_ns)}
        (reached,) = await self._device("SetState", "sa{sv}", (str(state), options), "s", timeout, phase)
        return str(reached)

    async def start_tracking(self, *, timeout: float | None = None, phase: Phase | str | None = None) -> None:
        await self._device("StartTracking", "", (), "", timeout, phase)

    async def collect_dirty(
        self, *, timeout: float | None = None, phase: Phase | str | None = None
    ) -> tuple[int, int]:
        """Get and clear: a memfd with the bitmap (the caller's to check and close), and the bits set in it."""
        fd, pages = await self._device("CollectDirty", "", (), "ht", timeout, phase)
        return fd, pages

    async def stop_tracking(self, *, timeout: float | None = None, phase: Phase | str | None = None) -> None:
        await self._device("StopTracking", "", (), "", timeout, phase)

    async def save_as(
        self, version: int, *, timeout: float | None = None, phase: Phase | str | None = None
    ) -> bytes:
        (data,) = await self._device("SaveAs", "u", (version,), "ay", timeout, phase)
        return self._blob(data, phase)

    async def check_incoming(
        self, data: bytes, *, timeout: float | None = None, phase: Phase | str | None = None
    ) -> None:
        await self._device("CheckIncoming", "ay", (self._blob(data, phase),), "", timeout, phase)

    async def stage(
        self, data: bytes, *, timeout: float | None = None, phase: Phase | str | None = None
    ) -> None:
        await self._device("Stage", "ay", (self._blob(data, phase),), "", timeout, phase)

    async def apply(self, *, timeout: float | None = None, phase: Phase | str | None = None) -> None:
        await self._device("Apply", "", (), "", timeout, phase)

    async def stream_read(
        self, max_bytes: int, *, timeout: float | None = None, phase: Phase | str | None = None
    ) -> tuple[int, int, int]:
        """One chunk of streamed state: a memfd (the caller's to check and close), bytes in it, bytes left (estimate)."""
        chunk, size, remaining = await self._device("StreamRead", "t", (max_bytes,), "htt", timeout, phase)
        if size > max_bytes:
            os.close(chunk)
            raise self._refused(f"it streamed {size} bytes where at most {max_bytes} were asked for", phase)
        return chunk, size, remaining

    async def stream_write(
        self, chunk: int, size: int, *, timeout: float | None = None, phase: Phase | str | None = None
    ) -> None:
        """Give it one chunk of streamed state; the descriptor stays the caller's."""
        await self._device("StreamWrite", "ht", (chunk, size), "", timeout, phase)

    async def fingerprint(
        self, version: int = 0, *, timeout: float | None = None, phase: Phase | str | None = None
    ) -> bytes:
        """SHA-256 of all its state, in a version that it writes; 0: the newest. Only when stopped."""
        (digest,) = await self._device("Fingerprint", "u", (version,), "ay", timeout, phase)
        if len(digest) != _DIGEST:
            raise self._refused(f"its fingerprint has {len(digest)} bytes where SHA-256 has {_DIGEST}", phase)
        return bytes(digest)

    async def release_locks(self, *, timeout: float | None = None, phase: Phase | str | None = None) -> None:
        """Let go of the locks on its back-end files; it is stopped."""
        await self._device("ReleaseLocks", "", (), "", timeout, phase)

    async def serving(self, *, timeout: float | None = None, phase: Phase | str | None = None) -> None:
        """:raise DeviceRefused: what its VMM has asked of it by now is not done yet; ask again."""
        await self._device("Serving", "", (), "", timeout, phase)

    async def finish(
        self, outcome: str, *, timeout: float | None = None, phase: Phase | str | None = None
    ) -> None:
        """Tell it how the migration ended: "completed" or "aborted"."""
        await self._device("Finish", "s", (outcome,), "", timeout, phase)

    async def _device(
        self,
        member: str,
        signature: str,
        body: Sequence[Any],
        reply: str,
        timeout: float | None,
        phase: Phase | str | None,
    ) -> list[Any]:
        if self.opaque:
            raise self._refused(f"it has no {DEVICE}, so it cannot be asked to {member}", phase)
        return await self._call(DEVICE, member, signature, body, reply, timeout, phase)

    async def _call(
        self,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        reply: str,
        timeout: float | None,
        phase: Phase | str | None,
    ) -> list[Any]:
        return await self.bus.call(
            self.unique_name,
            PATH,
            interface,
            member,
            signature,
            body,
            timeout=DEADLINES[member] if timeout is None else timeout,
            device=self.id,
            phase=phase,
            reply_signature=reply,
        )

    def _blob(self, data: bytes, phase: Phase | str | None) -> bytes:
        if len(data) > MAX_BLOB:
            raise self._refused(
                f"a state of {len(data)} bytes; a blob holds at most {MAX_BLOB}",
                phase,
                "state this large is streamed",
            )
        return data

    def _refused(self, reason: str, phase: Phase | str | None, remedy: str = "") -> DeviceRefused:
        return DeviceRefused(
            reason,
            device=self.id,
            phase=phase or Phase.RUNNING,
            remedy=remedy or "is its process of another version of the interface?",
        )


async def discover(bus: Bus, *, timeout: float | None = None) -> dict[str, DeviceClient]:
    """All participants on a machine's bus, by Id. Two calls, and one a participant, all at once: cheap enough to poll.

    A process that ends meanwhile is left out. Raises DeviceRefused for an Id that two processes have (naming both) or that
    is none, DeviceTimeout for a process that does not tell its Id within `timeout` seconds (named by its pid), BusError.
    """
    patience = DEADLINES["GetAll"] if timeout is None else timeout
    # In this order: the kit takes Device1's name first, so that no process between its two names looks opaque.
    carried, typed = await asyncio.gather(bus.queued_owners(VMSTATE), bus.queued_owners(DEVICE))
    names = list(dict.fromkeys((*typed, *carried)))
    answers = await asyncio.gather(*(_ask_id(bus, name, patience) for name in names), return_exceptions=True)
    found: dict[str, DeviceClient] = {}
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, DeviceGone) and not bus.closed.is_set():
            continue
        if isinstance(answer, BaseException):
            raise answer
        other = found.get(answer)
        if other is not None:
            raise DeviceRefused(
                f"two processes say that they are {answer!r}: {await _process(bus, other.unique_name)} and "
                f"{await _process(bus, name)}",
                device=answer,
                remedy="give each device an id of its own",
            )
        found[answer] = DeviceClient(bus, name, answer, opaque=name not in typed)
    return found


async def _ask_id(bus: Bus, name: str, timeout: float) -> str:
    try:
        (properties,) = await bus.call(
            name,
            PATH,
            _PROPERTIES,
            "GetAll",
            "s",
            [VMSTATE],
            timeout=timeout,
            phase=Phase.SETUP,
            reply_signature="a{sv}",
        )
    except DeviceTimeout as error:
        raise DeviceTimeout(
            f"{await _process(bus, name)} did not tell its Id within {timeout:g} s",
            phase=Phase.SETUP,
            remedy="see what that process is doing, or end it",
        ) from error
    except DeviceRefused as error:
        raise DeviceRefused(
            f"{await _process(bus, name)} did not tell its Id: {error.reason}",
            remedy="see what that process is",
        ) from error
    device_id = properties.get("Id")
    if (
        not isinstance(device_id, str)
        or not device_id.isprintable()
        or not 1 <= len(device_id.encode()) <= _MAX_ID
    ):
        raise DeviceRefused(
            f"{await _process(bus, name)} has an Id that is none: {str(device_id)[:40]!r}",
            remedy=f"an Id is 1 to {_MAX_ID} printable bytes",
        )
    return device_id


async def _process(bus: Bus, name: str) -> str:
    """Who that is, for a person: the pid outlives the unique name in logs and process lists."""
    try:
        return f"process {await bus.pid_of(name)} ({name})"
    except DeviceGone:
        return f"a process that ended since ({name})"
