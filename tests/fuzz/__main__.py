"""`python -m tests.fuzz [names…] [--minutes N] [--seed N]`: hostile inputs until the time is up; `make fuzz`.

A finding is written to the directory of --findings, and is run again by `--replay FILE NAME`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from tests.fuzz.run import TARGETS, Finding, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--minutes", type=float, default=60.0, help="in all (default 60)")
    parser.add_argument("--seed", type=int, help="the one that was printed, for the same inputs")
    parser.add_argument(
        "--findings", type=Path, default=Path("build/fuzz"), help="where findings are written"
    )
    parser.add_argument("--replay", type=Path, help="one input, for the one target that is named")
    arguments = parser.parse_args()
    names = arguments.names or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no target is called {unknown[0]}; there are {', '.join(TARGETS)}")
    if arguments.replay is not None:
        TARGETS[names[0]].run(arguments.replay.read_bytes())
        return 0
    seed = arguments.seed if arguments.seed is not None else random.randrange(1 << 32)
    for name in names:
        began = time.monotonic()
        try:
            count = fuzz(TARGETS[name], seed, arguments.minutes * 60 / len(names))
        except Finding as finding:
            arguments.findings.mkdir(parents=True, exist_ok=True)
            path = arguments.findings / f"{name}-{seed}"
            path.write_bytes(finding.data)
            print(f"{name}: {finding} after {finding.count} inputs, seed {seed}; written to {path}")
            raise
        took = time.monotonic() - began
        print(
            f"{name}: {count} inputs in {took:.0f} s ({count / took:.0f} a second), seed {seed}: none broke it",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
