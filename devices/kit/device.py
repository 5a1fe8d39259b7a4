"""Device: what the author of a device subclasses. Nothing here knows D-Bus, sockets or processes.

    class Counter(Device):
        type = "counter"
        regions = (RegionInfo(16),)

        def reset(self) -> None:
            self.count = 0

        def read(self, region: int, offset: int, size: int) -> int:
            return self.count

        def write(self, region: int, offset: int, size: int, value: int) -> None:
            self.count = value

        def save(self) -> dict[str, object]:
            return {"count": self.count}

        def load(self, state: Mapping[str, Any]) -> None:
            self.count = state["count"]

    if __name__ == "__main__":
        main(Counter)

All methods are called with `self.lock` held, so a device is as good as single-threaded. A device that starts threads of
its own takes the lock in them, and stops them in `enter_p2p`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from devices.kit.irq import Irq
from devices.kit.participant import Participant
from devices.kit.pci_function import PciIdentity
from devices.kit.stream import StreamedMemory
from devices.kit.timers import Timer, Timers
from devices.protocols.vfio_user.region_messages import IoEventfd, RegionMemory


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """A window of registers: its size in bytes, and whether a VMM may read and write it."""

    size: int
    read: bool = True
    write: bool = True
    name: str = ""


class Device(Participant):
    """One device. A unit test makes it directly: `Counter("counter0")`; a process makes it by `main(Counter)`."""

    #: The windows that a VMM sees, by index.
    regions: ClassVar[Sequence[RegionInfo]] = ()
    #: How many interrupts it has at each index of vfio-user. A PCI function: none but at index 2, one a MSI-X vector.
    irqs: ClassVar[Sequence[int]] = (1,)
    #: Whether it is a PCI function: regions 0 to 5 are its BARs, region 7 is its configuration space.
    pci: ClassVar[bool] = False
    #: Of one that is none: as which it can be shown to a VMM that knows PCI functions only (`--protocol mpqemu`).
    identity: ClassVar[PciIdentity | None] = None
    #: Whether it calls `self.stream(...)` in setup: state beside the blob, of any size, sent while the machine runs.
    streams: ClassVar[bool] = False
    #: The keys that `--option key=value` may have, each with a line of help.
    options: ClassVar[Mapping[str, str]] = {}

    #: Why its VMM keeps it from being moved, "" where it does not.
    unmovable = ""

    def __init__(self, device_id: str, options: Mapping[str, str] | None = None) -> None:
        super().__init__(device_id)
        self._irqs = tuple(Irq() for _ in range(sum(self.irqs)))
        self._timers = Timers(self.lock)
        self.setup(options or {})
        self.reset()

    # -- what an author writes (besides save, load and, rarely, check, start, stop, enter_p2p, leave_p2p, finish) -------

    def setup(self, options: Mapping[str, str]) -> None:
        """Once, before the first reset: read options, make timers and streamed memory, open back ends.

        :raise UsageError: an option is wrong.
        """

    def read(self, region: int, offset: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes, naturally aligned, within the region. Little-endian."""
        return 0

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes, naturally aligned, within the region. Little-endian."""

    def before_unmap(self) -> None:
        """A VMM takes guest memory back. When this returns, no view of it is in use any more, whatever is in flight."""

    def region_memory(self, region: int) -> RegionMemory | None:
        """What of a region a VMM may map, in place of `read` and `write`. It writes there unseen: what is in it belongs into
        `save`, and not into memory that is streamed while the machine runs."""
        return None

    def io_fds(self, region: int) -> Sequence[IoEventfd]:
        """Eventfds of the device's own that a VMM may signal in place of a `write`. Whoever has some listens to them, and has
        done all that was signalled when `stop` returns."""
        return ()

    def windows_changed(self) -> None:
        """A VMM has given guest memory, or taken some back."""

    # -- what an author uses (besides self.memory) ---------------------------------------------------------------------

    def irq(self, number: int = 0) -> Irq:
        """Interrupt `number`, counted over all indexes; `.raise_()` signals it."""
        return self._irqs[number]

    def every(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Call `action` every so often, under the lock, while the device is RUNNING (never in P2P or STOP)."""
        return self._timers.every(seconds, action)

    def stream(self, size: int, name: str = "state") -> StreamedMemory:
        """Memory of the device's own (`size` bytes, whole pages) that is migrated page by page beside the blob.

        Write it by its `write`, or store through its `view` and then `mark`: a store that is not marked is lost.
        """
        self.streamed = StreamedMemory(size, f"{self.id}-{name}")
        return self.streamed

    # -- for the kit ---------------------------------------------------------------------------------------------------

    @property
    def all_irqs(self) -> Sequence[Irq]:
        return self._irqs

    def obstacle(self) -> str:
        return self.unmovable

    def _set_active(self, active: bool) -> None:
        if active:
            self._timers.run()
        else:
            self._timers.rest()

    def _set_silent(self, silent: bool) -> None:
        for irq in self._irqs:
            irq.hold(silent)

    def _forget_edges(self) -> None:
        for irq in self._irqs:
            irq.forget()
