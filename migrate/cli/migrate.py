"""`ferry migrate`."""

from __future__ import annotations

import argparse
import os

from migrate.cli.words import add_bus, add_json, explain, positive, rate


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Move a running machine to another host. Both sides check everything first, and say every reason against it;\n"
        "whatever fails before the last word, the machine goes on here. Ctrl-C takes the migration back.\n\n"
        "A destination is tls://HOST:PORT, unix:/PATH, or exec:COMMAND such as 'exec:ssh hostb ferry accept'.",
        "ferry migrate web1 --to tls://hostb.example:4789\n"
        "ferry migrate web1 --to 'exec:ssh hostb ferry accept' --connections 2 --downtime 50\n"
        "ferry migrate web1 --to tls://hostb.example:4789 --bandwidth 100M --timeout 600 --on-stall extend-downtime",
        (0, 1, 2, 3, 4, 130),
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument("--to", metavar="URI", required=True, help="the destination")
    parser.add_argument(
        "--connections",
        metavar="N",
        type=_connections,
        default=1,
        help="page channels, 1 to 16 (default 1); 0: pages go with the control messages",
    )
    parser.add_argument(
        "--downtime",
        metavar="MS",
        type=positive,
        default=300,
        help="how long the guest may stand still (default 300)",
    )
    parser.add_argument(
        "--bandwidth",
        metavar="RATE",
        type=rate,
        default=0,
        help="bytes a second that memory may take, such as 100M (K, M, G: powers of 1024; default: no limit)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive,
        default=0,
        help="give up when the guest could not be stopped by then (default: none)",
    )
    parser.add_argument(
        "--on-stall",
        choices=("abort", "extend-downtime", "wait"),
        default="abort",
        help="when rounds no longer bring the rest down: give up (the default), allow up to 8 times the downtime, or go on",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare both memories and all devices while stopped; costs downtime",
    )
    parser.add_argument("--keep", metavar="DIR", default="", help="leave the devices' state blobs there")
    parser.add_argument("--hold", metavar="POINT", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--doubt-seconds", type=positive, default=30, help=argparse.SUPPRESS)
    add_bus(parser)
    add_json(parser)


def _connections(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 16:
        raise argparse.ArgumentTypeError(f"{value} is not 0 to 16")
    return value


# What argparse says of words that are no numbers at all.
_connections.__name__ = "number of connections"


def run(args: argparse.Namespace) -> int:
    import sys

    from migrate.bus.host import HostClient, MigrateOptions
    from migrate.cli.following import follow
    from migrate.cli.output import Output
    from migrate.cli.report import Report
    from migrate.cli.session import with_host

    output = Output(sys.stdout, sys.stderr, json=args.json)
    report = Report(output)
    options = MigrateOptions(
        connections=args.connections,
        downtime_ms=args.downtime,
        verify=args.verify,
        keep=os.path.abspath(args.keep) if args.keep else "",
        hold=",".join(args.hold),
        doubt_seconds=args.doubt_seconds,
        bandwidth=args.bandwidth,
        timeout_seconds=args.timeout,
        on_stall=args.on_stall,
    )

    async def migrate(client: HostClient) -> int:
        job = await client.migrate(args.name, args.to, options)
        return await follow(client, job, args.name, output, report.show, cancels=True)

    return with_host(args, migrate)
