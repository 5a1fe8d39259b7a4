"""The parts of docs/protocol.md that are made from the code: `python tests/unit/protocol/render.py` writes them into the page.

A part stands between `<!-- made: NAME -->` and `<!-- end -->`. test_protocol_page.py compares every part with the code.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from migrate.protocol import frames, messages  # noqa: E402
from migrate.protocol.fields import checks  # noqa: E402
from migrate.protocol.states import (  # noqa: E402
    BEFORE_COMMIT,
    DESTINATION,
    DID,
    ENDS,
    RECV,
    SEND,
    SOURCE,
    TABLES,
    Did,
    Event,
    Stage,
    Table,
)
from migrate.transport import preamble  # noqa: E402

PAGE: Final = ROOT / "docs" / "protocol.md"
PART: Final = re.compile(r"(<!-- made: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

#: What the bytes of each layout are; how many there are is the code's own struct.
PREAMBLE: Final = (
    "magic, `VMFERRY`", "version of the preamble, 1", "kind: 0 control, 1 page",
    "index of the page channel; 0 for control", "zero", "session: the job's id",
)  # fmt: skip
HEADER: Final = (
    "magic, `VMF1`", "kind, see below", "flags: bit 0 (not in CONTROL): of the last, stopped pass", "zero",
    "length of the body", "CRC-32 of bytes 0 to 11",
)  # fmt: skip
TABLE_HEAD: Final = (
    "number of the round", "count of runs", "CRC-32 of the eight bytes before it, then of the runs",
)  # fmt: skip
RUN: Final = {"gpa": "guest physical address", "bytes": "length"}

_WIDTHS: Final = {"B": 1, "H": 2, "I": 4, "Q": 8}


def layout(of: struct.Struct, names: Iterable[str]) -> str:
    """A table of offsets and sizes; fails where the names are not as many as the fields."""
    rows = ["| offset | size | |", "|---:|---:|---|"]
    at = 0
    items = re.findall(r"(\d*)([sBHIQ])", of.format[1:])
    for (count, code), name in zip(items, names, strict=True):
        size = int(count) if code == "s" else _WIDTHS[code]
        rows.append(f"| {at} | {size} | {name} |")
        at += size
    assert at == of.size
    return "\n".join(rows)


def runs() -> str:
    fields = frames.RUN_DTYPE.fields
    assert fields is not None
    rows = ["| offset | size | |", "|---:|---:|---|"]
    rows += [f"| {at} | {kind.itemsize} | {RUN[name]}, in bytes |" for name, (kind, at) in _plain(fields)]
    return "\n".join(rows)


def _plain(fields: Mapping[str, tuple[Any, ...]]) -> list[tuple[str, tuple[Any, int]]]:
    return [(name, (entry[0], int(entry[1]))) for name, entry in fields.items()]


def kinds() -> str:
    what = {
        frames.Kind.CONTROL: "one message (below), then the CRC-32 of it",
        frames.Kind.PAGES: "run table, then the bytes of its pages in the table's order",
        frames.Kind.ZERO: "run table of pages that are zero: the receiver punches holes",
        frames.Kind.RELAY: "the number of one of QEMU's own connections (4 bytes), then bytes of it; none: it has ended",
        frames.Kind.MARK: "the head of a run table with no runs: the round ends here on this channel",
    }
    rows = ["| kind | | most bytes of body | body |", "|---:|---|---:|---|"]
    rows += [f"| {kind:d} | {kind.name} | {frames.LIMITS[kind]} | {what[kind]} |" for kind in frames.Kind]
    return "\n".join(rows)


def limits() -> str:
    names = ("MAX_RUNS", "MAX_PAGE_BYTES", "MAX_CONTROL")
    rows = ["| limit | |", "|---|---:|"]
    rows += [f"| `frames.{name}` | {getattr(frames, name)} |" for name in names]
    more = (
        "MAX_DEVICES",
        "MAX_REGIONS",
        "MAX_BLOB",
        "MAX_CHUNK",
        "MAX_LIST",
        "MAX_ITEMS",
        "PROTOCOL_VERSION",
    )
    rows += [f"| `messages.{name}` | {getattr(messages, name)} |" for name in more]
    return "\n".join(rows)


def _fields(kind: type[Any]) -> str:
    return "<br>".join(f"`{name}`: {check}" for name, check in checks(kind).items()) or "nothing"


def _speaker(kind: type[messages.Message]) -> str:
    if kind is messages.Join:
        return "source, on a page channel"
    who = [str(role) for role, table in TABLES.items() if any((SEND, kind) in row for row in table.values())]
    return "both" if len(who) == 2 else who[0]


def message_table() -> str:
    rows = ["| message | said by | fields | |", "|---|---|---|---|"]
    for kind in messages.REGISTRY.values():
        assert kind.__doc__ is not None
        assert not kind.__doc__.startswith(f"{kind.__name__}("), f"{kind.name} does not say what it is for"
        rows.append(
            f"| {kind.name} | {_speaker(kind)} | {_fields(kind)} | {' '.join(kind.__doc__.split())} |"
        )
    return "\n".join(rows)


def structs() -> str:
    rows = ["| in a message | fields |", "|---|---|"]
    kinds = (messages.RegionEntry, messages.DeviceEntry, messages.DiskEntry)
    rows += [f"| {kind.__name__} | {_fields(kind)} |" for kind in kinds]
    return "\n".join(rows)


def _event(event: Event) -> str:
    way, what = event
    if isinstance(what, Did):
        return str(what)
    return {SEND: "says", RECV: "hears"}[way] + f" {what.name}"


def _row(stage: Stage, table: Table) -> list[tuple[str, Stage]]:
    """What leads on from a stage, without liveness."""
    liveness = (messages.Ping, messages.Pong)
    return [(_event(event), after) for event, after in table[stage].items() if event[1] not in liveness]


def state_table(table: Table) -> str:
    rows = ["| stage | event | leads to |", "|---|---|---|"]
    for stage in table:
        if stage in ENDS:
            continue
        rows += [
            f"| {stage if not number else ''} | {event} | {after}{' (end)' if after in ENDS else ''} |"
            for number, (event, after) in enumerate(_row(stage, table))
        ]
    return "\n".join(rows)


def diagram(table: Table) -> str:
    """Without liveness, and without what every stage before COMMIT has in common."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> start"]
    for stage in table:
        if stage in ENDS:
            continue
        arcs: dict[Stage, list[str]] = {}
        for event, after in _row(stage, table):
            if after is Stage.GONE or (after is Stage.FAILED and stage in BEFORE_COMMIT):
                continue
            arcs.setdefault(after, []).append(event)
        lines += [f"    {stage} --> {after}: {', '.join(events)}" for after, events in arcs.items()]
    lines += [f"    {stage} --> [*]" for stage in sorted(_reached(table) & ENDS - {Stage.GONE, Stage.FAILED})]
    return "\n".join([*lines, "```"])


def _reached(table: Table) -> frozenset[Stage]:
    return frozenset(after for stage, row in table.items() for after in row.values() if after is not stage)


PARTS: Final[dict[str, Callable[[], str]]] = {
    "preamble": lambda: layout(preamble._LAYOUT, PREAMBLE),
    "header": lambda: layout(frames.HEADER, HEADER),
    "kinds": kinds,
    "table-head": lambda: layout(frames.TABLE_HEAD, TABLE_HEAD),
    "runs": runs,
    "limits": limits,
    "messages": message_table,
    "structs": structs,
    "source": lambda: state_table(SOURCE),
    "source-diagram": lambda: diagram(SOURCE),
    "destination": lambda: state_table(DESTINATION),
    "destination-diagram": lambda: diagram(DESTINATION),
}


def rendered(page: str) -> str:
    """The page with every part as the code has it. :raises KeyError: for a part that is not known."""
    return PART.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    assert {SEND, RECV, DID} == {"send", "recv", "did"}
    PAGE.write_text(rendered(PAGE.read_text()))
