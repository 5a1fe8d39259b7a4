"""QEMU to QEMU with dbus-vmstate and nothing of ours between: with its own capabilities, or with return-path as libvirt has."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from qemu.qmp import ExecuteError, QMPClient, QMPError

from migrate.bus import Bus, PrivateBus
from tests.interop.eleven.rows import Record, Row, Words

QEMU: Final = os.environ.get("FERRY_QEMU", "qemu-system-x86_64")
ROOT: Final = Path(__file__).parents[3]
_ENDED: Final = ("completed", "failed", "cancelled")


class Side:
    """One QEMU, its bus and its helpers."""

    def __init__(self, directory: Path, helpers: dict[str, Words], *words: str) -> None:
        self.directory, self.helpers, self.words = directory, helpers, words
        self.qmp = QMPClient(directory.name)
        self.private = PrivateBus(directory / "bus")
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        self.directory.mkdir()
        await self.private.start()
        address = self.private.address
        for name, words in self.helpers.items():
            command = ["-m", "tests.interop.eleven.helper", "--id", name, "--bus", address, *words]
            self.processes.append(await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT))
        bus = await Bus.connect(address)
        async with asyncio.timeout(30):
            while len(await bus.queued_owners("org.qemu.VMState1")) < len(self.helpers):
                await asyncio.sleep(0.02)
        await bus.close()
        with (self.directory / "stderr").open("wb") as err:
            self.qemu = await asyncio.create_subprocess_exec(
                QEMU, "-M", "pc", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none",
                "-qmp", f"unix:{self.directory}/qmp,server=on,wait=off",
                "-object", f"dbus-vmstate,id=dv,addr={address}{self.words[0]}", *self.words[1:],
                stderr=err, stdin=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        self.processes.append(self.qemu)
        async with asyncio.timeout(30):
            while True:
                try:
                    await self.qmp.connect(f"{self.directory}/qmp")
                    return
                except (QMPError, OSError, EOFError):
                    await asyncio.sleep(0.02)

    async def ask(self, command: str, seconds: float = 5.0, **arguments: Any) -> Any:
        """None where QEMU is gone or says nothing in time."""
        try:
            return await asyncio.wait_for(
                asyncio.shield(self.qmp.execute(command, arguments or None)), seconds
            )
        except (ExecuteError, QMPError, OSError, EOFError, TimeoutError):
            return None

    async def runstate(self) -> str:
        """What QEMU says, or how it ended."""
        if self.qemu.returncode is None:
            found = await self.ask("query-status")
            if found is not None:
                return str(found["status"])
            await asyncio.sleep(0.3)
        code = self.qemu.returncode
        if code is None:
            return "silent"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"

    def said(self) -> list[str]:
        return (self.directory / "stderr").read_text(errors="replace").splitlines()

    async def stop(self) -> None:
        try:
            await asyncio.wait_for(self.qmp.disconnect(), 2.0)
        except (QMPError, OSError, EOFError, TimeoutError):
            pass
        for process in self.processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        await self.private.stop()


async def version() -> str:
    process = await asyncio.create_subprocess_exec(QEMU, "--version", stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return out.decode().split("version ")[1].split()[0]


async def run(row: Row, *, return_path: bool) -> Record:
    """One row, from nothing to nothing."""
    record = Record(row.name, "return-path" if return_path else "default")
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    listed = f",id-list={',,'.join(row.id_list)}" if row.id_list else ""
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        source = Side(directory / "a", row.source, listed)
        destination = Side(directory / "b", row.destination, "", "-incoming", "defer")
        for side in (source, destination):
            stack.push_async_callback(side.stop)
            await side.start()
        capabilities = [{"capability": name, "state": return_path} for name in ("return-path",)]
        for side in (source, destination):
            await side.ask("migrate-set-capabilities", capabilities=capabilities)
        uri = f"unix:{directory}/migration"
        await destination.ask("migrate-incoming", uri=uri)
        await source.ask("migrate", uri=uri)
        frozen = await _follow(source, row.seconds)
        await asyncio.sleep(1.0)  # a destination that fails takes a moment to say so
        info = await source.ask("query-migrate") or {}
        here, there = await source.runstate(), await destination.runstate()
        record.status = str(info.get("status", here))
        record.reason = str(info.get("error-desc", ""))
        record.guest = {
            (True, False): "source",
            (False, True): "destination",
            (True, True): "both",
            (False, False): "nowhere",
        }[here == "running", there == "running"]
        record.frozen_ms = max(frozen, float(info.get("downtime", 0)))
        record.note = f"source: {here}; destination: {there}"
    return record


async def _follow(source: Side, seconds: float) -> float:
    """Until it has ended, one way or another; the longest time for which QEMU's monitor said nothing, ms."""
    deadline, longest = time.monotonic() + seconds, 0.0
    while time.monotonic() < deadline:
        start = time.monotonic()
        info = await source.ask("query-migrate", seconds)
        took = (time.monotonic() - start) * 1000
        longest = max(longest, took if took > 100 else 0.0)
        if info is None or info.get("status") in _ENDED:
            return longest
        await asyncio.sleep(0.02)
    return longest


async def all_of(rows: tuple[Row, ...], at_once: int = 4) -> list[Record]:
    """Every row in both modes; they wait most of the time, so several go on at once."""
    gate = asyncio.Semaphore(at_once)

    async def one(row: Row, return_path: bool) -> Record:
        async with gate:
            return await run(row, return_path=return_path)

    longest_first = sorted(rows, key=lambda row: -row.seconds)
    return list(await asyncio.gather(*(one(row, mode) for row in longest_first for mode in (False, True))))
