"""timer: a small device, right or with one planted fault: `python planted.py FAULT` and then the arguments of any device process.

Registers of 8 bytes: the count, which goes up every millisecond; a scratch register; where in guest memory the count is stored, 0
for nowhere. A test kit that does not see one of the faults is of no use.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from devices.kit import Device, RegionInfo, main


class Timer(Device):
    type = "timer"
    regions = (RegionInfo(24),)
    writes_memory = True

    def setup(self, options: Mapping[str, str]) -> None:
        self.every(0.001, self.tick)

    def reset(self) -> None:
        self.registers = [0, 0x5A5A, 0]

    def read(self, region: int, offset: int, size: int) -> int:
        return self.registers[offset // 8]

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        self.registers[offset // 8] = value & 0xFFFF_FFFF if offset == 8 else value

    def tick(self) -> None:
        self.registers[0] += 1
        if self.registers[2]:
            self.memory.write(self.registers[2], self.registers[0].to_bytes(8, "little"))
        if self.registers[0] % 100 == 0:
            self.irq().raise_()

    def save(self) -> dict[str, object]:
        return dict(zip(("count", "scratch", "report_gpa"), self.registers, strict=True))

    def load(self, state: Mapping[str, Any]) -> None:
        self.registers = [state["count"], state["scratch"], state["report_gpa"]]


class ForgetsRegister(Timer):
    def save(self) -> dict[str, object]:
        return super().save() | {"scratch": 0x5A5A}  # what it is after a reset: nobody notices at first


class WrongTimer(Timer):
    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.registers[0] += 5  # as if time had passed


class WritesAfterStop(Timer):
    def setup(self, options: Mapping[str, str]) -> None:
        super().setup(options)
        threading.Thread(target=self.go_on, daemon=True).start()

    def go_on(self) -> None:
        """A thread that nobody told."""
        number = 0
        while True:
            time.sleep(0.005)
            for region in self.memory.attached.regions[:1]:
                number += 1
                region.view[64:72] = number.to_bytes(8, "little")


class HalfLoad(Timer):
    def load(self, state: Mapping[str, Any]) -> None:
        self.registers[0] = state["count"]
        raise RuntimeError("the second half does not fit")


FAULTS: dict[str, type[Timer]] = {
    "none": Timer,
    "forgets-register": ForgetsRegister,
    "wrong-timer": WrongTimer,
    "writes-after-stop": WritesAfterStop,
    "half-load": HalfLoad,
}

if __name__ == "__main__":
    main(FAULTS[sys.argv[1]], sys.argv[2:])
