"""`python -m devices.bridges.qemu --id vcpu0 --bus ADDRESS --platform FILE --paused|--incoming`: QEMU as a machine's vCPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from devices.kit import argument_parser, run
from migrate.errors import FerryError


def main() -> NoReturn:
    parser = argument_parser(
        "qemu", "QEMU as the vCPU of a machine: starts it, or adopts one that runs, by its monitor."
    )
    parser.add_argument("--platform", type=Path, required=True, metavar="FILE", help="the machine (JSON)")
    arguments = parser.parse_args()
    try:
        from devices.bridges.qemu.command import Platform
        from devices.bridges.qemu.vmm import QemuVmm

        path = arguments.platform.absolute()
        vmm = QemuVmm(arguments.id, Platform.read(path), path.parent, incoming=arguments.incoming)
    except FerryError as error:
        print(f"{arguments.id}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    run(vmm, arguments)


if __name__ == "__main__":
    main()
