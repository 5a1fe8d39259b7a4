"""QEMU to QEMU directly beside the same guest through our relay: throughput of the first pass, and downtime with no device of ours.

Both sides send the same guest: a Linux that has filled most of its memory and leaves it alone. `raw` is QEMU by itself: plain, with
multifd over two channels, and with multifd over its own TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qemu.qmp import QMPClient

from migrate.cli.demo.linux import initramfs
from migrate.transport import pki
from tests.bench.figures import Figure, Scale
from tests.faults.leftovers import pen
from tests.faults.rig import MACHINE
from tests.interop.qemu_world import CONSOLE, QEMU, World, missing

RUNS: Final = 3
#: Of the guest, KiB: not a multiple of 256 (docs/qemu.md); and what it fills of that, MiB.
MEMORY: Final = 524296
FILLED: Final = 384
UNLIMITED: Final = 1 << 50
MB: Final = 1e6


@dataclass(frozen=True, slots=True)
class Sample:
    rate: float  #: MB/s
    downtime_ms: float


def run(scale: Scale) -> Iterator[Figure]:
    if why := missing():
        yield Figure("qemu", "relay", "MB/s", [], note=why)
        return
    memory, filled = (131080, 32) if scale.quick else (MEMORY, FILLED)
    runs = scale.runs(RUNS)
    direct = {
        name: [asyncio.run(_direct(memory, filled, multifd, tls)) for _ in range(runs)]
        for name, multifd, tls in (
            ("plain", 0, False),
            ("multifd 2", 2, False),
            ("multifd 2 over TLS", 2, True),
        )
    }
    for name, samples in direct.items():
        yield Figure("qemu", f"QEMU alone, {name}", "MB/s", [sample.rate for sample in samples])
    ferried = dict(_ferried(memory, filled, runs))
    for (transport, connections), samples in ferried.items():
        beside = direct["plain" if transport == "unix" else "multifd 2 over TLS"]
        yield Figure(
            "qemu",
            f"relay, {transport}, {connections} channel{'s' * (connections > 1)}",
            "MB/s",
            [sample.rate for sample in samples],
            [sample.rate for sample in beside],
            "beside QEMU alone, " + ("plain" if transport == "unix" else "multifd 2 over TLS"),
        )
    for (transport, connections), samples in ferried.items():
        beside = direct["plain" if connections == 1 else "multifd 2"]
        yield Figure(
            "qemu",
            f"downtime, {transport}, {connections} channel{'s' * (connections > 1)}",
            "ms",
            [sample.downtime_ms for sample in samples],
            [max(sample.downtime_ms, 1.0) for sample in beside],
            "beside what QEMU alone says of itself",
        )


def _words(filled: int) -> str:
    return f"tick=20 dirty={filled} rate=0"


# -- QEMU alone --------------------------------------------------------------------------------------------------------------


class _Side:
    def __init__(self, directory: Path, memory: int, filled: int, *more: str) -> None:
        directory.mkdir()
        self.directory = directory
        self.qmp = QMPClient(directory.name)
        kernel = initramfs.find_kernel()
        archive = directory / "initramfs"
        archive.write_bytes(initramfs.build(kernel))
        self.process = subprocess.Popen(
            [
                QEMU, "-machine", "q35,memory-backend=m", "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot",
                "-object", f"memory-backend-memfd,id=m,size={memory}K,share=on", "-m", f"size={memory}K",
                "-kernel", str(kernel.image), "-initrd", str(archive), "-append", f"{initramfs.APPEND} {_words(filled)}",
                "-chardev", CONSOLE.replace("{dir}", str(directory)), "-serial", "chardev:console",
                "-qmp", f"unix:{directory}/qmp,server=on,wait=off", *more,
            ]
        )  # fmt: skip

    async def connect(self) -> None:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(Exception):
                    await self.qmp.connect(f"{self.directory}/qmp")
                    return
                await asyncio.sleep(0.05)

    async def works(self) -> None:
        async with asyncio.timeout(90):
            while b"tick 20 " not in self._said():
                await asyncio.sleep(0.05)

    def _said(self) -> bytes:
        path = self.directory / "console.out"
        return path.read_bytes() if path.exists() else b""

    async def ask(self, command: str, **arguments: Any) -> Any:
        return await self.qmp.execute(command, arguments or None)

    async def stop(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.qmp.disconnect(), 2)
        self.process.kill()
        self.process.wait()


@contextlib.asynccontextmanager
async def _sides(memory: int, filled: int, tls: bool) -> AsyncIterator[tuple[_Side, _Side]]:
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    made: list[_Side] = []
    try:
        credentials = _credentials(directory) if tls else {}
        made.append(_Side(directory / "a", memory, filled, *credentials.get("client", ())))
        made.append(
            _Side(directory / "b", memory, filled, "-incoming", "defer", *credentials.get("server", ()))
        )
        for side in made:
            await side.connect()
        await made[0].works()
        yield made[0], made[1]
    finally:
        for side in made:
            await side.stop()
        shutil.rmtree(directory)


def _credentials(directory: Path) -> dict[str, Sequence[str]]:
    """Our own CA's certificates under the names that QEMU wants."""
    keys = directory / "pki"
    pki.init(keys, "bench")
    words = {}
    for endpoint, host in (("client", "hosta"), ("server", "hostb")):
        pki.issue(keys, host, ["127.0.0.1", "localhost"], 1)
        target = directory / endpoint
        target.mkdir()
        shutil.copy(keys / host / "ca.pem", target / "ca-cert.pem")
        shutil.copy(keys / host / "cert.pem", target / f"{endpoint}-cert.pem")
        shutil.copy(keys / host / "key.pem", target / f"{endpoint}-key.pem")
        words[endpoint] = (
            "-object",
            f"tls-creds-x509,id=tls0,endpoint={endpoint},dir={target},verify-peer=on",
        )
    return words


