"""`ferry recover`."""

from __future__ import annotations

import argparse

from migrate.cli.words import add_bus, add_json, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Ask the other host who runs a machine that is in doubt: COMMIT was sent to it, and no answer came. The daemon asks by\n"
        "itself, for ever; this shows it, and waits for the answer. The machine stands still meanwhile, both copies intact.\n\n"
        "Is the other host gone for good? Fence it, then `ferry resolve`.",
        "ferry recover web1",
        (0, 1, 2, 4, 130),
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="how long to wait for the answer (default 30)",
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import asyncio
    import sys

    from migrate.bus.host import HostClient
    from migrate.cli.following import follow
    from migrate.cli.output import Output
    from migrate.cli.report import Report
    from migrate.cli.session import with_host
    from migrate.errors import InDoubtError, Phase

    output = Output(sys.stdout, sys.stderr, json=args.json)
    report = Report(output)

    async def recover(client: HostClient) -> int:
        job = await client.recover(args.name)
        try:
            async with asyncio.timeout(args.wait):
                return await follow(client, job, args.name, output, report.show, cancels=False)
        except TimeoutError:
            raise InDoubtError(
                f"{args.name} is still in doubt after {args.wait:g} s; the daemon goes on asking",
                phase=Phase.RECOVER,
                remedy="mend the link, or fence the other host and run `ferry resolve`",
            ) from None

    return with_host(args, recover)
