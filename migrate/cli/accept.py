"""`ferry accept`: passes its stdin and stdout to the daemon of this host and waits until they are done with. It copies nothing."""

from __future__ import annotations

import argparse
import os

from migrate.cli.words import add_directory, explain

#: Seconds for the first 32 bytes to come. Whoever runs this by hand learns soon that it is not for hands.
_PATIENCE = 15.0


def arguments(parser: argparse.ArgumentParser) -> None:
    explain(
        parser,
        "What a command runs on the destination, so that ssh carries a migration: it hands its stdin and stdout to the\n"
        "`ferry host` of that machine and waits. Nobody needs to run it by hand.",
        "ferry migrate web1 --to 'exec:ssh hostb ferry accept'",
        (0, 1, 2),
    )
    add_directory(parser)


def run(args: argparse.Namespace) -> int:
    import json
    import socket

    from migrate.cli.words import directory_of
    from migrate.errors import BusError, Reason, TransportError
    from migrate.transport import preamble

    first = _read_preamble(preamble.SIZE)
    preamble.decode(first)  # what is not for us is told here, not by the daemon
    directory = directory_of(args)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        try:
            door.connect(str(directory / "stdio.sock"))
            socket.send_fds(door, [first], [0, 1])
            _let_go_of_stdio()
            answer = json.loads(door.recv(64 << 10) or b'{"error": null}')
            if "error" in answer:
                reason = Reason.from_wire(answer["error"])
                raise TransportError(reason.reason, remedy=reason.remedy, phase=reason.phase)
            door.recv(1)  # its end is the migration's
        except OSError as error:
            raise BusError(
                f"no `ferry host` runs in {directory} on this host: {error.strerror}",
                remedy="start it, or give `ferry accept` the right --dir",
            ) from None
    return 0


def _read_preamble(size: int) -> bytes:
    """Not a byte more: what follows is for the process that gets the descriptor."""
    import select

    from migrate.errors import UsageError

    data = b""
    while len(data) < size:
        if not select.select([0], [], [], _PATIENCE)[0]:
            raise UsageError(
                "nothing came on stdin", remedy="this is run by `ferry migrate --to exec:…`, not by hand"
            )
        chunk = os.read(0, size - len(data))
        if not chunk:
            break
        data += chunk
    return data


def _let_go_of_stdio() -> None:
    """The daemon has its own copies; ours would keep the caller from seeing the end."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
