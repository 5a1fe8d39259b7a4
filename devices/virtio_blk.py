"""virtio-blk: a disk in a raw image, as a virtio-pci function. Puts together what is in devices/virtio.

One thread a queue carries requests out (virtio/runner.py), so that a slow disk keeps neither the VMM nor the bus waiting. The
image is opened when the process starts, and locked from entering RUNNING_P2P until ReleaseLocks or the end of the process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from devices.kit import Device, RegionInfo, main
from devices.vhost_blk import VhostUserBlk
from devices.virtio import blk, function
from devices.virtio.backing import Image
from devices.virtio.options import number, serial_of, switch
from devices.virtio.pci import VirtioPci
from devices.virtio.runner import QueueRunner
from migrate.bus import Disk
from migrate.errors import DeviceRefused, DeviceTimeout, Phase, UsageError

DEFAULT_QUEUES: Final = 2
MAX_QUEUES: Final = 8  # as schemas/virtio-blk.toml
QUEUE_SIZE: Final = 128
#: One a queue and one for changes of the configuration, whatever the number of queues: part of what a guest sees.
VECTORS: Final = MAX_QUEUES + 1
#: Mass storage, of no other kind.
_CLASS: Final = 0x018000

#: Seconds that a stop waits for a request that is on its way to the image. SetState's own deadline is longer.
PATIENCE: Final = 4.0

log = logging.getLogger(__name__)

_CONFIG_REGION: Final = 7
_NONE: Final = RegionInfo(0, read=False, write=False)


class VirtioBlk(Device):
    type = "virtio-blk"
    pci = True
    # VFIO's numbers: BARs 0 to 5, ROM, configuration space, VGA; INTx, MSI, MSI-X, error, request.
    regions = (
        RegionInfo(function.BAR_SIZE, name="bar0"),
        *[_NONE] * 6,
        RegionInfo(function.SIZE, name="config"),
        _NONE,
    )
    irqs = (0, 0, VECTORS, 0, 0)
    writes_memory = True
    options: ClassVar[Mapping[str, str]] = {
        "image": "path of the raw image, a whole number of sectors of 512 bytes",
        "read_only": "on or off, which is the default: the guest may not write",
        "queues": f"1 to {MAX_QUEUES}; {DEFAULT_QUEUES} without it",
        "serial": f"what the disk says its serial number is, at most {blk.ID_BYTES} characters; its id without it",
    }

    def setup(self, options: Mapping[str, str]) -> None:
        queues = number(options, "queues", DEFAULT_QUEUES, MAX_QUEUES)
        serial = serial_of(options, self.id, blk.ID_BYTES)
        if "image" not in options:
            raise UsageError(
                "a virtio-blk needs an image", remedy='write image = "disk0.img" in machine.toml'
            )
        self.image = Image(options["image"], read_only=switch(options, "read_only"))
        self.core = blk.BlockCore(self.image, self.memory, serial.encode(), queues)
        self.features = self.core.features
        self.function = VirtioPci(
            self,
            self.memory,
            device_type=blk.DEVICE_TYPE,
            class_code=_CLASS,
            queues=queues,
            queue_size=QUEUE_SIZE,
            vectors=VECTORS,
            fire=lambda vector: self.irq(vector).raise_(),
        )
        self.runners = [self._runner(ring) for ring in range(queues)]
        #: Between leave_p2p and enter_p2p.
        self._active = False

    def _runner(self, number: int) -> QueueRunner:
        return QueueRunner(
            self.function.queues[number],
            self.lock,
            f"{self.id}-queue{number}",
            begin=self.core.begin,
            interrupt=lambda: self.function.completed(number),
            broken=self.function.broken,
            rested=self._one_rested,
        )

    def reset(self) -> None:
        self._rest()
        self.function.reset()
        self.function.space.reset()
        self.core.negotiated = 0

    def read(self, region: int, offset: int, size: int) -> int:
        if region == _CONFIG_REGION:
            return self.function.config_read(offset, size)
        return self.function.bar_read(offset, size)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if region == _CONFIG_REGION:
            self.function.config_write(offset, size, value)
        else:
            self.function.bar_write(offset, size, value)

    # -- for the transport (virtio.pci.Model) -----------------------------------------------------------------------------

    def config(self) -> bytes:
        return self.core.config()

    def may_run(self) -> None:
        if self._active and self.function.running:
            self.core.negotiated = self.function.features
            for runner in self.runners:
                runner.allow()
        else:
            self.halt()

    def notified(self, queue: int) -> None:
        self.runners[queue].notify()

    def halt(self) -> bool:
        resting = [runner.halt() for runner in self.runners]  # all are told, whatever the first says
        return all(resting)

    def _one_rested(self) -> None:
        if self.halt():
            self.function.came_to_rest()

    # -- coming to rest and back --------------------------------------------------------------------------------------------

    def start(self, stopped_ns: int) -> None:
        self.image.lock()

    def leave_p2p(self) -> None:
        self._active = True
        self.may_run()

    def enter_p2p(self) -> None:
        self._rest()
        self._active = False

    def _rest(self) -> None:
        """Complete what is on its way and take nothing more. :raise DeviceTimeout: the image hangs; it runs on."""
        self.halt()
        deadline = time.monotonic() + PATIENCE
        for runner in self.runners:
            if not runner.rest(max(deadline - time.monotonic(), 0)):
                self.may_run()
                raise DeviceTimeout(
                    f"the image {self.image.path} has not answered a request for {PATIENCE:g} s",
                    remedy="its storage hangs; see the kernel's log of this host",
                    phase=Phase.STOP,
                    device=self.id,
                )
        self.function.came_to_rest()

    def before_unmap(self) -> None:
        try:
            self._rest()
        except DeviceTimeout as error:
            # A VMM that goes away must not have to wait: the view keeps the memory until the request has ended.
            log.error("event=unmapped-in-use reason=%r", error.reason)

    def windows_changed(self) -> None:
        # Rings that were taken back are no fault of the driver's: a VMM may go, and another come.
        self.may_run()
        for runner in self.runners:
            if not runner.queue.reachable():
                runner.halt()

    def disks(self) -> Sequence[Disk]:
        return (Disk("image", self.image.size, self.image.read_only),)

    def release_locks(self) -> None:
        self.image.unlock()

    def close(self) -> None:
        # Not for ever: the process is to end, also where an image hangs.
        if self.lock.acquire(timeout=1.0):
            for runner in self.runners:
                runner.close()
            self._rest()
            self.lock.release()
        self.image.close()

    # -- state ----------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {
            "capacity": self.core.capacity,
            "read_only": self.image.read_only,
            "serial": self.core.serial.decode(),
            **self.function.save([irq.raised for irq in self.all_irqs]),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        why = self.function.wrong(state)
        if state["capacity"] != self.core.capacity:
            why = f"a disk of {state['capacity']} sectors; this one has {self.core.capacity}"
        if state["read_only"] != self.image.read_only:
            why = "a disk that may be written, or not; this one is the other way"
        if state["serial"] != self.core.serial.decode():
            why = f"a disk with the serial number {state['serial']!r}; this one has {self.core.serial.decode()!r}"
        if why:
            raise DeviceRefused(
                f"the state sent is of {why}",
                remedy="both sides need the same image and options",
                phase=Phase.LOAD,
                device=self.id,
            )

    def load(self, state: Mapping[str, Any]) -> None:
        self.function.load(state)
        self.core.negotiated = self.function.features


if __name__ == "__main__":
    main(VirtioBlk, vhost_user=VhostUserBlk)
