"""`ferry list`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from migrate.cli.words import add_bus, add_json, explain

_HEAD = ("NAME", "STATE", "MEMORY", "DEVICES", "JOB", "DETAIL")


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "The machines of this host. Beside those that run: what is being received, what is held for a source that was lost,\n"
        "and what is in doubt, also where its host was started again since.",
        "ferry list\nferry list --json | jq .state",
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import sys

    from migrate.cli.output import Output
    from migrate.cli.session import with_host

    output = Output(sys.stdout, sys.stderr, json=args.json)
    machines = with_host(args, lambda client: client.list_machines())
    for machine in machines:
        output.event({"event": "machine", **machine})
    output.event({"event": "outcome", "outcome": "listed", "exit_code": 0})
    if machines:
        for line in table([_HEAD, *(_row(machine) for machine in machines)]):
            output.data(line)
    else:
        output.say("no machine is here; start one with `ferry run MACHINE.toml`")
    return 0


def _row(machine: dict[str, Any]) -> tuple[str, ...]:
    size = sum(region["size"] for region in machine.get("regions", []))
    active = machine.get("active") or {}
    return (
        machine["name"],
        machine["state"],
        f"{size >> 20} MiB" if size else "-",
        str(len(machine.get("devices", []))) if "devices" in machine else "-",
        active.get("kind", "-"),
        machine.get("detail") or "-",
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the last one as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[-1] = 0
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
