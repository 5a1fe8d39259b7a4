"""counter: the smallest device that uses what the kit has. Registers of 8 bytes: count, limit, where to report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from devices.kit import Device, RegionInfo, main


class Counter(Device):
    type = "counter"
    regions = (RegionInfo(24),)
    writes_memory = True

    def setup(self, options: Mapping[str, str]) -> None:
        self.every(0.001, self.tick)

    def reset(self) -> None:
        self.registers = [0, 0, 0]

    def read(self, region: int, offset: int, size: int) -> int:
        return self.registers[offset // 8]

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        self.registers[offset // 8] = value

    def tick(self) -> None:
        count, limit, report_gpa = self.registers
        if count < limit:
            self.registers[0] = count + 1
            if report_gpa:
                self.memory.write(report_gpa, (count + 1).to_bytes(8, "little"))
            if count + 1 == limit:
                self.irq().raise_()

    def save(self) -> dict[str, object]:
        return dict(zip(("count", "limit", "report_gpa"), self.registers, strict=True))

    def load(self, state: Mapping[str, Any]) -> None:
        self.registers = [state["count"], state["limit"], state["report_gpa"]]


if __name__ == "__main__":
    main(Counter)
