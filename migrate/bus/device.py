"""The participant's side of docs/dbus/*.xml: a typed plain class on one hand, two tables of methods on the other.

What a device *is* lives in devices/kit; here is only how its methods look on the bus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from migrate.bus import library
from migrate.bus.service import Call, Interface, Method, Property

#: Where every participant exports both interfaces (QEMU docs/interop/dbus-vmstate.rst fixes it).
PATH: Final = "/org/qemu/VMState1"
#: Both are an interface, and the well-known name that its participants queue for.
VMSTATE: Final = "org.qemu.VMState1"
DEVICE: Final = "org.vmferry.Device1"

#: What a blob may weigh, and the most that QEMU carries a helper (DBUS_VMSTATE_SIZE_LIMIT). Above it, state is streamed.
MAX_BLOB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Disk:
    """A back-end file of a participant: the option that names it, its size in bytes, and whether it is only read."""

    option: str
    size: int
    read_only: bool


def _disk_to_bus(disk: Disk) -> dict[str, Any]:
    return {
        "option": library.variant("s", disk.option),
        "size": library.variant("t", disk.size),
        "read_only": library.variant("b", disk.read_only),
    }


class DeviceService(Protocol):
    """What a participant answers with; the words of docs/dbus/*.xml say what each means.

    Whatever of migrate.errors a method raises reaches the caller with reason and remedy; anything else is logged here and
    the caller hears only that it happened. Descriptors that come in belong to the method once it returns (one that raises
    may leave them open: they are closed for it). Those that it returns are given away, and closed when they are sent.
    Calls run concurrently where a method awaits.
    """

    @property
    def id(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def schema_version(self) -> int: ...
    @property
    def readable_versions(self) -> Sequence[int]: ...
    @property
    def writable_versions(self) -> Sequence[int]: ...
    @property
    def schema_digest(self) -> bytes: ...
    @property
    def state(self) -> str: ...
    @property
    def tracker(self) -> str: ...
    @property
    def streams(self) -> bool: ...
    @property
    def obstacle(self) -> str: ...
    @property
    def disks(self) -> Sequence[Disk]: ...

    async def save(self) -> bytes: ...
    async def load(self, data: bytes) -> None: ...
    async def attach_memory(self, gpa: int, size: int, memory: int, offset: int) -> None: ...
    async def set_state(self, state: str, options: Mapping[str, Any]) -> str:
        """The state reached. `options` as in the XML, plain values: `stopped_ns`, an int, or nothing."""
        ...

    async def start_tracking(self) -> None: ...
    async def collect_dirty(self) -> tuple[int, int]:
        """A sealed memfd with the bitmap, and how many bits are set in it."""
        ...

    async def stop_tracking(self) -> None: ...
    async def save_as(self, version: int) -> bytes: ...
    async def check_incoming(self, data: bytes) -> None: ...
    async def stage(self, data: bytes) -> None: ...
    async def apply(self) -> None: ...
    async def stream_read(self, max_bytes: int) -> tuple[int, int, int]:
        """A sealed memfd, the bytes in it, an estimate of the bytes left."""
        ...

    async def stream_write(self, chunk: int, size: int) -> None: ...
    async def fingerprint(self, version: int) -> bytes: ...
    async def release_locks(self) -> None: ...
    async def serving(self) -> None: ...
    async def finish(self, outcome: str) -> None: ...


def device_interfaces(service: DeviceService) -> tuple[Interface, Interface]:
    """Device1 and VMState1 of a service, for Bus.export(PATH, ...)."""

    def method(name: str, handler: Any, takes: str = "", gives: str = "") -> Method:
        # "gpa:t size:t" is two arguments, as in the XML. The caller's identity is of no use here: the bus admits one user.
        async def handle(_call: Call, *arguments: Any) -> Any:
            return await handler(*arguments)

        in_names, in_signature = _arguments(takes)
        out_names, out_signature = _arguments(gives)
        return Method(name, in_signature, out_signature, in_names, out_names, handle)

    vmstate = Interface(
        VMSTATE,
        methods=(
            method("Load", service.load, "data:ay"),
            method("Save", service.save, gives="data:ay"),
        ),
        properties=(Property("Id", "s", lambda: service.id),),
    )
    device = Interface(
        DEVICE,
        methods=(
            method("AttachMemory", service.attach_memory, "gpa:t size:t memory:h offset:t"),
            method("SetState", service.set_state, "state:s options:a{sv}", "reached:s"),
            method("StartTracking", service.start_tracking),
            method("CollectDirty", service.collect_dirty, gives="bitmap:h pages:t"),
            method("StopTracking", service.stop_tracking),
            method("SaveAs", service.save_as, "version:u", "data:ay"),
            method("CheckIncoming", service.check_incoming, "data:ay"),
            method("Stage", service.stage, "data:ay"),
            method("Apply", service.apply),
            method("StreamRead", service.stream_read, "max_bytes:t", "chunk:h size:t remaining:t"),
            method("StreamWrite", service.stream_write, "chunk:h size:t"),
            method("Fingerprint", service.fingerprint, "version:u", "digest:ay"),
            method("ReleaseLocks", service.release_locks),
            method("Serving", service.serving),
            method("Finish", service.finish, "outcome:s"),
        ),
        properties=(
            Property("Type", "s", lambda: service.type),
            Property("SchemaVersion", "u", lambda: service.schema_version),
            Property("ReadableVersions", "au", lambda: list(service.readable_versions)),
            Property("WritableVersions", "au", lambda: list(service.writable_versions)),
            Property("SchemaDigest", "ay", lambda: service.schema_digest),
            Property("State", "s", lambda: str(service.state)),
            Property("Tracker", "s", lambda: service.tracker),
            Property("Streams", "b", lambda: service.streams),
            Property("Obstacle", "s", lambda: service.obstacle[:255]),
            Property("Disks", "aa{sv}", lambda: [_disk_to_bus(disk) for disk in service.disks]),
        ),
    )
    return device, vmstate


def _arguments(words: str) -> tuple[list[str], str]:
    pairs = [word.split(":") for word in words.split()]
    return [name for name, _ in pairs], "".join(signature for _, signature in pairs)
