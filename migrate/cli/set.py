"""`ferry set`: other limits for a migration that goes on."""

from __future__ import annotations

import argparse

from migrate.cli.words import add_bus, add_json, explain, positive, rate


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Change the limits of a migration while it goes on, on the host that the machine comes from. They hold at once; what\n"
        "is not given stays as it is. What holds afterwards is on the progress line of `ferry migrate` and in `ferry show`.",
        "ferry set web1 --bandwidth none\nferry set web1 --bandwidth 50M --downtime 1000",
    )
    parser.add_argument("name", metavar="NAME", help="the machine, or the job")
    parser.add_argument(
        "--bandwidth",
        metavar="RATE",
        type=rate,
        default=-1,
        help="bytes a second that memory may take, such as 100M (K, M, G: powers of 1024); none: no limit",
    )
    parser.add_argument(
        "--downtime", metavar="MS", type=positive, default=-1, help="how long the guest may stand still"
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from migrate.bus.host import Limits
    from migrate.cli.session import tell

    limits = Limits(downtime_ms=args.downtime, bandwidth=args.bandwidth)
    return tell(args, "limits changed", lambda client: client.set_limits(args.name, limits))
