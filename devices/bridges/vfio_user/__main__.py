"""`python -m devices.bridges.vfio_user --id ID --bus ADDRESS --socket PATH --option server=PATH`: a vfio-user server as a device.

In place of a server that listens already, `--serve MODEL=COMMAND --option model=MODEL` has the bridge start one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from devices.bridges.models import command_of, parse, parse_models, parse_options
from devices.bridges.vfio_user.bridge import Bridge
from devices.bridges.vfio_user.passing import Passing
from devices.bridges.vfio_user.server import ServerProcess
from devices.bridges.vfio_user.upstream import Upstream
from devices.kit import argument_parser, run
from devices.protocols.vfio_user.server import Server
from devices.virtio.backing import Image
from migrate.errors import FerryError


def main() -> NoReturn:
    arguments = parse(
        argument_parser("vfio-user", "A vfio-user server that knows nothing of ours, as a device."),
        serve="how a server is started; {socket}, {id}, {directory}, {start} and {OPTION} are filled in",
        option="server: the socket of a server that listens; model: which one to start; image: its disk's, on storage that "
        "both hosts share; any other: for its command",
    )
    process: ServerProcess | None = None
    try:
        options = parse_options(arguments.option)
        socket = options.pop("server", "")
        image = _image(options["image"]) if "image" in options else None
        if not socket:
            process = _start(arguments, options)
            socket = process.socket
        upstream = Upstream.connect(
            arguments.id, socket, process.obituary if process is not None else lambda: ""
        )
        bridge = Bridge(arguments.id, upstream, options.get("model", ""), image, incoming=arguments.incoming)
        passing = Passing(bridge, upstream)
        server = Server(arguments.socket, passing)
    except FerryError as error:
        error.device = error.device or arguments.id
        print(f"error: {error}", file=sys.stderr, flush=True)
        if process is not None:
            process.end()
        sys.exit(error.exit_code)
    upstream.watch(lambda: _end_with_it(arguments.id, process))
    try:
        run(bridge, arguments, server)
    finally:
        passing.close()
        if process is not None:
            process.end()


def _start(arguments: argparse.Namespace, options: dict[str, str]) -> ServerProcess:
    ours = {
        "socket": f"{arguments.socket}.s",
        "id": arguments.id,
        "start": "incoming" if arguments.incoming else "paused" if arguments.paused else "running",
        "directory": str(Path(arguments.socket).absolute().parent),
    }
    command = command_of(parse_models(arguments.serve), options, ours, "vfio-user")
    return ServerProcess(arguments.id, command, ours["socket"])


def _image(path: str) -> Image:
    return Image(path, read_only=not os.access(path, os.W_OK))


def _end_with_it(device: str, process: ServerProcess | None) -> None:
    """The server is gone: its state with it, so there is nothing left to be a bridge to."""
    why = process.obituary(1.0) if process is not None else ""
    time.sleep(0.1)  # a call that is waited for gives its own error first
    os.write(2, f"error: {device}: its vfio-user server {why or 'has closed the connection'}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    main()
