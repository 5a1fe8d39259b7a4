"""The words that all commands share: their parser, their --help's last part, --dir and --json, and names that are nearly right."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NoReturn

from migrate.errors import UsageError

EXIT_CODES: Final = """\
exit codes:
  0    done
  1    failed; a machine that was being moved runs on where it was
  2    wrong words: nothing was done
  3    refused as incompatible, with every reason; nothing was stopped
  4    in doubt: stopped, both copies intact; see `ferry recover --help`
  130  interrupted; a machine that was being moved runs on where it was"""

_LINES: Final = {int(line.split()[0]): line for line in EXIT_CODES.splitlines()[1:]}

#: The longest directory that leaves room for the names of sockets in it (migrate.machine.hostconfig).
_LONGEST: Final = 60


class Parser(argparse.ArgumentParser):
    """Errors as everywhere in vmferry: one line, and what to do."""

    def __init__(self, **words: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **words)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"see `{self.prog} --help`")


def explain(
    parser: argparse.ArgumentParser, what: str, example: str, codes: Iterable[int] = (0, 1, 2)
) -> None:
    """What a command's --help says before and after its options."""
    parser.description = what
    shown = "\n".join(f"  {line}" for line in example.strip().splitlines())
    parser.epilog = "example:\n" + shown + "\n\nexit codes:\n" + "\n".join(_LINES[code] for code in codes)


def add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir",
        type=Path,
        default=None,
        help="the host's directory (default: FERRY_DIR, else ~/.local/state/vmferry)",
    )


def add_bus(parser: argparse.ArgumentParser) -> None:
    """For commands that talk to the daemon: the bus that it is on."""
    add_directory(parser)
    parser.add_argument(
        "--bus",
        metavar="BUS",
        default=None,
        help="find the daemon on this bus, not in its directory: system, session or an address (default: FERRY_BUS)",
    )


def where_of(args: argparse.Namespace) -> Path | str:
    """The directory of the daemon, or the bus that it is on: what was said, else what the environment says."""
    if args.bus:
        return str(args.bus)
    named = os.environ.get("FERRY_BUS")
    return named if named and args.dir is None and not os.environ.get("FERRY_DIR") else directory_of(args)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line on stdout; the last is the outcome"
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def rate(text: str) -> int:
    """Bytes a second: a number, with K, M or G for powers of 1024; "0" or "none" for no limit."""
    if text == "none":
        return 0
    shift = {"k": 10, "m": 20, "g": 30}.get(text[-1:].lower(), 0)
    value = float(text[:-1] if shift else text) * (1 << shift)
    if not 0 <= value < 1 << 60:
        raise argparse.ArgumentTypeError(f"{text} is not a rate that anything has")
    return round(value)


# What argparse says of words that are no numbers at all.
positive.__name__ = "number"
rate.__name__ = "rate"


def directory_of(args: argparse.Namespace) -> Path:
    """The host's directory, absolute.

    The default is on a disk: the ledger in it has to outlive a logout and a power cut. Where a home's path is too long for
    the sockets, it is the user's runtime directory after all.
    """
    if args.dir is not None:
        return Path(os.path.abspath(args.dir))
    named = os.environ.get("FERRY_DIR")
    if named:
        return Path(os.path.abspath(named))
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "vmferry"
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}") / "vmferry"
    return runtime if len(os.fsencode(state)) > _LONGEST and runtime.parent.is_dir() else state


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that somebody may have meant, or ""."""
    import difflib

    return next(iter(difflib.get_close_matches(word, list(known), 1, 0.5)), "")
