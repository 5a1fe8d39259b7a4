"""vhost-user-net: a network function behind vhost-user, for a guest whose VMM is QEMU (`-netdev vhost-user`). No tap.

Frames go to, and come from, a SOCK_SEQPACKET Unix socket, one a packet. QEMU has the PCI function, its address and its
configuration; what stays in the port while the machine moves is what a network may lose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from devices.kit import main
from devices.protocols.vhost_user.device import VhostUserDevice
from devices.protocols.vhost_user.messages import ProtocolFeature
from devices.virtio.net import RX, TX, NetCore, PacketPort, Receiver
from devices.virtio.ring import SplitQueue
from devices.virtio.runner import QueueRunner
from migrate.errors import DeviceRefused, Phase, UsageError

QUEUE_SIZE: Final = 1024
#: Seconds that a stop waits for a frame that is on its way; a port never blocks for long.
PATIENCE: Final = 2.0


class VhostUserNet(VhostUserDevice):
    type = "vhost-user-net"
    own_protocol: ClassVar[ProtocolFeature] = ProtocolFeature.RARP
    #: An address that is announced once the guest may run here.
    _announced: bytes | None = None
    options: ClassVar[Mapping[str, str]] = {
        **VhostUserDevice.SOCKET,
        "peer": "path of the SOCK_SEQPACKET socket that frames go to and come from",
        "mac": "the guest's address; QEMU's business, named here so that it travels",
    }

    def setup(self, options: Mapping[str, str]) -> None:
        self.prepare(options)
        if "peer" not in options:
            raise UsageError("a vhost-user-net needs a peer", remedy="give --option peer=PATH")
        self.core = NetCore(PacketPort(options["peer"]), self.table)
        self.queues = [SplitQueue(self.table, QUEUE_SIZE) for _ in (RX, TX)]
        self.receiver = Receiver(
            self.core,
            self.queues[RX],
            self.lock,
            f"{self.id}-rx",
            interrupt=lambda: self.server.interrupt(RX),
            broken=lambda fault: self.broken(RX, fault),
        )
        self.sender = QueueRunner(
            self.queues[TX],
            self.lock,
            f"{self.id}-tx",
            begin=self.core.begin,
            interrupt=lambda: self.server.interrupt(TX),
            broken=lambda fault: self.broken(TX, fault),
        )
        self.serve(options)

    # -- VhostUserDevice ----------------------------------------------------------------------------------------------------------

    def device_features(self) -> int:
        return 0

    def accepted(self, features: int) -> None:
        self.core.negotiated(features)

    def notified(self, ring: int) -> None:
        (self.receiver if ring == RX else self.sender).notify()

    def allow(self, ring: int) -> None:
        (self.receiver if ring == RX else self.sender).allow()

    def rest(self, ring: int) -> bool:
        if ring == RX:
            self.receiver.halt()
            return True
        return self.sender.rest(PATIENCE)

    def announce(self, mac: bytes) -> None:
        """Frames of others follow it, so it waits until the guest may run here. (QEMU asks once it does, several times.)"""
        if self.active:
            self.core.announce(mac)
        else:
            self._announced = mac

    def leave_p2p(self) -> None:
        super().leave_p2p()
        if self._announced is not None:
            self.core.announce(self._announced)
            self._announced = None

    def enter_p2p(self) -> None:
        for ring in (RX, TX):
            self.rest(ring)
        self.active = False

    def close(self) -> None:
        self.server.close()
        if self.lock.acquire(timeout=1.0):
            self.receiver.close()
            self.sender.close()
            self.lock.release()

    # -- state ----------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {"features": self.driver_features}

    def check(self, state: Mapping[str, Any]) -> None:
        if state["features"] & ~self.features:
            raise DeviceRefused(
                "the state sent is of one with features that this one does not offer",
                remedy="run the same release on both sides",
                phase=Phase.LOAD,
                device=self.id,
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """QEMU negotiates anew when it starts the rings, to the same end: what was sent stands until then."""
        self.negotiated(state["features"])


if __name__ == "__main__":
    main(VhostUserNet)
