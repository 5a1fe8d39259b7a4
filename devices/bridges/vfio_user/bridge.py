"""The participant: what states, state and dirty pages are for a device whose server speaks vfio-user only.

    here                     the server
    RUNNING, RUNNING_P2P     RUNNING. vfio-user has no P2P states, so between the two phases of a stop the device goes on by itself.
                             Nobody is left whom it could disturb: the vCPU has stopped, and devices do not reach each other. Its
                             interrupts wait in their eventfds, and what it writes is collected after it has stopped
    PRE_COPY, PRE_COPY_P2P   PRE_COPY, if it offers that and tells what is left; else RUNNING
    STOP, STOP_COPY          the same; but before its machine has begun it runs, with nothing to do: libvfio-user refuses memory and
                             interrupts to one that is in STOP
    RESUMING                 the same; left when the state is applied, so that it is judged there

It starts when RUNNING_P2P is entered, for what it refuses then can still be taken back. How long a machine was on its way cannot be
said in vfio-user: a device behind a bridge that keeps time goes on as if none had passed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from devices.bridges.vfio_user import config
from devices.bridges.vfio_user.data import MigData
from devices.bridges.vfio_user.dma_log import DmaLogTracker
from devices.bridges.vfio_user.upstream import Upstream
from devices.kit import Participant
from devices.protocols.vfio_user.client import RequestRefused
from devices.protocols.vfio_user.messages import DeviceFlags
from devices.virtio.backing import Image
from migrate.bus import Disk
from migrate.errors import DeviceRefused, Phase, TrackerError
from migrate.memory.addresses import GuestAddress
from migrate.memory.tracker import Tracker
from migrate.state.lifecycle import RESPONDING, SAVING_GROUP, DeviceState

log = logging.getLogger(__name__)

_S = DeviceState
#: VFIO's number of the region (linux/vfio.h).
_CONFIG = 7


class Bridge(Participant):
    type: ClassVar[str] = "vfio-user"
    #: Its state is beside its blob.
    for_qemu: ClassVar[bool] = False
    #: A server does not say whether it does.
    writes_memory: ClassVar[bool] = True

    def __init__(
        self,
        identity: str,
        upstream: Upstream,
        model: str,
        image: Image | None = None,
        *,
        incoming: bool = False,
    ) -> None:
        """:param image: the server's disk, so that both sides are seen to have the same one. Its lock is the server's.
        :raise DeviceError: the server does not come to rest, or (where it waits for a state) cannot be moved."""
        super().__init__(identity)
        self._upstream = upstream
        self._model = model
        self._image = image
        self._data = MigData(upstream, lambda: self.state is _S.STOP)
        self.streamed = self._data
        upstream.settle(incoming=incoming)
        self._config = b""
        self._look()

    def obstacle(self) -> str:
        return self._upstream.obstacle

    def disks(self) -> Sequence[Disk]:
        return () if self._image is None else (Disk("image", self._image.size, self._image.read_only),)

    def _look(self) -> None:
        """Keep the configuration space as it is, while it may be asked for: who stands still may refuse that."""
        if self._upstream.envelope is None and self._upstream.info.flags & DeviceFlags.PCI:
            size = min(self._upstream.client.region_info(_CONFIG).size, config.SIZE)
            self._config = self._upstream.client.read_bytes(_CONFIG, 0, size).ljust(config.SIZE, b"\0")

    # -- coming to rest and back ------------------------------------------------------------------------------------------------

    def enter_p2p(self) -> None:
        self._look()  # the vCPU has stopped: nobody writes there any more

    def leave_p2p(self) -> None:
        """It runs already, but for a server that was slow to obey a stop which was given up."""
        if not self._upstream.obstacle and self._upstream.state() in (_S.STOP, _S.STOP_COPY):
            self._upstream.go(_S.RUNNING, Phase.RESUME)
        self._upstream.client.shared.silence(False)

    def stop(self) -> None:
        if self.state is _S.PRE_COPY_P2P:
            self._data.stop()
        else:
            self._upstream.go(_S.STOP, Phase.STOP)
        self._upstream.client.shared.silence(True)  # memory is collected a last time

    def start(self, stopped_ns: int) -> None:
        if self._upstream.obstacle:
            return  # it has never stopped
        self._upstream.client.shared.silence(False)
        try:
            self._upstream.go(_S.RUNNING, Phase.RESUME)
        except BaseException:
            self._upstream.client.shared.silence(True)
            self._upstream.take_back()
            raise

    def release_locks(self) -> None:
        """A server's lock is its own; but what it has written here without bringing it to its storage would come there later, over
        what the other host has written by then."""
        if self._image is None:
            return
        try:
            self._image.flush()
        except OSError as error:
            raise DeviceRefused(
                f"what was written to {self._image.path} cannot be brought to its storage: {error.strerror}",
                remedy="the machine stays where it is; see the kernel's log for its storage",
                phase=Phase.COMMIT,
                device=self.id,
            ) from error

    def reset(self) -> None:
        """On the way to RESUMING, where a whole state comes: only what would be in its way is thrown away."""
        if self._data.begun or self._upstream.state() is _S.ERROR:
            self._upstream.power_on()
        self._upstream.client.shared.silence(True)

    def reset_by_vmm(self) -> None:
        """The guest resets the device. A server is in RUNNING then, whatever it was, and what was read of it is void."""
        self._upstream.power_on()
        if self.state in SAVING_GROUP:
            self._data.begin()

    # -- state ------------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """What the server is. Its state is streamed, all of it."""
        envelope = self._upstream.envelope
        if self.state in RESPONDING:
            self._look()
        return {
            "model": self._model,
            "config": self._config,
            "server_type": envelope.type if envelope else "",
            "server_id": envelope.instance if envelope else "",
            "server_version": envelope.version if envelope else 0,
            "server_digest": envelope.digest if envelope else b"",
        }

    def check(self, state: Mapping[str, Any]) -> None:
        mine = self.save()
        for key in ("model", "server_type", "server_id"):
            if state[key] != mine[key]:
                raise self._refused(
                    f"the state sent has {key} {state[key]!r}, and here it is {mine[key]!r}",
                    "start the same server on both hosts",
                )
        if bool(state["config"]) != bool(self._config) or len(state["config"]) not in (0, config.SIZE):
            raise self._refused(
                f"the state sent has {len(state['config'])} bytes of configuration space, and here there are {len(self._config)}",
                "start the same server on both hosts",
            )
        if wrong := config.of_one_function(self._config, state["config"]) if self._config else []:
            raise self._refused(
                f"the state sent is of another PCI function: {'; '.join(wrong)}",
                "start the same server on both hosts",
            )
        envelope = self._upstream.envelope
        version, digest = state["server_version"], state["server_digest"]
        if envelope is not None and version not in envelope.readable:
            raise self._refused(
                f"its server writes {envelope.type} version {version}, and the one here reads "
                f"{', '.join(map(str, envelope.readable))}",
                "upgrade the server here, or start an older one there",
            )
        if envelope is not None and version == envelope.version and digest != envelope.digest:
            raise self._refused(
                f"{envelope.type} version {version} is defined otherwise by the server here",
                "a released version was changed: start the same server on both hosts",
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """The data is with the server by now, which judges it on its way out of RESUMING."""
        if not self._data.ended:
            raise self._refused("its server's data has not come to its end", "see both logs")
        self._upstream.go(_S.STOP, Phase.LOAD)
        self._put_back(state["config"])

    def _put_back(self, theirs: bytes) -> None:
        if not self._config:
            return
        for register in config.registers(self._config):
            try:
                self._upstream.client.write_bytes(_CONFIG, register.offset, config.value(theirs, register))
            except RequestRefused as error:
                raise self._refused(
                    f"its server does not take its configuration space back, at {register.offset:#x}: {error.reason}",
                    "see the server's log",
                ) from error
        self._config = theirs

    def _refused(self, reason: str, remedy: str) -> DeviceRefused:
        return self._upstream.refused(reason, remedy, Phase.LOAD)

    # -- memory -------------------------------------------------------------------------------------------------------------------

    def choose_tracker(self, wanted: str | None) -> str:
        if wanted not in (None, "log"):
            raise TrackerError(
                f"the tracker {wanted} sees what this process writes, and its server is another",
                remedy="use log, or compare",
            )
        if not self._upstream.logs:
            raise TrackerError(
                "its vfio-user server does not offer DMA logging", remedy="use the tracker compare"
            )
        return "log"

    def make_tracker(self, name: str) -> Tracker:
        return DmaLogTracker(self._upstream, self.memory)

    def may_have_written(self, address: int, size: int) -> None:
        """Of this its own log tells nothing: it has had us write there, by a message, or the VMM has taken that window back, and
        with it went the log of it. From any thread."""
        tracker = self.memory.tracker
        for window in self.memory.windows:
            if tracker is not None and not window.private and window.covers(address, size):
                tracker.mark(GuestAddress(window.region.gpa + window.offset + address - window.address), size)

    def close(self) -> None:
        self._upstream.close()
        if self._image is not None:
            self._image.close()
