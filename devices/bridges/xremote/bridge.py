"""The participant: what states, state and memory are for a device in a QEMU of the type `x-remote`.

    here                     QEMU
    RUNNING, RUNNING_P2P     runs. RUNNING_P2P is entered once no SCSI request is under way: QEMU does not save any (requests.py)
    PRE_COPY, PRE_COPY_P2P   the same: there is no state before it stands still
    STOP                     stopped by `stop`
    STOP_COPY                has written its stream by `migrate`, and has let go of its image. `cont` leads on from there
    RESUMING                 another one that waits (`-incoming`); left when the state is applied, so that it is judged there

It runs when RUNNING_P2P is entered from STOP: what it refuses then can still be taken back. The image's lock is the bridge's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from devices.bridges.xremote.data import QemuStream
from devices.bridges.xremote.function import Function
from devices.bridges.xremote.interrupt import Interrupt
from devices.bridges.xremote.remote import Remote
from devices.bridges.xremote.wiring import Wiring
from devices.kit import Participant
from devices.virtio.backing import Image
from migrate.bus import Disk
from migrate.errors import DeviceError, DeviceRefused, Phase, TrackerError
from migrate.state.lifecycle import SAVING_GROUP, DeviceState

log = logging.getLogger(__name__)

_S = DeviceState
#: Seconds that requests which are under way get to come to their end.
IDLE_SECONDS: Final = 3.0
#: Of a class code (PCI Code and ID Assignment): the base class, and subclasses of which QEMU's models make SCSI requests: SCSI (and
#: virtio, whose requests are saved), RAID, SAS. Nobody counts those of IDE, AHCI and the like; whether they go on after `stop`, as
#: SCSI's do, was not tried.
_STORAGE: Final = 0x01
_BY_SCSI: Final = (0x00, 0x04, 0x07)
_POLL: Final = 0.0005


class Bridge(Participant):
    type: ClassVar[str] = "x-remote"
    #: Its state is beside its blob.
    for_qemu: ClassVar[bool] = False
    writes_memory: ClassVar[bool] = True

    def __init__(
        self, identity: str, remote: Remote, model: str, image: Image | None, *, incoming: bool = False
    ) -> None:
        """Starts QEMU. :raise FerryError: it does not come up, or its function does not fit."""
        super().__init__(identity)
        self.remote = remote
        self._model = model
        self._image = image
        remote.start(incoming=incoming)
        self._version = remote.version()
        self.function = Function(remote)
        self.interrupt = Interrupt(self.function.asserted)
        self.wiring = Wiring(self.interrupt)
        self.wiring.tell(remote.client)
        self._stream = QemuStream(remote)
        self._stream.stopped = True
        self.streamed = self._stream
        self._unsaved = "" if incoming else self._try_to_save()

    def _try_to_save(self) -> str:
        """Why QEMU does not save this device; "" if it does. It says so only when it is told to."""
        try:
            self._stream.write_down()
        except DeviceRefused as error:
            return error.reason
        return ""

    def obstacle(self) -> str:
        if self._unsaved:
            return self._unsaved
        if not self.remote.traced:
            return "its QEMU does not tell which SCSI requests are under way (it has no trace), so it may lose one"
        if (
            self.function.class_code >> 16 == _STORAGE
            and self.function.class_code >> 8 & 0xFF not in _BY_SCSI
        ):
            return "its requests are no SCSI requests, and its QEMU does not tell which others are under way: it may lose one"
        if self.memory.has_private_windows:
            return (
                "its VMM has mapped memory into it that is not the machine's, and writes there would be lost"
            )
        return ""

    # -- coming to rest and back ------------------------------------------------------------------------------------------------

    def enter_p2p(self) -> None:
        """The vCPU has stopped by now, so nothing new is asked of it."""
        deadline = time.monotonic() + IDLE_SECONDS
        while why := self._busy():
            if time.monotonic() > deadline:
                state = self.remote.state(Phase.STOP)
                raise self._refused(
                    f"{why} for {IDLE_SECONDS:g} s after the vCPU's stop, and its QEMU's saved state has no room for that"
                    + (f"; its QEMU is {state}" if state != "running" else ""),
                    "try again when the guest asks less of it, or see whether its storage hangs",
                    Phase.STOP,
                )
            time.sleep(_POLL)

    def _busy(self) -> str:
        """What it is in the midst of; "" if nothing."""
        # Asked first: what QEMU answers is younger than whatever it has traced by then.
        connected = self.function.connected()
        if under_way := self.remote.under_way():
            return f"{under_way} SCSI request{'s are' if under_way > 1 else ' is'} under way"
        return "it is connected to a target" if connected else ""

    def leave_p2p(self) -> None:
        """It runs already, but for a QEMU that was slow to obey a stop which was given up."""
        if self.remote.state(Phase.RESUME) != "running":
            self.remote.run(Phase.RESUME)

    def stop(self) -> None:
        try:
            self.remote.stop()
            if why := self._busy():
                raise self._refused(f"{why} though it had come to rest", "try again", Phase.STOP)
            self.interrupt.settle()
            self._stream.stopped = True
            if self.state is _S.PRE_COPY_P2P:
                self._stream.write_down()
        except BaseException:
            self._stream.stopped = False
            self._as_it_was(self.remote.run)
            raise

    def start(self, stopped_ns: int) -> None:
        if self._image is not None:
            self._image.lock()
        self._stream.forget()  # it may have run from here on, whatever it answers
        try:
            self.remote.run(Phase.RESUME)
        except BaseException:
            # One that may run yet keeps its image, and with it everybody else off it.
            if self._as_it_was(lambda _: self.remote.stop()) and self._image is not None:
                self._image.unlock()
            raise
        self._stream.stopped = False

    def _as_it_was(self, undo: Callable[[Phase], None]) -> bool:
        """Whether it is. A QEMU that hangs obeys later, in order: it has been told by then."""
        try:
            undo(Phase.STOP)
        except DeviceError as error:
            log.warning("event=not-undone reason=%r", error.reason)
            return False
        return True

    def release_locks(self) -> None:
        if self._image is not None:
            self._image.unlock()

    def disks(self) -> Sequence[Disk]:
        return () if self._image is None else (Disk("image", self._image.size, self._image.read_only),)

    # -- reset ------------------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """On the way to RESUMING, where a whole state comes: for that QEMU has to be one that waits, and has got nothing yet."""
        if not self.remote.waiting:
            self.remote.start(incoming=True)
            self.function.place()
            self.wiring.tell(self.remote.client)

    def reset_by_vmm(self) -> None:
        """The guest resets the device."""
        self.enter_p2p()  # QEMU's controllers do not survive it with a request under way
        self.remote.client.reset()
        self.function.reset()
        if self.state in SAVING_GROUP:
            self._stream.begin()

    # -- state ------------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """What it is, and what the bridge keeps of it. QEMU's state is streamed, all of it."""
        return {
            "model": self._model,
            "qemu": self._version,
            **self.function.identity(),
            **self.function.save(),
            "stream_size": self._stream.size if self._stream.stopped else 0,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        mine = {"model": self._model, **self.function.identity()}
        wrong = [
            f"{key} {state[key]!r} where this one has {mine[key]!r}"
            for key in mine
            if state[key] != mine[key]
        ]
        if wrong:
            raise self._refused(
                f"the state sent is of another function: {'; '.join(wrong)}",
                "start the same device on both hosts: see --serve in host.toml",
                Phase.LOAD,
            )
        if state["qemu"] != self._version:
            log.warning("event=other-qemu theirs=%s ours=%s", state["qemu"], self._version)

    def load(self, state: Mapping[str, Any]) -> None:
        """The stream is here by now, and QEMU judges it."""
        if state["stream_size"] != self._stream.size:
            raise self._refused(
                f"{self._stream.size} bytes of its stream came, and {state['stream_size']} were written",
                "see both logs",
                Phase.LOAD,
            )
        self._stream.hand_over()
        self._stream.stopped = True
        self.function.load(state)

    def _refused(self, reason: str, remedy: str, phase: Phase) -> DeviceRefused:
        return DeviceRefused(reason, remedy=remedy, phase=phase, device=self.id)

    # -- memory -------------------------------------------------------------------------------------------------------------------

    def choose_tracker(self, wanted: str | None) -> str:
        raise TrackerError(
            "multi-process QEMU has no log of the pages that it writes"
            + (f", so {wanted} sees nothing of them" if wanted else ""),
            remedy='use tracker = "compare" in machine.toml (it costs a pass over all of memory while the machine stands still)',
        )

    def close(self) -> None:
        self.remote.end()
        self.wiring.close()
        self.interrupt.close()
        self._stream.forget()
        if self._image is not None:
            self._image.close()
