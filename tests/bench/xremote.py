"""A device in an x-remote QEMU behind its bridge: register reads beside the same QEMU without it (raw), and the parts of a move."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.figures import MIB, Figure, Scale
from tests.interop.qemu_world import QEMU
from tests.interop.xremote_rig import Bridged, carry

_SCNTL1 = 0x01


def run(scale: Scale) -> Iterator[Figure]:
    if shutil.which(QEMU) is None:
        yield Figure("x-remote", "register reads", "1/s", (), note=f"{QEMU} is not installed")
        return
    reads = 200 if scale.quick else 5000
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as made:
        image = Path(made) / "disk.img"
        image.write_bytes(bytes(MIB))
        here = Bridged(Path(made) / "here", image)
        here.power_on()
        function = here.bridge.function
        samples: list[list[float]] = [[], []]
        for _ in range(scale.runs(7)):
            samples[0].append(_rate(reads, lambda: here.read(_SCNTL1)))
            samples[1].append(_rate(reads, lambda: function.read(0, _SCNTL1, 1)))
        yield Figure("x-remote", "register reads through the bridge", "1/s", *samples, "raw: MPQemuMsg")
        parts: dict[str, list[float]] = {"stop and save": [], "load": [], "go on": []}
        for number in range(scale.runs(20)):
            there = Bridged(Path(made) / str(number), image, incoming=True)
            here.go("PRE_COPY")
            parts["stop and save"].append(_ms(lambda: here.go("STOP_COPY")))
            size = carry(here, there)
            there.runtime.stage(here.runtime.save_as(1))
            parts["load"].append(_ms(there.runtime.apply))
            there.close()
            parts["go on"].append(_ms(lambda: here.go("RUNNING")))
        for what, found in parts.items():
            yield Figure("x-remote", f"LSI 53C895A: {what}", "ms", found, note=f"{size} bytes of stream")
        here.close()


def _rate(count: int, once: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(count):
        once()
    return count / (time.perf_counter() - start)


def _ms(once: Callable[[], object]) -> float:
    start = time.perf_counter()
    once()
    return (time.perf_counter() - start) * 1e3
