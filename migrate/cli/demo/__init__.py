"""`ferry demo`: two hosts, mutual TLS over loopback, a guest that runs and checks itself all the while.

Nothing here is known to the rest of vmferry: the demo starts real daemons and talks to them as `ferry` does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from migrate.errors import FerryError, InterruptedByUser, Phase, UsageError

if TYPE_CHECKING:
    from migrate.cli.demo.stage import Options

#: What a host takes (migrate.host.service).
MAX_DOWNTIME_MS = 3_600_000
QEMU = "qemu-system-x86_64"

HELP = "move a running guest between two hosts on this machine, and prove that nothing was lost"


def arguments(parser: argparse.ArgumentParser) -> None:
    from migrate.cli.demo.scenarios import SCENARIOS
    from migrate.cli.words import explain

    lines = "\n".join(f"  {name:20} {item.about}" for name, item in SCENARIOS.items())
    explain(
        parser,
        "Starts two hosts (daemons, certificates, a machine whose devices are processes), moves the running guest\n"
        "from one to the other by mutual TLS over loopback, and checks both sides afterwards.\n\nscenarios:\n"
        + lines,
        "ferry demo\nferry demo --scenario commit-lost --json",
        (0, 1, 2, 3, 4, 130),
    )
    parser.add_argument(
        "--scenario", choices=SCENARIOS, default="completed", metavar="NAME", help="see above"
    )
    parser.add_argument(
        "--at", default="", metavar="PLACE", help="where it strikes: round-2 or switchover; before or after"
    )
    parser.add_argument(
        "--destination-gone", action="store_true", help="commit-lost: the destination never comes back"
    )
    parser.add_argument(
        "--back", action="store_true", help="completed: then migrate back, as a second run of the same"
    )
    parser.add_argument(
        "--vmm", choices=["embedded", "qemu"], default="embedded",
        help="what runs the guest: our own small VMM, or QEMU with a Linux guest (default embedded)",
    )  # fmt: skip
    parser.add_argument(
        "--devices", choices=["bus", "vfio-user", "x-remote"], default="bus",
        help="what the devices speak besides vfio-user with the VMM: D-Bus; nothing, each behind a bridge; or D-Bus, with a "
        "SCSI controller and disk in a QEMU of the type x-remote beside them, behind a bridge",
    )  # fmt: skip
    parser.add_argument("--memory", default="", metavar="SIZE", help="of the guest (default 256 MiB)")
    parser.add_argument(
        "--dirty-rate",
        default="",
        metavar="SIZE",
        help='what the guest rewrites a second: "25M", "0" or "max"',
    )
    parser.add_argument(
        "--tracker", choices=["scan", "log", "compare"], default="", help="dirty tracking (default: the best)"
    )
    parser.add_argument(
        "--connections", type=int, default=1, metavar="N", help="page channels, 0 to 16 (default 1)"
    )
    parser.add_argument(
        "--downtime", type=int, default=300, metavar="MS", help="downtime limit (default 300)"
    )
    parser.add_argument("--keep", default="", metavar="DIR", help="leave blobs, ledgers and logs there")
    parser.add_argument("--json", action="store_true", help="one object a line; the last one is the outcome")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(_options(args), as_json=args.json))


def _options(args: argparse.Namespace) -> Options:
    """What was asked for, looked at before anything is started.

    :raises UsageError: for words that are wrong, or do not go together.
    """
    from migrate.cli.demo.scenarios import SCENARIOS
    from migrate.cli.demo.stage import Options
    from migrate.machine.config import parse_size

    places = SCENARIOS[args.scenario].places or ("",)
    at = args.at or places[0]
    if at not in places:
        raise UsageError(
            f"--at {args.at} is no place of {args.scenario}",
            remedy=f"one of: {', '.join(filter(None, places)) or 'none'}",
        )
    if args.destination_gone and args.scenario != "commit-lost":
        raise UsageError(
            f"--destination-gone does not go with {args.scenario}", remedy="add --scenario commit-lost"
        )
    if args.destination_gone and at == "after":
        raise UsageError(
            "--destination-gone does not go with --at after: the guest has run there and written to its disk, "
            "so the older copy here must not be brought back",
            remedy="leave out one of the two",
        )
    if args.back and args.scenario != "completed":
        raise UsageError(
            f"--back does not go with {args.scenario}, which does not move the machine",
            remedy="leave out one of the two",
        )
    if args.memory:
        parse_size(args.memory, "--memory")
    if args.tracker and args.vmm == "qemu":
        raise UsageError(
            "--tracker does not go with --vmm qemu, which has its own", remedy="leave out one of the two"
        )
    if args.devices == "vfio-user" and (args.vmm == "qemu" or args.tracker == "scan"):
        raise UsageError(
            "--devices vfio-user goes with the embedded VMM, and the trackers log and compare",
            remedy="leave out one of the two",
        )
    if args.devices == "x-remote" and args.vmm == "qemu":
        raise UsageError("--devices x-remote goes with the embedded VMM", remedy="leave out one of the two")
    if args.devices == "x-remote" and shutil.which(QEMU) is None:
        raise UsageError(f"--devices x-remote needs {QEMU}", remedy="install it (Debian: qemu-system-x86)")
    if args.devices == "vfio-user" and SCENARIOS[args.scenario].destination_toml:
        raise UsageError(
            f"--devices vfio-user does not go with {args.scenario}, which needs devices on the bus",
            remedy="leave out one of the two",
        )
    if args.dirty_rate not in ("", "0", "max"):
        parse_size(args.dirty_rate, "--dirty-rate")
    if not 0 <= args.connections <= 16:
        raise UsageError(
            f"--connections {args.connections} is not 0 to 16", remedy="4 is plenty for loopback"
        )
    if not 0 < args.downtime <= MAX_DOWNTIME_MS:
        raise UsageError(f"--downtime {args.downtime} is not 1 to {MAX_DOWNTIME_MS}", remedy="try 300")
    return Options(
        args.scenario, at, args.destination_gone, args.memory, args.vmm, args.dirty_rate, args.tracker,
        args.connections, args.downtime, _directory_to_keep(args.keep), args.devices, args.back,
    )  # fmt: skip


def _directory_to_keep(name: str) -> str:
    """An absolute path that can be written to: a demo that has run for nothing is worse than one that did not start."""
    if not name:
        return ""
    path = os.path.abspath(name)
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"--keep {name}: nothing can be written there: {error.strerror}", remedy="name another directory"
        ) from None
    return path


async def _run(options: Options, *, as_json: bool) -> int:
    play = asyncio.ensure_future(_play(options, as_json=as_json))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, play.cancel)
    try:
        return await play
    except asyncio.CancelledError:
        raise InterruptedByUser(
            "the demo was interrupted; everything it started is gone", phase=Phase.RUNNING
        ) from None


async def _play(options: Options, *, as_json: bool) -> int:
    from migrate.cli.demo import report
    from migrate.cli.demo.scenarios import SCENARIOS
    from migrate.cli.demo.stage import open_stage

    scenario = SCENARIOS[options.scenario]

    def say(text: str) -> None:
        _print({"event": "demo", "says": text} if as_json else f"· {text}", as_json)

    def tell(event: dict[str, Any]) -> None:
        if as_json:
            if event.get("event") != "outcome":
                _print(event, as_json)
        elif (line := report.line(event)) is not None:
            _print(line, as_json)

    stage = open_stage(options, say, tell, relay=scenario.relay)
    try:
        say(f"scenario {options.scenario}: {scenario.about}")
        stage.configure(scenario.destination_toml)
        if stage.relay is not None:
            await stage.relay.start()
        await asyncio.gather(stage.source.start(), stage.destination.start(scenario.destination_hold(stage)))
        if not options.tracker and options.vmm == "embedded":
            _say_tracker(say)
        await stage.boot()
        outcome = await stage.judge(await scenario.play(stage))
        if options.back and outcome["outcome"] == "completed":
            _tell_outcome({**outcome, "event": "there"}, as_json)
            say("and back")
            stage.turn_round()
            outcome = await stage.judge(await scenario.play(stage))
    finally:
        await stage.close()
    if outcome["guest"]["corrupt"] or outcome["guest"]["missed"]:
        wrong = FerryError(
            "the guest found something corrupt or missing"
            + (f": {stage.strange!r}" if stage.strange else ""),
            phase=Phase.RUNNING,
            remedy="run again with --keep and report it",
        )
        outcome["exit_code"] = wrong.exit_code
        outcome["reasons"].append(wrong.as_reason().to_wire())
    _tell_outcome(outcome, as_json)
    return int(outcome["exit_code"])


def _tell_outcome(outcome: dict[str, Any], as_json: bool) -> None:
    from migrate.cli.demo import report

    if as_json:
        _print(outcome, as_json)
    else:
        for line in report.summary(outcome):
            print(line)


def _say_tracker(say: Any) -> None:
    from migrate.errors import TrackerError
    from migrate.memory import prove

    try:
        prove.prove("scan")
    except TrackerError as error:
        say(
            f"this kernel has no `scan` ({error.reason}): dirty pages are tracked with `{prove.choose(None)}`"
        )


def _print(what: Any, as_json: bool) -> None:
    sys.stdout.write((json.dumps(what, separators=(",", ":")) if as_json else str(what)) + "\n")
    sys.stdout.flush()
