"""`ferry host`: the daemon of a host, in the foreground."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from migrate.cli.words import add_directory, add_json, directory_of, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "The daemon of a host: it keeps machines, sends them and takes them in. It may be stopped and started again at any\n"
        "time: machines go on, and are found again. Logs go to stderr.\n\n"
        "Other hosts reach it by tls:// (with certificates of `ferry pki`), by ssh (see `ferry accept --help`), or on this\n"
        "machine by unix:DIR/accept.sock.",
        "ferry host --name hostb --listen tls://0.0.0.0:4789 --pki /etc/vmferry/hostb --allow hosta",
    )
    add_directory(parser)
    parser.add_argument(
        "--name", default="", help="what people and other hosts see (default: the host's name)"
    )
    parser.add_argument(
        "--listen",
        metavar="URI",
        action="append",
        default=[],
        help="tls://ADDRESS:PORT or unix:/PATH; may be repeated",
    )
    parser.add_argument(
        "--pki",
        metavar="DIR",
        type=Path,
        help="this host's certificate: what `ferry pki issue` made (needed for tls://)",
    )
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="a host that may connect, by the name in its certificate; '*': every one of the CA; may be repeated",
    )
    parser.add_argument(
        "--bus",
        metavar="BUS",
        default=None,
        help="be managed on this bus too: system, session or an address (default: FERRY_BUS, else only DIR/bus)",
    )
    parser.add_argument("--hold", metavar="POINT", action="append", default=[], help=argparse.SUPPRESS)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import asyncio
    import logging
    import socket
    import sys

    from migrate.cli.output import Output
    from migrate.host.daemon import HostDaemon, HostOptions, serve

    logging.basicConfig(
        level=logging.INFO,
        format="time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s",
        stream=sys.stderr,
    )
    output = Output(sys.stdout, sys.stderr, json=args.json)
    options = HostOptions(
        directory=directory_of(args),
        name=args.name or socket.gethostname(),
        listen=args.listen,
        pki=Path(os.path.abspath(args.pki)) if args.pki is not None else None,
        allow=args.allow,
        bus=args.bus if args.bus is not None else os.environ.get("FERRY_BUS", ""),
        hold=args.hold,
    )

    def ready(daemon: HostDaemon) -> None:
        output.event({"event": "ready", "bus": daemon.address, "listen": daemon.listening})
        output.say(
            f"{options.name} is ready in {options.directory}, reached by {', '.join(daemon.listening)}"
        )

    asyncio.run(serve(options, ready))
    output.event({"event": "outcome", "outcome": "stopped", "exit_code": 0})
    return 0
