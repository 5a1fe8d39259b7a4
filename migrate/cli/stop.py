"""`ferry stop`."""

from __future__ import annotations

import argparse

from migrate.cli.words import add_bus, add_json, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "End a machine and all of its processes; its memory is gone then. Refused while it is being moved or in doubt,\n"
        "unless with --force: then it ends whatever goes on.",
        "ferry stop web1",
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "--force",
        action="store_true",
        help="also where a copy of it may be the only one left, and where it hangs",
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from migrate.cli.session import tell

    return tell(args, "ended", lambda client: client.stop_machine(args.name, force=args.force))
