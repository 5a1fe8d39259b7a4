"""`ferry pki`."""

from __future__ import annotations

import argparse
from pathlib import Path

from migrate.cli.words import add_json, explain


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "Certificates for hosts, from a private CA. `init` makes the CA, once; `issue` makes one certificate a host, in a\n"
        "directory of its own that you copy there and give to `ferry host --pki`. The CA's key stays where it was made.",
        "ferry pki init /etc/vmferry/ca\n"
        "ferry pki issue /etc/vmferry/ca hosta.example 192.0.2.7\n"
        "scp -r /etc/vmferry/ca/hosta.example hosta:/etc/vmferry/pki",
    )
    words = parser.add_subparsers(dest="action", required=True, metavar="init|issue")
    init = words.add_parser("init", help="make a CA", prog="ferry pki init")
    init.description = "Make a CA: ca.pem and ca-key.pem. Guard the key; whoever has it can pose as any host."
    init.add_argument("directory", metavar="DIR", type=Path, help="where; made if it is not there")
    issue = words.add_parser("issue", help="make a certificate for a host", prog="ferry pki issue")
    issue.description = "Make DIR/NAME with ca.pem, cert.pem and key.pem, for `ferry host --pki DIR/NAME`."
    issue.add_argument("directory", metavar="DIR", type=Path, help="the CA's directory")
    issue.add_argument(
        "name", metavar="NAME", help="as others write it after tls://: a DNS name or an IP address"
    )
    issue.add_argument("names", metavar="NAMES", nargs="*", help="more names of the same host")
    issue.add_argument(
        "--days", metavar="N", type=int, default=365, help="how long it is valid (default 365)"
    )
    for each in (init, issue):
        each.add_argument("--force", action="store_true", help="replace what is there")
        add_json(each)


def run(args: argparse.Namespace) -> int:
    import sys

    from migrate.cli.output import Output
    from migrate.transport import pki

    output = Output(sys.stdout, sys.stderr, json=args.json)
    if args.action == "init":
        made = pki.init(args.directory, force=args.force)
        output.say(f"made a CA in {made.directory}, valid until {made.expires:%Y-%m-%d}")
        output.say(f"next, for each host: `ferry pki issue {args.directory} NAME`")
    else:
        made = pki.issue(args.directory, args.name, args.names, args.days, force=args.force)
        output.say(f"made {made.directory} for {', '.join(made.names)}, valid until {made.expires:%Y-%m-%d}")
        output.say("copy it to that host, and start `ferry host` there with --pki and --allow")
    output.event(
        {
            "event": "outcome",
            "outcome": "made",
            "directory": str(made.directory),
            "names": list(made.names),
            "expires": made.expires.isoformat(),
            "exit_code": 0,
        }
    )
    return 0
