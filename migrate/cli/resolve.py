"""`ferry resolve`."""

from __future__ import annotations

import argparse

from migrate.cli.words import add_bus, add_json, explain

_FENCING = (
    "Fencing means: make sure that the other host cannot run this machine, now or later. Power it off, or cut it from the\n"
    "machine's network and storage; that it does not answer is not enough, for it may run there all the same. Two running\n"
    "copies of one machine destroy its disks."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Decide who runs a machine that is in doubt (or held, on the other host), because the other host will not answer.\n"
        "`ferry recover` asks it instead, and is always safe.\n\n" + _FENCING,
        "ferry resolve web1 --keep source --fenced",
        (0, 1, 2),
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "--keep",
        choices=("source", "destination"),
        required=True,
        help="which copy goes on; said on either host, it means the same",
    )
    parser.add_argument(
        "--fenced", action="store_true", help="the other host is fenced; you have made sure of that"
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import sys

    from migrate.cli.output import Output
    from migrate.cli.session import with_host
    from migrate.errors import Phase, UsageError

    output = Output(sys.stdout, sys.stderr, json=args.json)
    if not args.fenced:
        output.say(_FENCING)
        raise UsageError(
            f"nothing was decided: only you can know that the other host does not run {args.name}",
            phase=Phase.RECOVER,
            remedy="fence it, then say so with --fenced",
        )
    state = with_host(args, lambda client: client.resolve(args.name, args.keep))
    output.say(f"{args.name}: the {args.keep} keeps it; here it is {state}")
    output.event({"event": "outcome", "outcome": state, "machine": args.name, "exit_code": 0})
    return 0
