"""`ferry schema`: what state devices have, in which versions, and whether what was released still stands."""

from __future__ import annotations

import argparse

from migrate.cli.words import add_json, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "The schemas of device types: every field of every version that can cross the wire. Those that come with vmferry, and\n"
        "those in the directories of FERRY_SCHEMAS.",
        "ferry schema list\n"
        "ferry schema show uart16550 --version 1\n"
        "ferry schema check --against v1.0        # in CI: exit code 1 where a released version was changed\n"
        "ferry schema check --against ../released --mode full",
    )
    words = parser.add_subparsers(dest="action", required=True, metavar="list|show|check|matrix|export|doc")
    listed = words.add_parser("list", help="all types and their versions", prog="ferry schema list")
    show = words.add_parser("show", help="the fields of a type", prog="ferry schema show")
    check = words.add_parser(
        "check", help="has a released version changed? Do versions meet?", prog="ferry schema check"
    )
    check.description = (
        "Without --against: whether neighbouring versions meet. With it: whether a version that is there changed, or is gone.\n"
        "Each finding begins with the id of its rule; --rules lists them. Exit code 0: none, 1: some."
    )
    check.formatter_class = argparse.RawDescriptionHelpFormatter
    check.add_argument("types", metavar="TYPE", nargs="*", help="only these (default: all)")
    check.add_argument(
        "--against", metavar="REV|DIR", default="", help="a revision of git, or a directory with *.toml"
    )
    check.add_argument(
        "--path", metavar="DIR", default="schemas", help="where they lie in that revision (default: schemas)"
    )
    check.add_argument(
        "--mode", choices=("backward", "forward", "full"), default="backward",
        help="what neighbouring versions promise each other (docs/state.md; default: backward)",
    )  # fmt: skip
    check.add_argument("--rules", action="store_true", help="list the rules and end")
    matrix = words.add_parser("matrix", help="which writes can be read by which", prog="ferry schema matrix")
    export = words.add_parser(
        "export", help="as JSON Schema, of the decoded state", prog="ferry schema export"
    )
    export.add_argument(
        "--json-schema", action="store_true", help="the form; the only one so far, and the default"
    )
    doc = words.add_parser("doc", help="a page about a type, in Markdown", prog="ferry schema doc")
    for each in (show, export, doc):
        each.add_argument("type", metavar="TYPE", help="such as uart16550")
    for each in (show, export):
        each.add_argument("--version", metavar="N", type=int, default=0, help="(default: the newest)")
    matrix.add_argument("types", metavar="TYPE", nargs="*", help="(default: all)")
    for each in (listed, show, check, matrix, export, doc):
        add_json(each)


def run(args: argparse.Namespace) -> int:
    from migrate.cli.schema.actions import act

    return act(args)
