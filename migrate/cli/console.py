"""`ferry console`: what a serial port's output file says, as it grows. Needs no daemon."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from migrate.cli.words import add_directory, explain

#: How often the file is looked at, s.
_LOOK = 0.1
_CHUNK = 64 << 10


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Follow what a machine of this host writes on its serial port, from the beginning, until it ends here or Ctrl-C.",
        "ferry console web1\nferry console web1 uart1",
        (0, 1, 2),
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument("device", metavar="DEVICE", nargs="?", default="uart0", help="default: uart0")
    add_directory(parser)


def run(args: argparse.Namespace) -> int:
    import sys
    import time

    from migrate.cli.output import Output
    from migrate.cli.words import directory_of
    from migrate.errors import UsageError

    directory = directory_of(args) / "machines" / args.name
    path = directory / f"{args.device}.out"
    if "/" in args.name or "/" in args.device or not path.exists():
        raise UsageError(
            f"{args.name} has no output of {args.device} here: {path} is not there",
            remedy="see `ferry list`, and the id of its serial port in machine.toml",
        )
    output = Output(sys.stdout, sys.stderr)
    position = 0
    try:
        while True:
            there = (directory / "bus").exists()  # before reading: what was written last is still shown
            position = _copy(path, position)
            if not there:
                output.say(f"{args.name} does not run here any more")
                return 0
            time.sleep(_LOOK)
    except KeyboardInterrupt:
        return 0


def _copy(path: Path, position: int) -> int:
    """Copy what is new to stdout; answers with where to go on. A file that was cut begins anew."""
    import sys

    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < position:
                position = 0
            file.seek(position)
            while chunk := file.read(_CHUNK):
                sys.stdout.buffer.write(chunk)
                position += len(chunk)
    except FileNotFoundError:
        return 0
    sys.stdout.buffer.flush()
    return position
