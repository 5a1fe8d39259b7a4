"""`python -m migrate.cli …`: the same as `ferry …`."""

from __future__ import annotations

import sys

from migrate.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
