"""`ferry show`: one job as it is now."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from migrate.cli.words import add_bus, add_json, explain

if TYPE_CHECKING:
    from migrate.client import JobStatus


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "One job as it is now, or as it ended: where it stands, its limits, its outcome with every reason. All its events, as\n"
        "they were: `ferry events JOB`.",
        "ferry show web1\nferry show 3f09c2d1 --json",
    )
    parser.add_argument(
        "job", metavar="JOB", help="its id, the beginning of one, or a machine: the newest of it"
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import sys
    from dataclasses import asdict

    from migrate.cli.output import Output
    from migrate.cli.session import with_client

    output = Output(sys.stdout, sys.stderr, json=args.json)
    job = with_client(args, lambda host: host.find_job(args.job))
    output.event({"event": "job", **asdict(job)})
    output.event({"event": "outcome", "outcome": "shown", "exit_code": 0})
    for line in lines(job):
        output.data(line)
    return 0


def lines(job: JobStatus) -> list[str]:
    from migrate.cli.report import duration, size
    from migrate.errors import Reason

    ended = job.state == "ended"
    rows = [
        ("job", job.id),
        (job.kind, f"{job.machine}, {'from' if job.kind == 'incoming' else 'to'} {job.to}"),
        ("started", when(job.started_at)),
        ("state", f"{job.outcome} (exit {job.exit_code}), runs on: {job.running_on}" if ended else job.state),
        ("phase", job.phase or "-"),
    ]
    if job.round:
        rows.append(
            (
                "memory",
                f"round {job.round}, sent {size(job.sent_bytes)}, remaining {size(job.remaining_bytes)}",
            )
        )
        rows.append(("rates", f"dirty {size(job.dirty_rate)}/s, send {size(job.send_rate)}/s"))
    if job.kind == "migrate":
        limit = f"{size(job.bandwidth)}/s" if job.bandwidth else "no limit"
        rows.append(("limits", f"downtime {duration(job.downtime_limit_ms)}, bandwidth {limit}"))
    if job.downtime_ms >= 0:
        rows.append(("downtime", duration(job.downtime_ms)))
    elif job.expected_downtime_ms and not ended:
        rows.append(("downtime", f"expected {duration(job.expected_downtime_ms)}"))
    reasons = [
        Reason(item.get("device") or None, *(item.get(key, "") for key in _KEYS)) for item in job.reasons
    ]
    rows += [("reason", str(reason)) for reason in reasons]
    return [f"{name:<9} {value}" for name, value in rows]


_KEYS = ("phase", "reason", "remedy")


def when(seconds: float) -> str:
    """In the time of who reads it."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"
