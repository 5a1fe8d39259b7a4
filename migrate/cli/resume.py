"""`ferry resume`."""

from __future__ import annotations

import argparse

from migrate.cli.words import add_bus, add_json, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Let a machine go on that `ferry pause` stopped.",
        "ferry resume web1",
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from migrate.cli.session import tell

    return tell(args, "running", lambda client: client.resume_machine(args.name))
