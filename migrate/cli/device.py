"""`ferry device check`."""

from __future__ import annotations

import argparse

from migrate.cli.words import add_json, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "A conformance run against any process that exports org.qemu.VMState1 on a bus, in whatever language it is written;\n"
        "where it has org.vmferry.Device1, the fuller run. It saves, loads, stops and starts the device, and leaves it as it\n"
        "found it if it can: give it an instance that was started for this. Each line says what it means for a migration.",
        "ferry device check unix:path=/tmp/test/bus\nferry device check unix:path=/tmp/test/bus --id uart0 --json",
    )
    words = parser.add_subparsers(dest="action", required=True, metavar="check")
    check = words.add_parser("check", help="run it", prog="ferry device check")
    check.description = "Exit code 0: no [FAIL], 1: some."
    check.add_argument("address", metavar="ADDRESS", help="of a message bus, such as unix:path=/tmp/test/bus")
    check.add_argument(
        "--id", metavar="ID", default="", help="only the device of this Id (default: all on the bus)"
    )
    check.add_argument(
        "--timeout", metavar="S", type=float, default=30.0, help="for one answer, seconds (default 30)"
    )
    check.add_argument("--force", action="store_true", help="also where a machine's supervisor is on the bus")
    add_json(check)


def run(args: argparse.Namespace) -> int:
    import asyncio
    import sys

    from migrate.bus import Bus
    from migrate.cli.output import Output
    from migrate.errors import UsageError
    from migrate.testing.conformance import CHECKS, Verdict, conform

    output = Output(sys.stdout, sys.stderr, json=args.json)
    if not 0 < args.timeout <= 600:
        raise UsageError(
            f"--timeout {args.timeout:g} is not 0 to 600 seconds", remedy="30 is longer than QEMU waits"
        )

    async def check() -> int:
        bus = await Bus.connect(args.address)
        counts = dict.fromkeys(Verdict, 0)
        device = ""
        try:
            async for found in conform(bus, args.id, timeout=args.timeout, force=args.force):
                counts[found.verdict] += 1
                output.event(
                    {"event": "finding", "device": found.device, "check": found.id, "verdict": found.verdict,
                     "what": CHECKS[found.id].what, "text": found.text,
                     "means": found.means if found.verdict is not Verdict.OK else ""}
                )  # fmt: skip
                if found.device != device:
                    device = found.device
                    output.data(f"{device}:")
                mark = "[ OK ]" if found.verdict is Verdict.OK else f"[{found.verdict}]"
                output.data(f"{mark} {found.id:22} {CHECKS[found.id].what}: {found.text}")
                if found.verdict is not Verdict.OK:
                    output.data(f"       → {found.means}")
        finally:
            await bus.close()
        code = int(counts[Verdict.FAIL] > 0)
        output.event(
            {"event": "outcome", "outcome": "failed" if code else "passed", "exit_code": code,
             **{str(verdict).lower(): count for verdict, count in counts.items()}}
        )  # fmt: skip
        said = f"{counts[Verdict.OK]} passed, {counts[Verdict.WARN]} warnings, {counts[Verdict.FAIL]} failed"
        if code:
            output.complain(f"{said} (mend what is marked [FAIL])")
        else:
            output.say(said)
        return code

    return asyncio.run(check())
