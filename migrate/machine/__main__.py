"""`python -m migrate.machine SPEC READY_FD`: the supervisor's process."""

from __future__ import annotations

import asyncio
import logging
import sys

from migrate.machine.process import Spec, supervise

if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO, format="time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
    )
    sys.exit(asyncio.run(supervise(Spec.from_json(sys.argv[1]), int(sys.argv[2]))))
