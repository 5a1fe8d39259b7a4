"""`python -m devices.vcpu --id vcpu0 --bus ADDRESS --platform FILE --paused|--incoming`: the vCPU's process."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from devices.kit import argument_parser, run
from devices.vcpu.platform_file import PlatformFile
from migrate.errors import FerryError


def main() -> NoReturn:
    parser = argument_parser("vcpu", "A vCPU: executes a guest out of shared memory, by Unicorn.")
    parser.add_argument(
        "--platform", type=Path, required=True, metavar="FILE", help="the machine: devices and guest (JSON)"
    )
    arguments = parser.parse_args()
    try:
        from devices.vcpu.vcpu import Vcpu
    except ImportError as error:
        # Also a broken one: its shared library is loaded by the import.
        sys.exit(f"the vCPU needs Unicorn, an optional extra ({error}): pip install vmferry[vcpu]")
    try:
        vcpu = Vcpu(
            arguments.id,
            PlatformFile.read(arguments.platform),
            cold=not arguments.incoming,
            powered_off=lambda value: os.kill(os.getpid(), signal.SIGTERM),
        )
    except FerryError as error:
        print(f"{arguments.id}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    run(vcpu, arguments)


if __name__ == "__main__":
    main()
