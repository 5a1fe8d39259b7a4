"""The rows: what the helpers on each side do wrong. The order is that of the reference, which measured them first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Helpers by Id, with their words; on the destination the same ones, right, unless it is said here."""

    name: str
    what: str
    source: dict[str, Words]
    destination: dict[str, Words]
    id_list: Words = ()
    #: How long QEMU alone may need, s.
    seconds: float = 15.0


BOTH: Final[dict[str, Words]] = {"h1": (), "h2": ()}
MIB: Final = 1 << 20


def _wrong(*words: str) -> dict[str, Words]:
    return {"h1": (), "h2": words}


ROWS: Final = (
    Row("baseline", "nothing is wrong", BOTH, BOTH),
    Row("save-error", "one helper's Save answers with an error", _wrong("--save-error"), BOTH),
    Row("load-error", "one helper's Load answers with an error", BOTH, _wrong("--load-error")),
    Row("too-large", "one helper's state has 2 MiB", _wrong("--size", str(2 * MIB)), BOTH),
    Row("missing-helper", "one helper is not there on the destination", BOTH, {"h1": ()}),
    Row("extra-helper", "one helper more on the destination", BOTH, {**BOTH, "h3": ()}),
    Row("absent-id-list", "id-list names a helper that is not there", BOTH, BOTH, ("h1", "h2", "h9")),
    Row("slow-save-3s", "one helper's Save takes 3 s", _wrong("--save-seconds", "3"), BOTH),
    Row("slow-save-30s", "one helper's Save takes 30 s", _wrong("--save-seconds", "30"), BOTH, seconds=45.0),
    Row("duplicate-ids", "two helpers have one Id", {"h1": (), "h2": ("--says", "h1")}, {"h1": ()}),
)
BY_NAME: Final = {row.name: row for row in ROWS}


@dataclass(slots=True)
class Record:
    """What was seen of one row. `mode`: default, return-path, or ferry."""

    row: str
    mode: str
    status: str = ""  #: what management is told: QEMU's status, or ferry's outcome
    reason: str = ""  #: and why, in the words that it is given; "" for none
    device: str = ""  #: who is named
    guest: str = ""  #: where it runs: source, destination, nowhere, both
    frozen_ms: float = 0.0  #: how long the guest stood still, where that ended
    note: str = ""
