"""`ferry events`: what happens on a host, or happened in one job."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from migrate.cli.words import add_bus, add_json, explain

#: What an event is, and goes without saying, on its line for people.
_HIDDEN = frozenset({"event", "job", "rounds", "spec"})


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Follow what happens on this host, all jobs and machines, until Ctrl-C; or with JOB, all events of that one, to its end.",
        "ferry events --json\nferry events 3f09c2d1",
    )
    parser.add_argument(
        "job", metavar="JOB", nargs="?", help="as for `ferry show`; default: everything from now on"
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import contextlib
    import sys

    from migrate.bus.host import HostClient
    from migrate.cli.output import Output
    from migrate.cli.session import with_client, with_host
    from migrate.client import Host

    output = Output(sys.stdout, sys.stderr, json=args.json)

    def show(event: Mapping[str, Any]) -> None:
        output.event(event)
        output.data(line(event))

    async def everything(host: Host) -> None:
        async with contextlib.aclosing(host.events()) as events:
            async for event in events:
                if event["event"] == "following":
                    output.say("following; Ctrl-C ends it")
                else:
                    show(event)

    async def one(client: HostClient) -> None:
        async with contextlib.aclosing(client.follow(job.id)) as events:
            async for event in events:
                show({**event, "job": job.id})

    try:
        if args.job is None:
            with_client(args, everything)
        else:
            job = with_client(args, lambda host: host.find_job(args.job))
            with_host(args, one)
    except KeyboardInterrupt:
        pass  # how following ends
    return 0


def line(event: Mapping[str, Any]) -> str:
    """One event for people: the job's beginning, what it is, and its words."""
    import json

    def shown(value: object) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    words = [
        f"{key}={shown(value)}"
        for key, value in event.items()
        if key not in _HIDDEN and value not in ("", None)
    ]
    return " ".join([str(event.get("job", ""))[:8] or "-", str(event.get("event")), *words])
