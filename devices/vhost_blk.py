"""vhost-user-blk: the disk of virtio_blk.py behind vhost-user, for a guest whose VMM is QEMU. The same core, rings and images.

QEMU has the PCI function and says where the rings are; how far a ring has come goes with QEMU's own state (GET_VRING_BASE). So
the state of this process is what both sides must agree on: which disk it is, and what was negotiated.

The image is locked while a ring runs, for nothing in vhost-user keeps two hosts from serving one disk; in a machine of ours
(`lock=machine`) from RUNNING_P2P on until ReleaseLocks, as every disk is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from devices.kit import main
from devices.protocols.vhost_user.device import VhostUserDevice
from devices.protocols.vhost_user.messages import ProtocolFeature
from devices.virtio import blk
from devices.virtio.backing import Image
from devices.virtio.options import choice, number, serial_of, switch
from devices.virtio.ring import SplitQueue
from devices.virtio.runner import QueueRunner
from migrate.bus import Disk
from migrate.errors import DeviceRefused, DeviceTimeout, Phase, UsageError

DEFAULT_QUEUES: Final = 1
MAX_QUEUES: Final = 8
QUEUE_SIZE: Final = 1024
#: Seconds that a ring's stop waits for a request that is on its way to the image.
PATIENCE: Final = 4.0
#: How often a lock that another host has is asked for again, s: the ring waits as long.
_AGAIN: Final = 0.02

log = logging.getLogger(__name__)


class VhostUserBlk(VhostUserDevice):
    type = "vhost-user-blk"
    own_protocol: ClassVar[ProtocolFeature] = ProtocolFeature.CONFIG
    options: ClassVar[Mapping[str, str]] = {
        **VhostUserDevice.SOCKET,
        "image": "path of the raw image, a whole number of sectors of 512 bytes",
        "read_only": "on or off, which is the default: the guest may not write",
        "queues": f"1 to {MAX_QUEUES}; {DEFAULT_QUEUES} without it",
        "lock": "ring, which is the default: the image is locked while a ring runs; machine: from start until ReleaseLocks",
        "serial": f"what the disk says its serial number is, at most {blk.ID_BYTES} characters; its id without it",
    }

    def setup(self, options: Mapping[str, str]) -> None:
        self.prepare(options)
        if "image" not in options:
            raise UsageError("a vhost-user-blk needs an image", remedy="give --option image=PATH")
        count = number(options, "queues", DEFAULT_QUEUES, MAX_QUEUES)
        self._by_machine = choice(options, "lock", ("ring", "machine")) == "machine"
        self.image = Image(options["image"], read_only=switch(options, "read_only"))
        serial = serial_of(options, self.id, blk.ID_BYTES)
        self.core = blk.BlockCore(self.image, self.table, serial.encode(), count)
        self.queues = [SplitQueue(self.table, QUEUE_SIZE) for _ in range(count)]
        self.runners = [self._runner(ring) for ring in range(count)]
        self._keeps = ""  #: why the image could not be let go of
        self._locker = self.every(_AGAIN, self._look_at_lock)
        self.serve(options)

    def _runner(self, ring: int) -> QueueRunner:
        return QueueRunner(
            self.queues[ring],
            self.lock,
            f"{self.id}-queue{ring}",
            begin=self.core.begin,
            interrupt=lambda: self.server.interrupt(ring),
            broken=lambda fault: self.broken(ring, fault),
        )

    # -- VhostUserDevice ----------------------------------------------------------------------------------------------------------

    def device_features(self) -> int:
        return self.core.features

    def accepted(self, features: int) -> None:
        self.core.negotiated = features

    def config(self) -> bytes:
        return self.core.config()

    def notified(self, ring: int) -> None:
        self.runners[ring].notify()

    def allow(self, ring: int) -> None:
        self.runners[ring].allow()

    def rest(self, ring: int) -> bool:
        rested = self.runners[ring].rest(PATIENCE)
        if not rested:
            log.error("event=ring-hangs ring=%d reason='the image has not answered for %g s'", ring, PATIENCE)
        return rested

    def stop_ring(self, ring: int) -> bool:
        rested = super().stop_ring(ring)
        self._let_go()
        return rested

    def _let_go(self) -> None:
        """Of the image, once no ring runs. Not while a request lasts: it would be done after another host has the image."""
        if self.wanted or self._by_machine or not self.image.locked or any(one.busy for one in self.runners):
            return
        try:
            self.image.unlock()
            self._keeps = ""
        except DeviceRefused as error:
            if error.reason != self._keeps:  # it is tried again and again
                log.error("event=image-not-let-go reason=%r", error.reason)
            self._keeps = error.reason

    def ready(self) -> str:
        """The image has to be ours; another host may be about to let go of it."""
        if self.image.locked:
            return ""
        try:
            self.image.lock()
        except DeviceRefused as error:
            return error.reason
        return ""

    def _look_at_lock(self) -> None:
        """A ring that QEMU has started waits for the other host to let go of the image; and that for its last request to end."""
        if self.wanted and not self.image.locked:
            self.serve_wanted()
        self._let_go()

    # -- coming to rest and back --------------------------------------------------------------------------------------------------

    def start(self, stopped_ns: int) -> None:
        if self._by_machine:
            self.image.lock()

    def enter_p2p(self) -> None:
        deadline = time.monotonic() + PATIENCE
        for runner in self.runners:
            if not runner.rest(max(deadline - time.monotonic(), 0)):
                self.serve_wanted()
                raise DeviceTimeout(
                    f"the image {self.image.path} has not answered a request for {PATIENCE:g} s",
                    remedy="its storage hangs; see the kernel's log of this host",
                    phase=Phase.STOP,
                    device=self.id,
                )
        self.active = False

    def disks(self) -> Sequence[Disk]:
        return (Disk("image", self.image.size, self.image.read_only),)

    def release_locks(self) -> None:
        self.image.unlock()

    def close(self) -> None:
        self.server.close()
        # Not for ever: the process is to end, also where an image hangs.
        if self.lock.acquire(timeout=1.0):
            for runner in self.runners:
                runner.close()
                runner.rest(PATIENCE)
            self.image.close()
            self.lock.release()

    # -- state ----------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {
            "capacity": self.core.capacity,
            "read_only": self.image.read_only,
            "serial": self.core.serial.decode(),
            "queues": len(self.queues),
            "features": self.driver_features,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        mine = self.save()
        wrong = [
            f"{name} {state[name]!r} where this one has {mine[name]!r}"
            for name in mine
            if name != "features" and state[name] != mine[name]
        ]
        if state["features"] & ~self.features:
            wrong.append("features that this one does not offer")
        if wrong:
            raise DeviceRefused(
                f"the state sent is of another disk: {'; '.join(wrong)}",
                remedy="both sides need the same image and options",
                phase=Phase.LOAD,
                device=self.id,
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """QEMU negotiates anew when it starts the rings, to the same end: what was sent stands until then."""
        self.negotiated(state["features"])


if __name__ == "__main__":
    main(VhostUserBlk)
