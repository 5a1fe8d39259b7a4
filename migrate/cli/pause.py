"""`ferry pause`."""

from __future__ import annotations

import argparse

from migrate.cli.words import add_bus, add_json, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Stop a machine's guest where it is, with all of its devices. It can be moved like that, and arrives paused.",
        "ferry pause web1",
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from migrate.cli.session import tell

    return tell(args, "paused", lambda client: client.pause_machine(args.name))
