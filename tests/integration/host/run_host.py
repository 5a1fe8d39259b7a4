"""A real daemon with the fake coordinator: `python run_host.py DIRECTORY [LISTEN…]`; FERRY_BUS is a shared bus."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from migrate.errors import FerryError
from migrate.host.daemon import HostOptions, serve

FAKE = [sys.executable, str(Path(__file__).with_name("fake_coordinator.py"))]

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    options = HostOptions(Path(sys.argv[1]), "here", listen=sys.argv[2:], bus=os.environ.get("FERRY_BUS", ""))
    try:
        asyncio.run(serve(options, lambda _: print("ready", flush=True), coordinator=FAKE))
    except FerryError as error:
        sys.exit(f"{type(error).__name__}: {error}")
