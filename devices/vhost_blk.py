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

from devices.kit import Device, main
from devices.kit.state_format import StateFormat
from devices.protocols.vhost_user.memory import MemoryTable
from devices.protocols.vhost_user.server import Server
from devices.virtio import blk
from devices.virtio.backing import Image
from devices.virtio.options import choice, number, serial_of, switch
from devices.virtio.ring import DriverFault, SplitQueue
from devices.virtio.runner import QueueRunner
from migrate.bus import Disk
from migrate.errors import DeviceRefused, DeviceTimeout, Phase, UsageError

DEFAULT_QUEUES: Final = 1
MAX_QUEUES: Final = 8
QUEUE_SIZE: Final = 1024
#: Features of the rings (virtio 1.2 §6).
_RINGS: Final = 1 << 28 | 1 << 29 | 1 << 32
_EVENT_IDX, _INDIRECT = 1 << 29, 1 << 28
#: Seconds that a ring's stop waits for a request that is on its way to the image.
PATIENCE: Final = 4.0
#: How often a lock that another host has is asked for again, s: the ring waits as long.
_AGAIN: Final = 0.02

log = logging.getLogger(__name__)


class VhostUserBlk(Device):
    type = "vhost-user-blk"
    regions = ()
    irqs = ()
    #: Guest memory comes by vhost-user and what is written there is in QEMU's dirty log, not in a tracker of the kit.
    writes_memory = False
    options: ClassVar[Mapping[str, str]] = {
        "vhost_user": "path of the socket that QEMU connects to",
        "image": "path of the raw image, a whole number of sectors of 512 bytes",
        "read_only": "on or off, which is the default: the guest may not write",
        "queues": f"1 to {MAX_QUEUES}; {DEFAULT_QUEUES} without it",
        "lock": "ring, which is the default: the image is locked while a ring runs; machine: from start until ReleaseLocks",
        "serial": f"what the disk says its serial number is, at most {blk.ID_BYTES} characters; its id without it",
    }

    def setup(self, options: Mapping[str, str]) -> None:
        for needed in ("vhost_user", "image"):
            if needed not in options:
                raise UsageError(f"a vhost-user-blk needs {needed}", remedy=f"give --option {needed}=PATH")
        count = number(options, "queues", DEFAULT_QUEUES, MAX_QUEUES)
        self._by_machine = choice(options, "lock", ("ring", "machine")) == "machine"
        self.image = Image(options["image"], read_only=switch(options, "read_only"))
        self.table = MemoryTable()
        self._format = StateFormat(self.type, self.id)
        serial = serial_of(options, self.id, blk.ID_BYTES)
        self.core = blk.BlockCore(self.image, self.table, serial.encode(), count)
        self.queues = [SplitQueue(self.table, QUEUE_SIZE) for _ in range(count)]
        self.runners = [self._runner(ring) for ring in range(count)]
        self._wanted: set[int] = set()  # rings that QEMU wants served
        self._ran: set[int] = (
            set()
        )  # and those that it wanted served when it last stopped any, until all have started again
        self._active = False  # between leave_p2p and enter_p2p
        self._server = Server(options["vhost_user"], self)
        self._locker = self.every(_AGAIN, self._try_to_lock)
        self._server.start()

    def _runner(self, ring: int) -> QueueRunner:
        return QueueRunner(
            self.queues[ring],
            self.lock,
            f"{self.id}-queue{ring}",
            begin=self.core.begin,
            interrupt=lambda: self._server.interrupt(ring),
            broken=lambda fault: self._broken(ring, fault),
        )

    def _broken(self, ring: int, fault: DriverFault) -> None:
        self._server.broken(ring)

    # -- devices.protocols.vhost_user.session.Backend ----------------------------------------------------------------------------

    @property
    def features(self) -> int:
        return self.core.features | _RINGS

    def config(self) -> bytes:
        return self.core.config()

    def negotiated(self, features: int) -> None:
        self.core.negotiated = features
        for queue in self.queues:
            queue.configure(event_idx=bool(features & _EVENT_IDX), indirect=bool(features & _INDIRECT))

    def start_ring(self, ring: int) -> None:
        self._wanted.add(ring)
        self._serve()

    def stop_ring(self, ring: int) -> None:
        self._wanted.discard(ring)
        if not self.runners[ring].rest(PATIENCE):
            log.error("event=ring-hangs ring=%d reason='the image has not answered for %g s'", ring, PATIENCE)
        if not self._wanted and not self._by_machine:
            self._let_go()

    def notified(self, ring: int) -> None:
        self.runners[ring].notify()

    def save_blob(self) -> bytes:
        return self._format.write(self.save(), self._format.version.version)

    def check_blob(self, blob: bytes) -> None:
        self.check(self._format.read(blob))

    def load_blob(self, blob: bytes) -> None:
        self.load(self._format.read(blob))

    # -- who is served ------------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Rings that are wanted, while the device runs and the image is its own."""
        if self._wanted and self._active and self._lock():
            for ring in self._wanted:
                self.runners[ring].allow()

    def _lock(self) -> bool:
        if self.image.locked:
            return True
        try:
            self.image.lock()
        except DeviceRefused as error:
            log.debug("event=image-locked reason=%r", error.reason)
            return False
        return True

    def _try_to_lock(self) -> None:
        """A ring that QEMU has started waits for the other host to let go of the image."""
        if self._wanted and not self.image.locked:
            self._serve()

    def _let_go(self) -> None:
        try:
            self.image.unlock()
        except DeviceRefused as error:
            log.error("event=image-not-let-go reason=%r", error.reason)

    def not_serving(self) -> str:
        if not self._server.drained():
            return "messages of the VMM are not carried out yet"
        if self._wanted and not self._active:
            return "the VMM has started its rings and the device is stopped"
        if self._wanted and not self._lock():
            return f"the image {self.image.path} is locked by another process"
        return ""

    def start(self, stopped_ns: int) -> None:
        if self._by_machine:
            self.image.lock()

    def leave_p2p(self) -> None:
        self._active = True
        self._serve()

    def enter_p2p(self) -> None:
        deadline = time.monotonic() + PATIENCE
        for runner in self.runners:
            if not runner.rest(max(deadline - time.monotonic(), 0)):
                self._serve()
                raise DeviceTimeout(
                    f"the image {self.image.path} has not answered a request for {PATIENCE:g} s",
                    remedy="its storage hangs; see the kernel's log of this host",
                    phase=Phase.STOP,
                    device=self.id,
                )
        self._active = False

    def disks(self) -> Sequence[Disk]:
        return (Disk("image", self.image.size, self.image.read_only),)

    def release_locks(self) -> None:
        self.image.unlock()

    def reset(self) -> None:
        self.core.negotiated = 0
        for queue in self.queues:
            queue.reset()

    def close(self) -> None:
        self._server.close()
        # Not for ever: the process is to end, also where an image hangs.
        if self.lock.acquire(timeout=1.0):
            for runner in self.runners:
                runner.close()
                runner.rest(PATIENCE)
            self.lock.release()
        self.image.close()

    # -- state ----------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {
            "capacity": self.core.capacity,
            "read_only": self.image.read_only,
            "serial": self.core.serial.decode(),
            "queues": len(self.queues),
            "features": self.core.negotiated,
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
