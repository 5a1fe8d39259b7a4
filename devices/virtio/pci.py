"""virtio-pci, modern: registers in, calls out. Virtio 1.2 §2 (status, features, queues) and §4.1 (PCI).

Owns what every virtio device has: status, features, queues, interrupts. What a block device is, it does not know: that is
the Model's. Nor does it know vfio-user: bar_read and config_read are what a VMM's accesses become.

A reset that comes while a request is on its way to the disk does not wait for it: until that has ended, the status still
reads as it was, as §4.1.4.3.1 allows, and no VMM is kept waiting.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from devices.virtio import function, ring
from devices.virtio.function import COMMON, DEVICE, ISR, MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_STEP
from devices.virtio.msix import NO_VECTOR, Msix
from devices.virtio.ring import DriverFault, Memory, SplitQueue

log = logging.getLogger(__name__)

#: Device status (§2.1).
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
#: Features of rings and transport (§6).
F_INDIRECT, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
_OURS: Final = F_INDIRECT | F_EVENT_IDX | F_VERSION_1

_ISR_QUEUE, _ISR_CONFIG = 1, 2
#: struct virtio_pci_common_cfg (§4.1.4.3), up to and with queue_device.
_COMMON_CFG: Final = struct.Struct("<IIIIHHBBHHHHHQQQ")
_LOW: Final = 0xFFFF_FFFF


class Model(Protocol):
    """The device behind the transport. Called with the device's lock held."""

    #: Feature bits of its type that it offers.
    features: int

    def config(self) -> bytes:
        """Its configuration, as a driver reads it."""

    def may_run(self) -> None:
        """Something changed: `VirtioPci.running` says whether queues are to be served now."""

    def notified(self, queue: int) -> None:
        """The driver put something into a queue."""

    def halt(self) -> bool:
        """Serve nothing more. False: something is on its way yet; `VirtioPci.came_to_rest` is called when it has ended."""


