"""`ferry COMMAND …`: finds the command's module, parses its words, and turns every error into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

from migrate.cli.output import Output
from migrate.cli.words import EXIT_CODES, Parser, nearest
from migrate.errors import FerryError, InterruptedByUser, UsageError

#: command → what it does, in the order that `ferry --help` shows.
COMMANDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "demo": "move a running guest between two hosts on this machine, and prove that nothing was lost",
        "host": "the daemon of a host: run it on both ends",
        "run": "start the machine of a machine.toml",
        "adopt": "take over a QEMU that runs, and its devices' processes on a bus, to move them",
        "list": "the machines of this host, and what each is doing",
        "console": "follow what a machine writes on its serial port",
        "stop": "end a machine",
        "pause": "stop a machine's guest where it is",
        "resume": "let a paused machine go on",
        "check": "could this machine go there? Every reason against it, and nothing moves",
        "migrate": "move a running machine to another host",
        "jobs": "the jobs of this host, also those that have ended",
        "show": "one job: where it stands, or how it ended and why",
        "events": "follow what happens on this host",
        "set": "change the limits of a migration while it goes on",
        "cancel": "take a migration back; the machine goes on here",
        "recover": "ask the other host who runs a machine that is in doubt",
        "resolve": "decide who runs a machine in doubt, after fencing the other host",
        "accept": "what ssh runs on the other host for --to 'exec:ssh HOST ferry accept'",
        "blob": "look into saved state: show, dump, query, diff, verify, upgrade, redact",
        "schema": "what state devices have, in which versions; has a released one changed?",
        "device": "can this device be moved? A conformance run against a process on a bus",
        "pki": "certificates for hosts: a private CA",
    }
)


class Command(Protocol):
    """What each module of this package is to main."""

    def arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


def entry() -> int:
    """The console script. Never raises, but for what argparse does with --help."""
    # For NumPy, here and in all that is started from here: a BLAS thread for each core, spinning while it waits for work that
    # never comes, is a third of what starting a device's process costs.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        return Output(sys.stdout, sys.stderr).failure(InterruptedByUser("interrupted"))
    except BrokenPipeError:
        # Whoever read our output has gone; nobody is left to be told, and Python must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _defect(error)


def main(words: Sequence[str]) -> int:
    """Run one command; answers with its exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else UsageError.exit_code
    if words[0] in ("-V", "--version"):
        from migrate import __version__

        print(f"ferry {__version__}")
        return 0
    output = Output(sys.stdout, sys.stderr, json="--json" in words)
    name = words[0]
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        return output.failure(
            UsageError(
                f"there is no command {name!r}",
                remedy=f"did you mean `ferry {near}`?" if near else "see `ferry --help`",
            )
        )
    try:
        command: Command = importlib.import_module(f"migrate.cli.{name}")
        parser = Parser(prog=f"ferry {name}")
        command.arguments(parser)
        return command.run(parser.parse_args(words[1:]))
    except FerryError as error:
        return output.failure(error)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ferry COMMAND …",
            "",
            "Moves a running virtual machine, whose devices are processes of their own, from one host to another:",
            "either it runs there, or it goes on running here.",
            "",
            *lines,
            "",
            "Try it:  ferry demo",
            "Each command explains itself:  ferry migrate --help",
            "",
            EXIT_CODES,
        ]
    )


def _defect(error: Exception) -> int:
    """An error that nobody foresaw: one line for the user, the traceback for who asks for it."""
    if os.environ.get("FERRY_DEBUG") == "1":
        traceback.print_exception(error)
    wrong = FerryError(
        f"vmferry itself failed: {type(error).__name__}: {error}",
        remedy="run it again with FERRY_DEBUG=1 and report what it prints",
    )
    return Output(sys.stdout, sys.stderr, json="--json" in sys.argv).failure(wrong)
