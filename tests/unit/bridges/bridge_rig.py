"""A bridge in this process: a server of one of our devices behind it (or of a test's own), and the VMM's client before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from devices.bridges.vfio_user.bridge import Bridge
from devices.bridges.vfio_user.passing import Passing
from devices.bridges.vfio_user.upstream import Upstream
from devices.kit import Device
from devices.kit.runtime import VFIO_USER, Runtime
from devices.kit.vfio_user import VfioUserBackend
from devices.protocols.vfio_user.backend import Backend
from devices.protocols.vfio_user.client import Client
from devices.protocols.vfio_user.feature_messages import Envelope, MigrationFlags, MigrationState, Remaining
from devices.protocols.vfio_user.server import Server
from migrate.state.lifecycle import SAVING_GROUP

S = MigrationState


class Bridged:
    def __init__(self, directory: Path, backend: Backend, *, name: str = "dev0", model: str = "some") -> None:
        self._backend = backend
        directory.mkdir()
        self.server = Server(str(directory / "server"), backend)
        self.server.start()
        self.upstream = Upstream.connect(name, str(directory / "server"), lambda: "")
        self.bridge = Bridge(name, self.upstream, model)
        self.runtime = Runtime(self.bridge)
        self._passing = Passing(self.bridge, self.upstream)
        self.front = Server(str(directory / "vmm"), self._passing)
        self.front.start()
        self.vmm = Client.connect(str(directory / "vmm"), device=name)

    def go(self, state: str) -> None:
        self.runtime.set_state(state)

    def attach(self, fd: int, gpa: int, size: int) -> None:
        """As the supervisor and the VMM do. `fd` stays the caller's."""
        import os

        self.runtime.attach_memory(gpa, size, os.dup(fd), 0)
        self.vmm.dma_map(gpa, size, fd)

    def dirty(self) -> list[int]:
        return self.runtime.tracking.collect().pages_array().tolist()

    def close(self) -> None:
        self.vmm.close()
        self.front.close()
        self._passing.close()
        self.runtime.tracking.stop()
        self.bridge.close()
        self.bridge.memory.attached.close()
        self.server.close()
        device = getattr(self._backend, "_device", None)
        if device is not None:
            device.memory.attached.close()
            if device.streamed is not None:
                device.streamed.close()


Make = Callable[..., Bridged]


def serve(device: Device, moved_by: str = VFIO_USER) -> Backend:
    """A device of ours as a server that knows nothing of a bus; it runs, as vfio-user's devices do."""
    runtime = Runtime(device, tracker="log" if device.writes_memory else None, moved_by=moved_by)
    runtime.start()
    return VfioUserBackend(device, runtime)


def carry(source: Bridged, destination: Bridged, most: int = 16 << 20) -> list[int]:
    """The stream, as far as it goes now; the size of each chunk."""
    sizes = []
    streamed, into = source.bridge.streamed, destination.runtime
    assert streamed is not None
    while True:
        chunk, left = streamed.read_chunk(most)
        if chunk:
            into.take_chunk(chunk)
            sizes.append(len(chunk))
        if not chunk or not left:
            return sizes


def move(source: Bridged, destination: Bridged, meanwhile: Callable[[], None] = lambda: None) -> None:
    """A migration as the coordinators do it: some while it runs, the rest once it has stopped, then the blob."""
    destination.go("RESUMING")
    source.go("PRE_COPY")
    carry(source, destination)
    destination.runtime.check_incoming(source.runtime.save_as(2))
    meanwhile()
    source.go("STOP_COPY")
    assert source.bridge.state in SAVING_GROUP
    destination.runtime.stage(
        source.runtime.save_as(2)
    )  # before the last chunks: it is the Apply that comes after them
    carry(source, destination)
    destination.runtime.apply()
    destination.go("STOP")


class Foreign:
    """The migration of somebody else's server: no PRE_COPY, no extensions, and short reads at every turn."""

    offered = True
    flags = int(MigrationFlags.STOP_COPY)

    def __init__(self, data: bytes = b"", only: int = 3) -> None:
        self.state = int(S.RUNNING)
        self.seen: list[str] = []
        self.data = data
        self.taken = b""
        self._only = only
        self._at = 0
        self.refuse: set[int] = set()

    def set_state(self, state: int) -> None:
        from devices.protocols.vfio_user.messages import invalid

        if state in self.refuse:
            raise invalid("told to refuse")
        self.seen.append(S(state).name)
        self.state, self._at = state, 0

    def read(self, size: int) -> bytes:
        piece = self.data[self._at : self._at + min(size, self._only)]
        self._at += len(piece)
        return piece

    def write(self, data: memoryview) -> None:
        self.taken += bytes(data)

    def remaining(self) -> Remaining:
        from devices.protocols.vfio_user.messages import invalid

        raise invalid("no such feature")

    def envelope(self) -> Envelope:
        from devices.protocols.vfio_user.messages import invalid

        raise invalid("no such feature")

    def choose_version(self, version: int) -> None: ...
    def client_gone(self) -> None: ...


def foreign(migration: Foreign | None) -> object:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "vfio_user"))
    from vfio_user_backend import MemoryBackend

    backend = MemoryBackend()
    backend.migration = migration
    return backend
