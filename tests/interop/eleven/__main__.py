"""`python -m tests.interop.eleven [--json FILE]`: every row, alone and under ferry, and the table of docs/qemu.md."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from pathlib import Path

from tests.faults.leftovers import pen
from tests.interop.eleven import alone, ferried
from tests.interop.eleven.rows import ROWS
from tests.interop.eleven.table import markdown

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="the records, too")
    words = parser.parse_args()
    records = asyncio.run(alone.all_of(ROWS))
    with pen() as ground:
        records += ferried.all_of(ground, ROWS)
    if words.json:
        words.json.write_text(json.dumps([asdict(record) for record in records], indent=1))
    print(markdown(asyncio.run(alone.version()), records))
