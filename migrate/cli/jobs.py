"""`ferry jobs`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from migrate.cli.words import add_bus, add_json, explain

if TYPE_CHECKING:
    from migrate.client import JobStatus

_HEAD = ("JOB", "STARTED", "MACHINE", "KIND", "STATE", "OUTCOME", "TO")
#: Of the id: enough to tell 200 jobs apart, and what `ferry show` takes.
_SHOWN = 8


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "The jobs of this host, the oldest first: those that go on, and the last 200 that have ended, also before the daemon was\n"
        "started again. More of one: `ferry show JOB`.",
        "ferry jobs\nferry jobs --json | jq .outcome",
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import sys
    from dataclasses import asdict

    from migrate.cli.list import table
    from migrate.cli.output import Output
    from migrate.cli.session import with_client

    output = Output(sys.stdout, sys.stderr, json=args.json)
    jobs = with_client(args, lambda host: host.jobs())
    for job in jobs:
        output.event({"event": "job", **asdict(job)})
    output.event({"event": "outcome", "outcome": "listed", "exit_code": 0})
    if jobs:
        for line in table([_HEAD, *(_row(job) for job in jobs)]):
            output.data(line)
    else:
        output.say("no job has been here yet; start one with `ferry migrate`")
    return 0


def _row(job: JobStatus) -> tuple[str, ...]:
    from migrate.cli.show import when

    return (
        job.id[:_SHOWN], when(job.started_at), job.machine, job.kind,
        job.state if job.state == "ended" else f"{job.state}: {job.phase}".rstrip(": "),
        job.outcome or "-", job.to,
    )  # fmt: skip
