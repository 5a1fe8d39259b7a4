"""What anything that takes part in a migration tells the kit: a device, or the vCPU.

A participant knows its state and how to come to rest; it knows nothing about D-Bus (service.py), sockets or processes
(process.py). A device author subclasses Device (device.py), which is a participant that a VMM reads and writes; the
vCPU subclasses this one.

    RUNNING ──enter_p2p──► RUNNING_P2P ──stop──► STOP          each arrow: one hook, one arc of VFIO's migration v2
    RUNNING ◄──leave_p2p── RUNNING_P2P ◄─start── STOP          (PRE_COPY counts as RUNNING, PRE_COPY_P2P as RUNNING_P2P)

Every hook is called with `lock` held, from one thread, never two at a time. A hook that raises leaves the participant in
the state it had before that arc, so that it can be told to run again: a hook undoes what it did before it raises. A
thread that a hook waits for must not take `lock`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from devices.kit.access import MemoryAccess
from devices.kit.stream import Streamed
from migrate.bus import Disk
from migrate.memory import prove
from migrate.state.lifecycle import DeviceState

if TYPE_CHECKING:
    from migrate.bus import Bus
    from migrate.memory.region import Region
    from migrate.memory.tracker import Tracker


class Participant:
    """Base of Device and of the vCPU. The hooks do nothing unless they say otherwise."""

    #: Name of the schema (schemas/<type>.toml) that `save` and `load` speak.
    type: ClassVar[str]
    #: Whether QEMU's dbus-vmstate may carry it, if it is small enough.
    for_qemu: ClassVar[bool] = True
    #: Whether it writes guest memory, and so needs a dirty tracker.
    writes_memory: ClassVar[bool] = False

    def __init__(self, device_id: str) -> None:
        self.id = device_id
        #: Where it stands. The kit sets it; a device made on its own, as in a unit test, is taken to run.
        self.state = DeviceState.RUNNING
        self.why_in_error = ""  #: what put it into ERROR, for whoever asks it to move from there
        #: Held by whoever touches the state: the VMM's accesses, timers, hooks, save, and the collection of dirty pages.
        self.lock = threading.RLock()
        #: Guest memory, once it is attached.
        self.memory = MemoryAccess(writes=self.writes_memory)
        #: Large state that goes in pieces, while the machine runs, beside the blob. None for most.
        self.streamed: Streamed | None = None

    # -- coming to rest and back ------------------------------------------------------------------------------------

    def enter_p2p(self) -> None:
        """Start nothing new of your own accord; still answer others. When it returns, nothing is in flight.

        The vCPU stops executing here.
        """

    def stop(self) -> None:
        """Touch nothing from now on: no guest memory, no interrupt, no back end. Follows enter_p2p."""

    def start(self, stopped_ns: int) -> None:
        """Leave STOP for RUNNING_P2P: be able to answer; start nothing of your own accord before leave_p2p.

        :param stopped_ns: how long the machine has stood still so far, for what keeps time. 0 at a cold start.
        """

    def leave_p2p(self) -> None:
        """Run. The vCPU executes from here."""

    # -- state --------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """The state, by the schema's newest version. Changes nothing; also called while running."""
        raise NotImplementedError(f"{type(self).__name__} has no save()")

    def check(self, state: Mapping[str, Any]) -> None:
        """Would `load` take this? It fits the schema already; here goes what a schema cannot say. Changes nothing.

        :raise DeviceRefused: if it would not.
        """

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the state over. What it raises puts the participant into ERROR."""
        raise NotImplementedError(f"{type(self).__name__} has no load()")

    def reset(self) -> None:
        """The state after power-on."""

    # -- memory, trackers and the end ---------------------------------------------------------------------------------

    def memory_attached(self, region: Region) -> None:
        """A region of guest memory was attached (and is in `self.memory`). Comes before the first start."""

    def make_tracker(self, name: str) -> Tracker:
        """The dirty tracker "scan", "log" or "none" for what this process writes. The vCPU has a "log" of its own."""
        return prove.make(name)

    def choose_tracker(self, wanted: str | None) -> str:
        """Which tracker it uses: the one wanted, or the best that works. :raise TrackerError: that does not work, or none does."""
        return prove.choose(wanted)

    def obstacle(self) -> str:
        """Why it can never be moved, for whoever asks before anything is; "" where it can."""
        return ""

    def disks(self) -> Sequence[Disk]:
        """Its back-end files. `start` locks them (and raises DeviceRefused where it cannot), `release_locks` lets go."""
        return ()

    def release_locks(self) -> None:
        """The machine is stopped and may go on elsewhere: let go of the locks on back-end files."""

    def not_serving(self) -> str:
        """While RUNNING: why what the VMM has asked of it by now is not done yet; "" when all is."""
        return ""

    def finish(self, outcome: str) -> None:
        """The migration ended: "completed" or "aborted"."""

    def on_bus(self, bus: Bus) -> None:
        """The process is on a bus, at first or again, and not yet found there: more can be exported. In the event loop."""

    def close(self) -> None:
        """The process is about to end."""

    # -- the kit's own part of the arcs, around the hooks above; not for authors ---------------------------------------

    def _set_active(self, active: bool) -> None:
        """Whether it may start things of its own accord: timers."""

    def _set_silent(self, silent: bool) -> None:
        """Whether interrupts are kept back."""

    def _forget_edges(self) -> None:
        """After a reset: interrupts that nobody was told of are gone."""
