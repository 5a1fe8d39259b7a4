"""`python -m devices.bridges.xremote --id ID --bus ADDRESS --socket PATH --option model=lsi53c895a --option image=PATH`.

QEMU is started by the bridge: by the command of its model. `lsi53c895a`, a SCSI controller with one disk, is built in.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from devices.bridges.models import command_of, parse, parse_models, parse_options
from devices.bridges.xremote.bridge import Bridge
from devices.bridges.xremote.command import BUILT_IN, check, escaped
from devices.bridges.xremote.front import Front
from devices.bridges.xremote.remote import Remote
from devices.kit import argument_parser, run
from devices.protocols.vfio_user.server import Server
from devices.virtio.backing import Image
from migrate.errors import FerryError


def main() -> NoReturn:
    arguments = parse(
        argument_parser("x-remote", "A device in a QEMU of the machine type x-remote, as a device."),
        serve="QEMU with one PCI function id={id}; {image}, {directory} and {OPTION} are filled in; "
        f"built in: {', '.join(BUILT_IN)}",
        option="model: which one; image: its disk's, a raw file; any other: for its command",
    )
    remote: Remote | None = None
    try:
        options = parse_options(arguments.option)
        directory = Path(arguments.socket).absolute().parent
        models = {**BUILT_IN, **parse_models(arguments.serve)}
        for command in models.values():
            check(command)
        words = command_of(
            models,
            {key: escaped(value) for key, value in options.items()},
            {"id": escaped(arguments.id), "directory": escaped(str(directory))},
            "x-remote",
        )
        image = Image(options["image"], read_only=False) if "image" in options else None
        remote = Remote(
            arguments.id,
            words,
            f"{arguments.socket}.q",
            directory / f"{arguments.id.replace('/', '_')}.qemu.log",
            lambda how: _end_with_it(arguments.id, how),
        )
        bridge = Bridge(arguments.id, remote, options.get("model", ""), image, incoming=arguments.incoming)
        server = Server(arguments.socket, Front(bridge))
    except FerryError as error:
        error.device = error.device or arguments.id
        print(f"error: {error}", file=sys.stderr, flush=True)
        if remote is not None:
            remote.end()
        sys.exit(error.exit_code)
    run(bridge, arguments, server)


def _end_with_it(device: str, how: str) -> None:
    """QEMU is gone: its state with it, so there is nothing left to be a bridge to."""
    time.sleep(0.1)  # a call that is waited for gives its own error first
    os.write(2, f"error: {device}: its {how}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    main()
