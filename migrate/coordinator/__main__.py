"""`python -m migrate.coordinator source|recover|destination`: the process of one migration, started by the host's daemon.

`source` and `recover` read their spec as the first line of stdin and commands (`cancel`, `continue`) as later lines; events go to
stdout, one JSON object a line, the outcome last. `destination --host-fd N` talks to the daemon over that socket (hostline.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from migrate.coordinator import destination, recover, source
from migrate.coordinator.hold import Hold
from migrate.coordinator.hostline import HostLine
from migrate.coordinator.outcome import Outcome, emit_stdout
from migrate.coordinator.spec import Spec
from migrate.errors import FerryError


async def _commands(reader: asyncio.StreamReader, actions: dict[str, Callable[..., None]]) -> None:
    """Lines `{"cmd": NAME, …}`; what else stands in them are the action's arguments."""
    while line := await reader.readline():
        words = json.loads(line)
        action = actions.get(words.pop("cmd", ""))
        if action is not None:
            action(**words)


async def _stdin() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    return reader


async def run_source() -> int:
    reader = await _stdin()
    spec = Spec(**json.loads(await reader.readline()))
    hold = Hold(spec.hold, emit_stdout)
    try:
        migration = source.SourceMigration(spec, emit_stdout, hold)
    except FerryError as error:
        return _refused(spec.job, spec.machine, spec.to, error)
    commands = asyncio.create_task(
        _commands(reader, {"cancel": migration.cancel, "continue": hold.go_on, "set": migration.change})
    )
    outcome = await migration.run()
    commands.cancel()
    emit_stdout(outcome.to_json())
    return outcome.exit_code


async def run_recover() -> int:
    reader = await _stdin()
    spec = recover.Spec(**json.loads(await reader.readline()))
    task = asyncio.create_task(recover.recover(spec, emit_stdout))
    commands = asyncio.create_task(_commands(reader, {"cancel": lambda: (task.cancel(), None)[1]}))
    outcome = await task
    commands.cancel()
    emit_stdout(outcome.to_json())
    return outcome.exit_code


async def run_destination(fd: int) -> int:
    holder: list[Hold] = []
    line = HostLine(fd, lambda command: holder[0].go_on() if holder and command == "continue" else None)
    raw, descriptors = await line.spec()
    spec = destination.Spec(**raw)
    holder.append(Hold(spec.hold, line.emit))
    outcome = await destination.DestinationMigration(spec, descriptors, line, line.emit, holder[0]).run()
    line.emit(outcome)
    return int(outcome.get("exit_code", 1))


def _refused(job: str, machine: str, to: str, error: FerryError) -> int:
    outcome: dict[str, Any] = Outcome(job, machine, to).to_json()
    outcome["reasons"] = [reason.to_wire() for reason in error.reasons()]
    outcome["exit_code"] = error.exit_code
    emit_stdout(outcome)
    return error.exit_code


def main() -> int:
    logging.basicConfig(
        level=logging.INFO,
        format="time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s",
        stream=sys.stderr,
    )
    parser = argparse.ArgumentParser(prog="python -m migrate.coordinator")
    parser.add_argument("role", choices=["source", "recover", "destination"])
    parser.add_argument("--host-fd", type=int, default=-1)
    arguments = parser.parse_args()
    if arguments.role == "destination":
        return asyncio.run(run_destination(arguments.host_fd))
    return asyncio.run(run_source() if arguments.role == "source" else run_recover())


if __name__ == "__main__":
    sys.exit(main())
