"""`ferry run`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from migrate.cli.words import add_bus, add_json, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Start the machine of a machine.toml on this host; answers when it runs. It needs `ferry host` on this host.",
        "ferry run web1.toml\nferry console web1",
    )
    parser.add_argument("path", metavar="MACHINE.toml", type=Path, help="what the machine is")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start it although it was moved away: only where the other one is gone for good",
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import sys

    from migrate.bus.host import HostClient, RunOptions
    from migrate.cli.output import Output
    from migrate.cli.session import with_host

    output = Output(sys.stdout, sys.stderr, json=args.json)

    path = os.path.abspath(args.path)

    async def start(client: HostClient) -> int:
        name = await client.run_machine(path, RunOptions(fresh=args.fresh))
        output.say(f"{name} runs; follow it with `ferry console {name}`")
        output.event({"event": "outcome", "outcome": "running", "machine": name, "exit_code": 0})
        return 0

    return with_host(args, start)
