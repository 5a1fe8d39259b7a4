"""A migration stream of a real QEMU with two device processes of ours, attached by dbus-vmstate: `python make_stream.py FILE`.

QEMU runs nothing (-S) and has the least memory that its firmware fits in, so nearly all of its pages are zero.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from migrate.bus import Bus, PrivateBus, discover

ROOT = Path(__file__).resolve().parents[2]
DEVICES = {"uart0": "devices.uart16550", "rtc0": "devices.rtc"}
QEMU = os.environ.get("FERRY_QEMU", "qemu-system-x86_64")


class Monitor:
    """QMP, as much of it as this needs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, path: Path) -> Monitor:
        while True:
            try:
                monitor = cls(*await asyncio.open_unix_connection(str(path)))
                break
            except OSError:
                await asyncio.sleep(0.02)
        await monitor._reader.readline()
        await monitor.execute("qmp_capabilities")
        return monitor

    async def execute(self, command: str, **arguments: Any) -> Any:
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(await self._reader.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


async def make(
    target: Path, *, memory: str = "1M", devices: dict[str, str] | None = None
) -> dict[str, bytes]:
    """What the devices themselves say they saved, by Id."""
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    private = PrivateBus(directory / "bus")
    await private.start()
    started = []
    try:
        for name, module in (devices or DEVICES).items():
            words = ["-m", module, "--id", name, "--bus", private.address, "--paused"]
            started.append(await asyncio.create_subprocess_exec(sys.executable, *words, cwd=ROOT))
        bus = await Bus.connect(private.address)
        while len(found := await discover(bus)) < len(devices or DEVICES):
            await asyncio.sleep(0.02)
        monitor_at = directory / "qmp"
        started.append(
            await asyncio.create_subprocess_exec(
                QEMU, "-M", "pc-i440fx-7.2", "-m", memory, "-nodefaults", "-display", "none", "-S",
                "-qmp", f"unix:{monitor_at},server=on,wait=off", "-object", f"dbus-vmstate,id=dv,addr={private.address}",
            )
        )  # fmt: skip
        async with asyncio.timeout(60):
            monitor = await Monitor.connect(monitor_at)
            saved = {name: await client.save() for name, client in found.items()}
            await monitor.execute("migrate", uri=f"exec:cat > {target}")
            while (status := (await monitor.execute("query-migrate")).get("status")) not in (
                "completed",
                "failed",
            ):
                await asyncio.sleep(0.02)
        assert status == "completed"
        await bus.close()
        return saved
    finally:
        for process in started:
            process.kill()
            await process.wait()
        await private.stop()
        shutil.rmtree(directory)


if __name__ == "__main__":
    for name, data in asyncio.run(make(Path(sys.argv[1]).absolute())).items():
        print(f"{name}: {data.hex()}")
