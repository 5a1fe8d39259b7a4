"""The vCPU as a participant of a migration: what its state is, and how it comes to rest and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from devices.kit import Participant
from devices.vcpu import boot, platform_page, tlb_log
from devices.vcpu.engine import Engine
from devices.vcpu.platform_file import PlatformFile
from devices.vcpu.platform_page import PlatformPage, PoweredOff
from devices.vcpu.runner import Runner
from devices.vcpu.windows import Window
from migrate.errors import DeviceRefused, MemoryFault, Phase
from migrate.memory.mapping import Region
from migrate.memory.tracker import Tracker
from migrate.state.lifecycle import DeviceState

log = logging.getLogger(__name__)


class Vcpu(Participant):
    """Executes while RUNNING or PRE_COPY. In the P2P states it executes nothing: nobody asks a processor anything."""

    type: ClassVar[str] = "vcpu"
    writes_memory: ClassVar[bool] = True

    def __init__(
        self, identity: str, platform: PlatformFile, *, cold: bool, powered_off: Callable[[int], None]
    ) -> None:
        """
        :param cold: a machine that begins here: boot information and program are put into its memory.
        :param powered_off: called, from the vCPU's own thread, when the guest has switched the machine off.
        """
        super().__init__(identity)
        self._platform = platform
        self._cold = cold
        self._powered_off = powered_off
        self._page = PlatformPage()
        self._engine = Engine()
        self._engine.map_window(platform_page.GPA, platform_page.SIZE, self._page.read, self._page.write)
        self._runner = Runner(self._engine, self._page.wake, self._failed)
        self._windows: list[Window] = []
        self.reset()

    def reset(self) -> None:
        with self._runner.hold():
            self._engine.reset(self._platform.entry_gpa)
            self._page.pending = 0
            self._page.set_mask(0)

    # -- memory and devices -------------------------------------------------------------------------------------------------

    def memory_attached(self, region: Region) -> None:
        """:raise DeviceError: a device's process is not there or cannot be used. The devices must be started by now."""
        lowest = min((device.gpa for device in self._platform.devices), default=platform_page.GPA)
        if region.gpa + region.size > lowest:
            raise MemoryFault(
                f"memory up to {region.gpa + region.size:#x} overlaps the devices, which begin at {lowest:#x}",
                remedy=f"the embedded machine takes at most {lowest >> 20} MiB",
            )
        if not self._windows:
            for device in self._platform.devices:
                self._windows.append(Window.open(device, self._engine, self._page))
        for window in self._windows:
            window.map_memory(region)
        with self._runner.hold():
            self._engine.map_ram(region.gpa, region.size, region.address)
        if self._cold and region.gpa == 0:
            boot.write(region.view, self._platform)

    def make_tracker(self, name: str) -> Tracker:
        if name != tlb_log.TlbLog.name:
            return super().make_tracker(name)
        tlb_log.prove()
        return tlb_log.TlbLog(self._engine, self._runner)

    # -- coming to rest and back ----------------------------------------------------------------------------------------------

    def leave_p2p(self) -> None:
        self._runner.run()

    def enter_p2p(self) -> None:
        self._runner.rest()

    def _failed(self, failure: Exception) -> None:
        """From the vCPU's own thread: it executes nothing any more."""
        if isinstance(failure, PoweredOff):
            log.info("event=powered_off id=%s value=%d", self.id, failure.value)
            self._powered_off(failure.value)
            return
        log.error("event=vcpu_failed id=%s reason=%r rip=%#x", self.id, str(failure), self._engine.rip)
        with self.lock:
            self.why_in_error = str(failure)
            self.state = DeviceState.ERROR

    # -- state --------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        with self._runner.hold():
            self._page.latch()
            return self._engine.registers() | {"pending": self._page.pending, "mask": self._page.mask}

    def check(self, state: Mapping[str, Any]) -> None:
        if (state["pending"] | state["mask"]) >> platform_page.LINES:
            raise DeviceRefused(
                f"the state sent has more than {platform_page.LINES} interrupt lines",
                remedy="the sender is not this vCPU or is broken; its state was not taken over",
                phase=Phase.LOAD,
                device=self.id,
            )

    def load(self, state: Mapping[str, Any]) -> None:
        with self._runner.hold():
            self._engine.set_registers(state)
            self._page.pending = state["pending"]
            self._page.set_mask(state["mask"])

    def close(self) -> None:
        self._runner.close()
        for window in self._windows:
            window.close()
        self._windows.clear()
        self._page.close()
