"""Starting a supervisor, and finding those that run: what the daemon of a host does with machines.

A supervisor lives in a session of its own and survives the daemon; the daemon finds it again by its bus's socket.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from migrate.errors import BusError, DeviceError, FerryError, LedgerError, Phase, Reason, UsageError
from migrate.machine.config import MachineConfig
from migrate.machine.hostconfig import HostConfig

#: A machine of forty devices on two cores takes some ten seconds; a hung one is told of by then.
START_SECONDS = 60.0
_TREE: dict[str, type[FerryError]] = {
    kind.code: kind for kind in (UsageError, LedgerError, BusError, DeviceError)
}


@dataclass(frozen=True, slots=True)
class Launched:
    address: str  #: of the machine's private bus
    pid: int
    child: subprocess.Popen[bytes]  #: for whoever reaps it


async def launch(
    host: HostConfig, machine: MachineConfig, *, incoming: bool, fresh: bool = False
) -> Launched:
    """Start a supervisor and wait until the machine runs (or waits, when incoming).

    :raises FerryError: what the supervisor says went wrong; nothing is left behind then.
    """
    directory = host.machine_directory(machine.name)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    spec = {"host": str(host.directory), "machine": asdict(machine), "incoming": incoming, "fresh": fresh}
    reader, writer = os.pipe()
    log = os.open(directory / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # Not asyncio's: the end of an event loop kills the children that it still has.
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "migrate.machine", json.dumps(spec), str(writer)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writer], start_new_session=True,
            cwd=directory,
        )  # fmt: skip
    finally:
        os.close(log)
        os.close(writer)
    try:
        line = await asyncio.wait_for(_first_line(reader), START_SECONDS)
    except TimeoutError:
        process.kill()
        line = b""
    except asyncio.CancelledError:
        process.terminate()
        raise
    if not line:
        await asyncio.to_thread(process.wait)
        raise BusError(
            f"the supervisor of {machine.name} ended before the machine stood",
            phase=Phase.SETUP,
            remedy=f"see {directory / 'supervisor.log'}",
        )
    said = json.loads(line)
    if "error" in said:
        await asyncio.to_thread(process.wait)
        reason = Reason.from_wire(said["error"])
        kind = _TREE.get(said["code"], DeviceError)
        raise kind(reason.reason, remedy=reason.remedy, phase=reason.phase, device=reason.device)
    return Launched(said["bus"], said["pid"], process)


async def _first_line(fd: int) -> bytes:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
    )
    try:
        return await reader.readline()
    finally:
        transport.close()


def running(host: HostConfig) -> dict[str, Path]:
    """Names of machines whose private bus has a socket, and that socket. Whether somebody answers there is to be tried."""
    return {
        path.parent.name: path
        for path in sorted((host.directory / "machines").glob("*/bus"))
        if path.is_socket()
    }
