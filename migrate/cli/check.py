"""`ferry check`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from migrate.cli.words import add_bus, add_json, explain

if TYPE_CHECKING:
    from migrate.cli.output import Output


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Ask a destination whether this machine could go there: memory, every device with its versions, certificates.\n"
        "All reasons against it come at once; nothing moves and the guest does not notice.",
        "ferry check web1 --to tls://hostb.example:4789",
        (0, 1, 2, 3),
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "--to", metavar="URI", required=True, help="the destination; see `ferry migrate --help`"
    )
    add_bus(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import sys

    from migrate.bus.host import HostClient, MigrateOptions
    from migrate.cli.following import follow
    from migrate.cli.output import Output
    from migrate.cli.session import with_host

    output = Output(sys.stdout, sys.stderr, json=args.json)

    async def check(client: HostClient) -> int:
        machines = await client.list_machines()
        machine = next((found for found in machines if found["name"] == args.name), {})
        shown = Checklist(output, machine, args.to)
        job = await client.migrate(args.name, args.to, MigrateOptions(check_only=True))
        return await follow(client, job, args.name, output, shown.show, cancels=True)

    return with_host(args, check)


class Checklist:
    """One line a thing that was looked at: [ OK ], [WARN] or [FAIL]."""

    def __init__(self, output: Output, machine: Mapping[str, Any], to: str) -> None:
        """:param machine: what Describe says of it."""
        self._output = output
        self._machine = machine
        self._to = to
        self._warnings: list[str] = []

    def show(self, event: Mapping[str, Any]) -> None:
        from migrate.cli.report import warning_of

        self._output.event(event)
        if event.get("event") == "warning":
            self._warnings.append(warning_of(event))
        elif event.get("event") == "outcome":
            self._end(event)

    def _end(self, event: Mapping[str, Any]) -> None:
        from migrate.cli.report import reasons_of, size

        passed = event.get("outcome") == "checked"
        against = [] if passed else reasons_of(event)
        if passed or event.get("outcome") == "refused":
            blamed = {reason.device for reason in against}
            if None not in blamed:
                total = sum(region["size"] for region in self._machine.get("regions", []))
                self._output.data(f"[ OK ] memory: {size(total)}")
            for device in self._machine.get("devices", []):
                if device["id"] not in blamed:
                    version = f" version {device['version']}" if device.get("version") else ""
                    self._output.data(f"[ OK ] {device['id']}: {device['type']}{version}")
        for warning in self._warnings:
            self._output.data(f"[WARN] {warning}")
        for reason in against:
            self._output.data(f"[FAIL] {reason}")
        name = self._machine.get("name", "the machine")
        if passed:
            self._output.say(f"{name} could go to {self._to}")
        else:
            self._output.complain(f"{name} cannot go to {self._to} (mend what is marked [FAIL])")
