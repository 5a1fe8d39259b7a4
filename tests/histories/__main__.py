"""`python -m tests.histories --minutes 60 [--seed N]`: histories until the time is up; `make chaos`."""

from __future__ import annotations

import argparse
import random
import sys
import time

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.histories.history import History


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.histories", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--seed", type=int, help="run one history again, by the seed that was printed")
    parser.add_argument("--steps", type=int, default=12, help="steps of one history (default 12)")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.minutes * 60
    count = 0
    while time.monotonic() < deadline:
        number = arguments.seed if arguments.seed is not None else random.randrange(1 << 32)
        print(f"history {count + 1}, seed {number}", flush=True)
        _run(number, arguments.steps)
        count += 1
        if arguments.seed is not None:
            break
    print(f"{count} histories, none lost the machine")
    return 0


def _run(number: int, steps: int) -> None:
    class Seeded(History):
        pass

    seed(number)(Seeded)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Seeded,
        settings=settings(
            max_examples=10,  # the first that Hypothesis tries is always the simplest
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
