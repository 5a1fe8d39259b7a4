"""What every device behind vhost-user has in common: its server, the front end's memory, and which rings are served when.

A ring is served while the front end wants it, the device runs, and `ready` says so (a disk: its image is locked).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import ClassVar

from devices.kit import Device
from devices.kit.state_format import StateFormat
from devices.protocols.vhost_user.memory import MemoryTable
from devices.protocols.vhost_user.messages import ProtocolFeature
from devices.protocols.vhost_user.server import Server
from devices.virtio.ring import DriverFault, SplitQueue
from migrate.errors import UsageError

log = logging.getLogger(__name__)

#: Features of the rings (virtio 1.2 §6): indirect descriptors, event index, version 1.
_INDIRECT, _EVENT_IDX, _VERSION_1 = 1 << 28, 1 << 29, 1 << 32
RINGS = _INDIRECT | _EVENT_IDX | _VERSION_1


class VhostUserDevice(Device):
    """A devices.protocols.vhost_user.session.Backend. A subclass sets `queues` in setup, last calls `serve`, and has the hooks."""

    regions = ()
    irqs = ()
    #: Guest memory comes by vhost-user and what is written there is in QEMU's dirty log, not in a tracker of the kit.
    writes_memory = False
    SOCKET: ClassVar[Mapping[str, str]] = {"vhost_user": "path of the socket that QEMU connects to"}

    own_protocol: ClassVar[ProtocolFeature] = ProtocolFeature(0)

    queues: list[SplitQueue]

    def prepare(self, options: Mapping[str, str]) -> None:
        """The first thing in `setup`. :raise UsageError: no socket is named."""
        if "vhost_user" not in options:
            raise UsageError(f"a {self.type} needs vhost_user", remedy="give --option vhost_user=PATH")
        self.table = MemoryTable()
        self._format = StateFormat(self.type, self.id)
        self.wanted: set[int] = set()  #: rings that the front end wants served
        self.active = False  #: between leave_p2p and enter_p2p

    def serve(self, options: Mapping[str, str]) -> None:
        """The last thing in `setup`. :raise UsageError: no socket can be made there."""
        self.server = Server(options["vhost_user"], self)
        self.server.start()

    # -- hooks ----------------------------------------------------------------------------------------------------------------

    def ready(self) -> str:
        """Why no ring may be served now, "" where all may."""
        return ""

    def allow(self, ring: int) -> None:
        """Serve it. May be called again."""
        raise NotImplementedError

    def rest(self, ring: int) -> bool:
        """Serve nothing more of it; what was taken is given back when this returns. False: something lasts."""
        raise NotImplementedError

    def notified(self, ring: int) -> None:
        """The driver says that there is something."""
        raise NotImplementedError

    def announce(self, mac: bytes) -> None:
        """A device that has RARP in `own_protocol` says so in its network."""

    def device_features(self) -> int:
        raise NotImplementedError

    def accepted(self, features: int) -> None:
        """What the driver took of them."""

    # -- Backend ----------------------------------------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        return self.device_features() | RINGS

    def config(self) -> bytes:
        return b""

    def negotiated(self, features: int) -> None:
        self.driver_features = features
        self.accepted(features)
        for queue in self.queues:
            queue.configure(event_idx=bool(features & _EVENT_IDX), indirect=bool(features & _INDIRECT))

    #: What the driver accepted, without the bits that are vhost's own.
    driver_features = 0

    def start_ring(self, ring: int) -> None:
        self.wanted.add(ring)
        self.serve_wanted()

    def stop_ring(self, ring: int) -> bool:
        self.wanted.discard(ring)
        return self.rest(ring)

    def serve_wanted(self) -> None:
        if self.wanted and self.active and not self.ready():
            for ring in self.wanted:
                self.allow(ring)

    def broken(self, ring: int, fault: DriverFault) -> None:
        """Its driver broke the rules: the front end is told."""
        self.server.broken(ring)

    def save_blob(self) -> bytes:
        return self._format.write(self.save(), self._format.version.version)

    def check_blob(self, blob: bytes) -> None:
        self.check(self._format.read(blob))

    def load_blob(self, blob: bytes) -> None:
        self.load(self._format.read(blob))

    # -- Device -----------------------------------------------------------------------------------------------------------------

    def not_serving(self) -> str:
        if not self.server.drained():
            return "messages of the VMM are not carried out yet"
        if self.wanted and not self.active:
            return "the VMM has started its rings and the device is stopped"
        return self.ready() if self.wanted else ""

    def leave_p2p(self) -> None:
        self.active = True
        self.serve_wanted()

    def reset(self) -> None:
        self.driver_features = 0
        for queue in self.queues:
            queue.reset()
