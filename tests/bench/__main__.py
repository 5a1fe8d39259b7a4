"""`python -m tests.bench [names…] [--json] [--quick]`: runs the benches one after the other and prints what they found."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from tests.bench import collect, disk, downtime, precopy, qemu, shuttle, state, vfio_user, xremote
from tests.bench.figures import Figure, Scale, as_line, machine, table

BENCHES: dict[str, Callable[[Scale], Iterator[Figure]]] = {
    "precopy": precopy.run,
    "touch": precopy.run_touch,
    "collect": collect.run,
    "base": downtime.run_base,
    "downtime": downtime.run,
    "disk": disk.run,
    "shuttle": shuttle.run,
    "state": state.run,
    "dump": state.run_dump,
    "qemu": qemu.run,
    "vfio-user": vfio_user.run,
    "x-remote": xremote.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--quick", action="store_true", help="a few MiB, once: shows that it works")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHES]:
        parser.error(f"no bench is called {unknown[0]}; there are {', '.join(BENCHES)}")
    scale = Scale(quick=arguments.quick)
    found: list[Figure] = []
    _say(as_line(machine()), stream=sys.stdout if arguments.json else sys.stderr)
    for name in arguments.names or BENCHES:
        for figure in BENCHES[name](scale):
            found.append(figure)
            if arguments.json:
                _say(as_line(figure.to_json()))
            else:
                _say("  ".join(cell for cell in figure.row() if cell), stream=sys.stderr)  # progress
    if not arguments.json:
        _say(table(found))
    return 0


def _say(text: str, stream: TextIO | None = None) -> None:
    print(text, file=stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
