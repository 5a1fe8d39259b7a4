"""The device of theirs.c behind our server: registers, an address that bytes are written to, one INTx.

`python -m tests.interop.libvfio.ours SOCKET` is a process of it, until its standard input ends.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from devices.kit import RegionInfo
from devices.kit.runtime import VFIO_USER, Runtime
from devices.kit.vfio_user import VfioUserBackend
from devices.protocols.vfio_user.server import Server
from devices.rtc import Rtc
from migrate.errors import MemoryFault

_BYTES = memoryview(bytes(1 << 20))
_NONE = RegionInfo(0, read=False, write=False)


class Twin(Rtc):
    """Its state is an rtc's, for it must have a schema; its data is not compared."""

    pci = True
    regions = (RegionInfo(16), *[_NONE] * 6, RegionInfo(256), _NONE)
    irqs = (1, 0, 0, 0, 0)
    writes_memory = True

    def reset(self) -> None:
        super().reset()
        self.registers = bytearray(16)

    def read(self, region: int, offset: int, size: int) -> int:
        return int.from_bytes(self.registers[offset : offset + size], "little") if region == 0 else 0

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if region:
            return
        self.registers[offset : offset + size] = value.to_bytes(size, "little")
        if (offset, size) == (8, 8):
            with contextlib.suppress(MemoryFault):
                count = int.from_bytes(self.registers[:4], "little")
                self.memory.write(value, _BYTES[: count or 1])


@contextlib.contextmanager
def serve(path: str) -> Iterator[None]:
    device: Any = Twin("twin0")
    runtime = Runtime(device, moved_by=VFIO_USER)
    server = Server(path, VfioUserBackend(device, runtime))
    runtime.start()
    server.start()
    try:
        yield
    finally:
        server.close()
        device.close()


if __name__ == "__main__":
    with serve(sys.argv[1]):
        sys.stdin.read()
