"""display: a frame buffer in VRAM that a guest draws in by commands. The example of a device with large state.

Registers are in docs/devices.md, small state in schemas/display.toml; VRAM is streamed page by page while the machine runs.
It is also a second process that writes guest memory: each command ends with a fence, 8 bytes stored in guest RAM, before
the interrupt. No screen is attached to it: what it shows is what a checksum tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from devices.kit import Device, RegionInfo, main
from migrate.errors import DeviceRefused, MemoryFault, Phase, UsageError
from migrate.memory.addresses import PAGE_SIZE

DEFAULT_VRAM = 64 << 20
MAX_VRAM = 64 << 20  # as schemas/display.toml
PIXEL = 4  # bytes

LOW, ALL = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF

FILL, COPY, CHECKSUM = 1, 2, 3
STATUS_DONE, STATUS_REFUSED = 1, 2
COMMAND, STATUS = 0x34, 0x38

#: Plain registers: offset, bytes, attribute, the bits that a write keeps (0: read-only).
REGISTERS = (
    (0x00, 8, "vram_bytes", 0),
    (0x08, 4, "width", 0xFFFF),
    (0x0C, 4, "height", 0xFFFF),
    (0x10, 4, "stride", 0xFFFF_FFFC),
    (0x18, 4, "x", 0xFFFF),
    (0x1C, 4, "y", 0xFFFF),
    (0x20, 4, "w", 0xFFFF),
    (0x24, 4, "h", 0xFFFF),
    (0x28, 4, "src_x", 0xFFFF),
    (0x2C, 4, "src_y", 0xFFFF),
    (0x30, 4, "colour", LOW),
    (0x40, 8, "frames", 0),
    (0x48, 8, "fence_gpa", ALL),
    (0x50, 8, "fence_value", ALL),
    (0x58, 8, "checksum", 0),
)

#: The same by what an access can be: offset and size → attribute, how far it is shifted within, what is kept.
#: 8-byte registers may also be read and written by halves.
ACCESSES = {(offset, size): (name, 0, kept) for offset, size, name, kept in REGISTERS} | {
    (offset + half, 4): (name, 8 * half, kept >> 8 * half & LOW)
    for offset, size, name, kept in REGISTERS
    if size == 8
    for half in (0, 4)
}


class CommandRefused(Exception):
    """The registers do not describe something that can be drawn; becomes STATUS bit 1."""


class Display(Device):
    type = "display"
    regions = (RegionInfo(0x60, name="registers"),)
    writes_memory = True
    streams = True
    options: ClassVar[Mapping[str, str]] = {
        "vram": "size of VRAM, such as 16M; 64M without it, which is also the most"
    }

    def setup(self, options: Mapping[str, str]) -> None:
        self.vram_bytes = _size(options.get("vram", "64M"))
        self.vram = self.stream(self.vram_bytes, "vram")

    def reset(self) -> None:
        self.vram.clear()
        self.width, self.height, self.stride = 1024, 768, 4096
        self.x = self.y = self.w = self.h = 0
        self.src_x = self.src_y = 0
        self.colour = 0
        self.frames = 0
        self.fence_gpa = self.fence_value = 0
        self.checksum = 0
        self.done = False
        self.refused = False

    # -- registers --------------------------------------------------------------------------------------------------------

    def read(self, region: int, offset: int, size: int) -> int:
        if (offset, size) == (STATUS, 4):
            return (STATUS_DONE if self.done else 0) | (STATUS_REFUSED if self.refused else 0)
        if (offset, size) not in ACCESSES:
            return 0
        name, shift, _ = ACCESSES[offset, size]
        value: int = getattr(self, name)
        return value >> shift & (LOW if size == 4 else ALL)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if (offset, size) == (COMMAND, 4):
            self._execute(value)
        elif (offset, size) == (STATUS, 4):
            self.done = self.done and not value & STATUS_DONE
            self.refused = self.refused and not value & STATUS_REFUSED
        elif (offset, size) in ACCESSES:
            name, shift, kept = ACCESSES[offset, size]
            if kept:
                replaced = (LOW if size == 4 else ALL) << shift
                setattr(self, name, getattr(self, name) & ~replaced | (value & kept) << shift)

    # -- commands ---------------------------------------------------------------------------------------------------------

    def _execute(self, command: int) -> None:
        try:
            pixels = self._pixels(self.x, self.y)
            if command == FILL:
                pixels[:] = self.colour
                self._drawn()
            elif command == COPY:
                # NumPy goes by way of a temporary where the two overlap.
                pixels[:] = self._pixels(self.src_x, self.src_y)
                self._drawn()
            elif command == CHECKSUM:
                self.checksum = int(pixels.sum(dtype=np.uint64))
            else:
                raise CommandRefused
            self._store_fence()
            self.done = True
        except CommandRefused:
            self.refused = True
        self.irq().raise_()

    def _pixels(self, x: int, y: int) -> npt.NDArray[np.uint32]:
        """The rectangle of the command's size at (x, y), in VRAM itself."""
        if x + self.w > self.width or y + self.h > self.height:
            raise CommandRefused
        if not self.w or not self.h:
            return np.empty((0, 0), np.uint32)
        if self.width * PIXEL > self.stride or self._end(self.width, self.height) > self.vram_bytes:
            raise CommandRefused
        return np.ndarray(
            (self.h, self.w),
            np.dtype("<u4"),
            self.vram.view,
            y * self.stride + x * PIXEL,
            (self.stride, PIXEL),
        )

    def _end(self, right: int, bottom: int) -> int:
        """Offset in VRAM just after the pixel that ends a rectangle."""
        return (bottom - 1) * self.stride + right * PIXEL

    def _drawn(self) -> None:
        """What was just stored is marked, then counted."""
        if self.w and self.h:
            start = self.y * self.stride + self.x * PIXEL
            line = self.w * PIXEL
            if self.stride - line < PAGE_SIZE:  # no page lies between two lines
                self.vram.mark(start, self._end(self.x + self.w, self.y + self.h) - start)
            else:
                for _ in range(self.h):
                    self.vram.mark(start, line)
                    start += self.stride
        self.frames = (self.frames + 1) & ALL

    def _store_fence(self) -> None:
        if not self.fence_gpa:
            return
        if self.fence_gpa % 8:
            raise CommandRefused
        try:
            self.memory.write(self.fence_gpa, self.fence_value.to_bytes(8, "little"))
        except MemoryFault:
            raise CommandRefused from None

    # -- state ------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        return {
            "width": self.width,
            "height": self.height,
            "stride": self.stride,
            "format": "xrgb8888",
            "fill_x": self.x,
            "fill_y": self.y,
            "fill_w": self.w,
            "fill_h": self.h,
            "fill_colour": self.colour,
            "frames": self.frames,
            "fence_gpa": self.fence_gpa,
            "fence_value": self.fence_value,
            "irq_pending": self.done,
            "vram_bytes": self.vram_bytes,
            "src_x": self.src_x,
            "src_y": self.src_y,
            "checksum": self.checksum,
            "refused": self.refused,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        if state["vram_bytes"] != self.vram_bytes:
            raise DeviceRefused(
                f"the state sent has {state['vram_bytes']} bytes of VRAM, this device has {self.vram_bytes}",
                remedy=f"start it with --option vram={state['vram_bytes']}",
                phase=Phase.LOAD,
                device=self.id,
            )
        if state["stride"] % PIXEL:
            raise DeviceRefused(
                f"the state sent has a stride of {state['stride']} bytes, and no display's can be that",
                remedy="the sender is not this device or is broken; its state was not taken over",
                phase=Phase.LOAD,
                device=self.id,
            )

    def load(self, state: Mapping[str, Any]) -> None:
        self.width, self.height, self.stride = state["width"], state["height"], state["stride"]
        self.x, self.y = state["fill_x"], state["fill_y"]
        self.w, self.h = state["fill_w"], state["fill_h"]
        self.src_x, self.src_y = state["src_x"], state["src_y"]
        self.colour = state["fill_colour"]
        self.frames = state["frames"]
        self.fence_gpa, self.fence_value = state["fence_gpa"], state["fence_value"]
        self.checksum = state["checksum"]
        self.done, self.refused = state["irq_pending"], state["refused"]


def _size(text: str) -> int:
    """Bytes, from a number with K or M after it or nothing."""
    match = re.fullmatch(r"([0-9]{1,12})([KM]?)", text, re.ASCII)
    size = int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]] if match else 0
    if not 0 < size <= MAX_VRAM or size % PAGE_SIZE:
        raise UsageError(
            f"vram={text} is not a size this display can have",
            remedy="give whole pages of 4096 bytes, such as 16M, at most 64M",
        )
    return size


if __name__ == "__main__":
    main(Display)
