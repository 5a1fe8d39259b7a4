"""Records as the table of docs/qemu.md."""

from __future__ import annotations

from collections.abc import Sequence

from tests.interop.eleven.rows import ROWS, Record


def markdown(version: str, records: Sequence[Record]) -> str:
    """A row a fault; QEMU alone in both columns of capabilities, then the same machine under ferry."""
    found = {(record.row, record.mode): record for record in records}
    lines = [
        f"| | QEMU {version}, default capabilities | QEMU {version}, `return-path` (libvirt's default) | under ferry |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        cells = [_alone(found.get((row.name, mode))) for mode in ("default", "return-path")]
        lines.append(f"| {row.what} | {cells[0]} | {cells[1]} | {_ferry(found.get((row.name, 'ferry')))} |")
    return "\n".join(lines) + "\n"


def _where(guest: str) -> str:
    return {"nowhere": "**the guest runs nowhere**", "both": "**the guest runs on both**"}.get(
        guest, f"runs on the {guest}"
    )


def _alone(record: Record | None) -> str:
    if record is None:
        return "not run"
    frozen = f", frozen for {record.frozen_ms / 1000:.1f} s" if record.frozen_ms > 1000 else ""
    why = f"“{record.reason}”" if record.reason else "no reason given"
    said = f"`{record.status}`" if record.status == "completed" else f"`{record.status}`, {why}"
    return f"{said}; {_where(record.guest)}{frozen}"


def _ferry(record: Record | None) -> str:
    if record is None:
        return "not run"
    if record.guest == "not started":
        return f"refused at `ferry run`: {record.device}: {record.reason}"
    who = f"; {record.device}: {record.reason}" if record.device else ""
    still = f", stood still for {record.frozen_ms:.0f} ms" if record.frozen_ms else ", never stopped"
    return f"{record.status}; {_where(record.guest)}{still}{who}"
