"""`ferry cancel`."""

from __future__ import annotations

import argparse

from migrate.cli.words import add_bus, add_json, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Take a migration back, on the host that the machine comes from: it goes on there. Once COMMIT is written there is\n"
        "nothing to take back any more; then this does nothing.",
        "ferry cancel web1",
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from migrate.cli.session import tell

    return tell(args, "cancelling", lambda client: client.cancel(args.name))
