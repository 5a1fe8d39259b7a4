"""`ferry adopt`."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence

from migrate.cli.words import add_directory, add_json, explain
from migrate.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Take over a QEMU that runs already, and the device processes on its bus, as a machine of this host: it can\n"
        "then be moved, paused and resumed. Nothing of it is stopped. `ferry stop` lets go of it: it runs on. Once it\n"
        "has moved away, its QEMU here is ended, so that nobody can start it twice.",
        "ferry adopt web1 --qmp /run/web1/qmp.sock --bus unix:path=/run/web1/bus --image disk0=/srv/web1.img",
    )
    parser.add_argument("name", metavar="NAME", help="what the machine is to be called here")
    parser.add_argument(
        "--qmp", required=True, metavar="SOCKET", help="a monitor of QEMU's that nobody else uses"
    )
    parser.add_argument(
        "--bus", dest="machine_bus", required=True, metavar="ADDRESS", help="the bus of its devices"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="ID=PATH", help="the image of a device on that bus"
    )
    parser.add_argument(
        "--state",
        choices=["ferry", "qemu"],
        default="ferry",
        help="by whom the states of devices go: ferry, or QEMU's dbus-vmstate",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="although the ledger says that it was moved away from here"
    )
    add_directory(parser)
    parser.set_defaults(
        bus=None
    )  # of the daemon: in its directory, or where FERRY_BUS says; --bus is the machine's
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import sys

    from migrate.bus.host import HostClient, RunOptions
    from migrate.cli.output import Output
    from migrate.cli.session import with_host

    output = Output(sys.stdout, sys.stderr, json=args.json)
    text = machine_toml(
        args.name, os.path.abspath(args.qmp), args.machine_bus, images(args.image), args.state
    )

    async def adopt(client: HostClient) -> int:
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(text)
            file.flush()
            name = await client.run_machine(file.name, RunOptions(fresh=args.fresh))
        output.say(f"{name} is this host's now: `ferry migrate {name} --to …` moves it")
        output.event({"event": "outcome", "outcome": "running", "machine": name, "exit_code": 0})
        return 0

    return with_host(args, adopt)


def images(words: Sequence[str]) -> dict[str, str]:
    """:raises UsageError: for one that is not ID=PATH."""
    found = {}
    for word in words:
        device, equals, path = word.partition("=")
        if not equals or not device or not path:
            raise UsageError(f"--image {word} is not ID=PATH", remedy="such as --image disk0=/srv/web1.img")
        found[device] = os.path.abspath(path)
    return found


def machine_toml(name: str, qmp: str, bus: str, found: Mapping[str, str], state: str) -> str:
    """What such a machine is, in the words of machine.toml."""
    quoted = ", ".join(f"{_text(device)} = {_text(path)}" for device, path in found.items())
    return (
        f"[machine]\nname = {_text(name)}\n[qemu]\nqmp = {_text(qmp)}\nbus = {_text(bus)}\n"
        f"images = {{ {quoted} }}\nstate = {_text(state)}\n"
    )


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