async def _direct(memory: int, filled: int, multifd: int, tls: bool) -> Sample:
    async with _sides(memory, filled, tls) as (source, destination):
        wanted = [
            {"capability": "return-path", "state": True},
            {"capability": "multifd", "state": multifd > 0},
        ]
        parameters: dict[str, Any] = {"max-bandwidth": UNLIMITED}
        if multifd:
            parameters["multifd-channels"] = multifd
        if tls:
            parameters["tls-creds"] = "tls0"
        for side in (source, destination):
            await side.ask("migrate-set-capabilities", capabilities=wanted)
            await side.ask("migrate-set-parameters", **parameters)
        if tls:
            await source.ask("migrate-set-parameters", **{"tls-hostname": "127.0.0.1"})
        uri = f"tcp:127.0.0.1:{_free_port()}" if tls else f"unix:{source.directory}/m"
        await destination.ask("migrate-incoming", uri=uri)
        await source.ask("migrate", uri=uri)
        async with asyncio.timeout(120):
            while (found := await source.ask("query-migrate"))["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.02)
        if found["status"] != "completed":
            raise RuntimeError(f"QEMU alone: {found}")
        seconds = (found["total-time"] - found["downtime"]) / 1000
        return Sample(found["ram"]["transferred"] / MB / seconds, float(found["downtime"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- through the relay -------------------------------------------------------------------------------------------------------


def _ferried(memory: int, filled: int, runs: int) -> Iterator[tuple[tuple[str, int], list[Sample]]]:
    with pen() as ground:
        world = World(ground, disks=0)
        try:
            command = [
                word.rpartition("--")[0] + "-- " + _words(filled) if word.startswith("console=") else word
                for word in world.command
            ]
            for host in world.hosts:
                host.write_toml(command)
                host.restart()
            world.run(memory=f"{memory}K", command=command, devices=False)
            here, there = world.hosts
            for transport in ("unix", "tls"):
                for connections in (1, 2, 4):
                    samples = []
                    for _ in range(runs):
                        to = there.unix if transport == "unix" else there.tls
                        said = here.ferry(
                            "migrate",
                            MACHINE,
                            "--to",
                            to,
                            "--json",
                            "--connections",
                            str(connections),
                            "--downtime",
                            "1000",
                        )
                        if said.code:
                            raise RuntimeError(repr(said))
                        outcome = said.outcome
                        first = outcome["rounds"][0]
                        samples.append(Sample(first["bytes"] / MB / first["seconds"], outcome["downtime_ms"]))
                        here, there = there, here
                        here.ticks_on(5)
                    yield (transport, connections), samples
        finally:
            world.close()