class VirtioPci:
    """All methods are called with the device's lock held."""

    def __init__(
        self,
        model: Model,
        memory: Memory,
        *,
        device_type: int,
        class_code: int,
        queues: int,
        queue_size: int,
        vectors: int,
        fire: Callable[[int], None],
    ) -> None:
        """:param fire: sends the message of an MSI-X vector."""
        self._model = model
        self.msix = Msix(vectors, fire)
        self.queues = [SplitQueue(memory, queue_size) for _ in range(queues)]
        self.space = function.ConfigSpace(device_type, class_code, self.msix, self, len(model.config()))
        self._reset_wanted = False
        self.reset()

    def reset(self) -> None:
        """The virtio device; `self.space.reset` is the function's. Nothing may be on its way."""
        self._reset_wanted = False
        self.status = 0
        self.features = 0
        self._feature_select = self._driver_select = 0
        self._queue_select = 0
        self._config_vector = NO_VECTOR
        self._vectors = [NO_VECTOR] * len(self.queues)
        self._isr = 0
        for queue in self.queues:
            queue.reset()

    # -- for the model --------------------------------------------------------------------------------------------------------

    @property
    def offered(self) -> int:
        return self._model.features | _OURS

    @property
    def running(self) -> bool:
        """Whether requests are to be served."""
        wanted = self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
        return wanted and not self._reset_wanted and self.space.bus_master

    def completed(self, queue: int) -> None:
        """Tell the driver that something was given back."""
        if not self.msix.enabled:
            self._isr |= _ISR_QUEUE
        self.msix.raise_(self._vectors[queue])

    def broken(self, fault: DriverFault) -> None:
        """The driver must reset the device (§2.1.2), and is told so."""
        self._model.halt()
        self.status |= NEEDS_RESET
        if self.status & DRIVER_OK:
            self._isr |= _ISR_CONFIG
            self.msix.raise_(self._config_vector)

    def came_to_rest(self) -> None:
        """What was on its way has ended. The reset that waited for it is carried out."""
        if self._reset_wanted:
            self.reset()

    # -- accesses: 1, 2, 4 or 8 bytes, aligned --------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        return self.space.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.space.write(offset, size, value)

    def command_changed(self) -> None:
        self._model.may_run()

    def bar_read(self, offset: int, size: int) -> int:
        page, within = offset & ~0xFFF, offset & 0xFFF
        match page:
            case COMMON.offset:
                content = self._common()
            case ISR.offset:
                content = bytes((self._isr,))
                if within == 0:
                    self._isr = 0  # reading acknowledges
            case DEVICE.offset:
                content = self._model.config()
            case MSIX_TABLE.offset:
                content = self.msix.table()
            case MSIX_PENDING.offset:
                content = self.msix.pending()
            case _:
                content = b""
        return int.from_bytes(content[within : within + size], "little")

    def bar_write(self, offset: int, size: int, value: int) -> None:
        page, within = offset & ~0xFFF, offset & 0xFFF
        match page:
            case COMMON.offset:
                self._write_common(within, size, value)
            case NOTIFY.offset:
                queue = within // NOTIFY_STEP
                if queue < len(self.queues) and self.running:
                    self._model.notified(queue)
            case MSIX_TABLE.offset:
                self.msix.write(within, size, value)
            case _:
                pass  # the configuration of a device and what is pending are read only

    # -- common configuration -------------------------------------------------------------------------------------------------

    def _common(self) -> bytes:
        chosen = self._queue_select < len(self.queues)
        queue = self.queues[self._queue_select] if chosen else None
        return _COMMON_CFG.pack(
            self._feature_select,
            self.offered >> 32 * self._feature_select & _LOW if self._feature_select < 2 else 0,
            self._driver_select,
            self.features >> 32 * self._driver_select & _LOW if self._driver_select < 2 else 0,
            self._config_vector,
            len(self.queues),
            self.status,
            0,  # config_generation: it never changes
            self._queue_select,
            queue.size if queue else 0,
            self._vectors[self._queue_select] if queue else NO_VECTOR,
            queue.enabled if queue else 0,
            self._queue_select if queue else 0,  # queue_notify_off
            queue.descriptors if queue else 0,
            queue.available if queue else 0,
            queue.used if queue else 0,
        )

    def _write_common(self, offset: int, size: int, value: int) -> None:
        match offset, size:
            case 0x00, 4:
                self._feature_select = value
            case 0x08, 4:
                self._driver_select = value
            case 0x0C, 4:
                self._accept_features(value)
            case 0x10, 2:
                self._config_vector = value if self.msix.has(value) else NO_VECTOR
            case 0x14, 1:
                self._write_status(value)
            case 0x16, 2:
                self._queue_select = value
            case _:
                if self._queue_select < len(self.queues):
                    self._write_queue(self.queues[self._queue_select], offset, size, value)

    def _write_queue(self, queue: SplitQueue, offset: int, size: int, value: int) -> None:
        if (offset, size) == (0x1A, 2):
            self._vectors[self._queue_select] = value if self.msix.has(value) else NO_VECTOR
        if queue.enabled:
            return  # §4.1.4.3.2: it stays as it is until a reset
        match offset, size:
            case 0x18, 2 if value.bit_count() == 1 and value <= queue.max_size:
                queue.size = value
            case 0x1C, 2 if value == 1:
                queue.enabled = True
            case 0x20, 8:
                queue.descriptors = value
            case 0x28, 8:
                queue.available = value
            case 0x30, 8:
                queue.used = value
            case ((0x20 | 0x24), 4):
                queue.descriptors = _half(queue.descriptors, offset, value)
            case ((0x28 | 0x2C), 4):
                queue.available = _half(queue.available, offset, value)
            case ((0x30 | 0x34), 4):
                queue.used = _half(queue.used, offset, value)

    def _accept_features(self, value: int) -> None:
        if self._driver_select < 2 and not self.status & FEATURES_OK:
            self.features = _half(self.features, 4 * self._driver_select, value)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset_wanted = True
            if self._model.halt():
                self.reset()
            return
        if self._reset_wanted:
            return
        added = value & ~self.status & (ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED)
        if added & FEATURES_OK:
            if self.features & ~self.offered or not self.features & F_VERSION_1:
                log.info("event=features-refused features=%#x offered=%#x", self.features, self.offered)
                added &= ~FEATURES_OK
            else:
                self._negotiated()
        if added & DRIVER_OK and not (self.status | added) & FEATURES_OK:
            added &= ~DRIVER_OK
        self.status |= added
        self._model.may_run()

    def _negotiated(self) -> None:
        for queue in self.queues:
            queue.configure(
                event_idx=bool(self.features & F_EVENT_IDX), indirect=bool(self.features & F_INDIRECT)
            )

    # -- state ----------------------------------------------------------------------------------------------------------------

    def save(self, untold: Sequence[bool]) -> dict[str, object]:
        """:param untold: vectors that were fired and that nobody was told of yet."""
        return {
            "status": self.status,
            "features": self.features,
            "feature_select": self._feature_select,
            "driver_feature_select": self._driver_select,
            "queue_select": self._queue_select,
            "config_vector": self._config_vector,
            "isr": self._isr,
            "reset_wanted": self._reset_wanted,
            "pci": self.space.save(),
            "vectors": self.msix.save(untold),
            "queues": [
                {**queue.save(), "vector": vector}
                for queue, vector in zip(self.queues, self._vectors, strict=True)
            ],
        }

    def wrong(self, state: Mapping[str, Any]) -> str | None:
        """Why `load` could not take this state, beyond what the schema says; None if it could."""
        # Before FEATURES_OK they are only what a driver wrote.
        if (missing := state["features"] & ~self.offered) and state["status"] & FEATURES_OK:
            return f"the guest's driver uses features that this device has not ({missing:#x})"
        if len(state["queues"]) != len(self.queues):
            return f"{len(state['queues'])} queues; this device has {len(self.queues)}"
        for number, queue in enumerate(state["queues"]):
            if why := ring.wrong(queue, self.queues[number].max_size):
                return f"queue {number}: {why}"
        return None

    def load(self, state: Mapping[str, Any]) -> None:
        self.reset()
        self.status, self.features = state["status"], state["features"]
        self._feature_select, self._driver_select = state["feature_select"], state["driver_feature_select"]
        self._queue_select, self._config_vector = state["queue_select"], state["config_vector"]
        self._isr = state["isr"]
        self._vectors = [queue["vector"] for queue in state["queues"]]
        for queue, saved in zip(self.queues, state["queues"], strict=True):
            queue.load(saved)
        self._negotiated()
        pci = state["pci"]
        self.space.load(pci)
        self.msix.load(state["vectors"], enabled=pci["msix_enabled"], masked=pci["msix_masked"])
        if state["reset_wanted"]:
            # It waited for a request of the device that this state is of; here nothing is on its way.
            self.reset()


def _half(value: int, offset: int, half: int) -> int:
    """A 64-bit value with its low (offset a multiple of 8) or high half replaced."""
    return value & _LOW | half << 32 if offset % 8 else value & ~_LOW | half
