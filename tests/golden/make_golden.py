"""Writes the golden blobs that are missing: `python tests/golden/make_golden.py`, after writing TYPE-vN.json by hand.

TYPE-vN.json is a state that a device can really be in, for people to read (bytes as {"hex": …}); TYPE-vN.blob is what version N
makes of it, for ever. A blob that is there is never written again: if a test says that it no longer fits, a version that was
released has been changed, and it is the schema that has to be put right.
"""

from __future__ import annotations

import json
from pathlib import Path

from migrate.state import blob, catalog

HERE = Path(__file__).parent


def values_of(type_name: str, version: int) -> dict[str, object]:
    text = (HERE / f"{type_name}-v{version}.json").read_text()
    values: dict[str, object] = json.loads(text, object_hook=_bytes)
    return values


def _bytes(table: dict[str, object]) -> object:
    match table:
        case {"hex": str(digits)} if len(table) == 1:
            return bytes.fromhex(digits)
    return table


def main() -> None:
    for type_name in catalog.types():
        schema = catalog.load(type_name)
        for version in schema.versions:
            target = HERE / f"{type_name}-v{version}.blob"
            if not target.exists():
                target.write_bytes(
                    blob.write(schema.at(version), f"{type_name}0", values_of(type_name, version))
                )
                print(f"wrote {target}")


if __name__ == "__main__":
    main()
