"""canvas: the smallest device with streamed state. A write of page << 8 | byte to its register paints a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from devices.kit import Device, RegionInfo, main


class Canvas(Device):
    type = "canvas"
    regions = (RegionInfo(8),)
    streams = True
    options: ClassVar[Mapping[str, str]] = {"pages": "size in pages of 4096 bytes"}

    def setup(self, options: Mapping[str, str]) -> None:
        self.paper = self.stream(int(options.get("pages", "64")) * 4096, "paper")

    def reset(self) -> None:
        self.strokes = 0

    def read(self, region: int, offset: int, size: int) -> int:
        return self.strokes

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        page, byte = value >> 8, value & 0xFF
        self.paper.write(page * 4096, bytes([byte]) * 4096)
        self.strokes += 1

    def save(self) -> dict[str, object]:
        return {"strokes": self.strokes}

    def load(self, state: Mapping[str, Any]) -> None:
        self.strokes = state["strokes"]


if __name__ == "__main__":
    main(Canvas)
