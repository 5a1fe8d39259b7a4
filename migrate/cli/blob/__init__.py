"""`ferry blob`: what is inside state that was saved. Nothing is loaded anywhere, and nothing in a blob is obeyed.

The words and what they do are in the table; each action is a function of `actions.py`, where blobs come from is `source.py`, and
how parts are drawn is `drawing.py`.
"""

from __future__ import annotations

import argparse
from typing import Final

from migrate.cli.words import add_json, explain

#: action → (help, what its --help says, whether it takes a second blob)
ACTIONS: Final = {
    "show": ("the state as a tree", "Every field with its value, its unit and what it means."),
    "dump": ("every byte: where, which, what for", "Annotated hexadecimal: each value with its range, name and meaning."),
    "info": ("what the envelope says", "Type, Id, versions, digest and size; also of an envelope that is too new to be read."),
    "query": ("one value", "The value at a path: .rx_fifo, .queues[2].size, .rx_fifo[3] (a byte)."),
    "diff": ("what differs between two", "Field by field, also between schema versions. Exit code 0: none, 1: some, 2: trouble."),
    "verify": ("is it whole and right?", "Envelope, checksum, digest of the schema, canonical form, bounds. Exit code 0 or 1."),
    "upgrade": ("write it in another version", "The same state in another version of its schema, newer or older, as by a device."),
    "redact": ("take a guest's data out", "The same fields and lengths, without what a guest put there; still a valid blob."),
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Look into saved state: a blob in a file or on standard input (-), a directory that `--keep` left, or a migration stream\n"
        "of QEMU with our devices' blobs in its dbus-vmstate section. What is damaged or cut off is shown as far as it goes.",
        "ferry demo --keep kept\n"
        "ferry blob show kept/uart0.blob\n"
        "ferry blob diff before.blob after.blob\n"
        "ferry blob query .rx_fifo[3] kept/uart0.blob",
    )
    words = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    for name, (what, more) in ACTIONS.items():
        each = words.add_parser(name, help=what, prog=f"ferry blob {name}")
        each.description = more
        if name == "query":
            each.add_argument("path", metavar="PATH", help="such as .queues[2].size")
        each.add_argument(
            "what", metavar="BLOB", help="a file, - for standard input, or a directory of *.blob"
        )
        if name == "diff":
            each.add_argument("other", metavar="OTHER", help="what it is compared with")
        if name == "dump":
            each.add_argument(
                "--range", metavar="FROM:TO", default="", help="only these bytes, such as 0x40:0x80"
            )
            each.add_argument(
                "--colour", choices=("auto", "always", "never"), default="auto", help="(default: auto)"
            )
        if name == "upgrade":
            each.add_argument("--to", metavar="N", type=int, required=True, help="the schema version")
        if name == "redact":
            each.add_argument("--numbers", action="store_true", help="numbers and flags go as well")
        if name in ("upgrade", "redact"):
            each.add_argument(
                "--output", "-o", metavar="FILE", required=True, help="where it is written; - for stdout"
            )
        if name != "diff":
            each.add_argument(
                "--id", metavar="ID", default="", help="of several blobs, the one of this device"
            )
        add_json(each)


def run(args: argparse.Namespace) -> int:
    from migrate.cli.blob.actions import act

    return act(args)
