"""The demo in words: one line an event, and a summary a person can check against the promise."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20


def line(event: dict[str, Any]) -> str | None:
    """An event as a line; None for those that say nothing new to a person."""
    match event.get("event"):
        case "round":
            return (
                f"  round {event['n']}: {event['bytes'] / MIB:.1f} MiB in {event['seconds']:.2f} s, "
                f"dirty {event['dirty_rate'] / 1e6:.0f} MB/s against {event['send_rate'] / 1e6:.0f} MB/s sent, "
                f"left {event['remaining'] / MIB:.2f} MiB, expected downtime {event['expected_downtime_ms']:.0f} ms"
                if "send_rate" in event
                else None
            )
        case "held":
            return f"  held at {event['at']}"
        case "in_doubt":
            return f"  in doubt: {event['reason']}"
        case "warning":
            return f"  warning: {event['warning']}"
        case "phase" if event["phase"] in ("stop", "commit"):
            return f"  {event['phase']}"
        case _:
            return None


def summary(outcome: dict[str, Any]) -> list[str]:
    """The last lines."""
    guest = outcome["guest"]
    lines = [
        "",
        f"{outcome['outcome']}: the machine runs on {outcome['running_on']} (exit code {outcome['exit_code']})",
    ]
    for reason in outcome["reasons"]:
        who = f"{reason['device']}: " if reason["device"] else ""
        lines.append(f"  {who}{reason['reason']} [{reason['phase']}]")
        if reason["remedy"]:
            lines.append(f"    → {reason['remedy']}")
    if outcome.get("downtime_ms") is not None:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in outcome["downtime"].items())
        lines.append(
            f"  downtime {outcome['downtime_ms']:.1f} ms ({parts}); slowest device {outcome['slowest_device']}"
        )
    if outcome["ram_bytes"]:
        lines.append(
            f"  memory {outcome['ram_bytes'] / MIB:.0f} MiB, sent {outcome['ram_bytes_sent'] / MIB:.1f} MiB in "
            f"{len(outcome['rounds'])} rounds"
        )
    verified = outcome["verified"]
    if verified["ram"] is not None:
        words = {True: "equal", False: "DIFFERENT", None: "not compared"}
        lines.append(
            f"  all of both memories: {words[verified['ram']]}; all device state: {words[verified['devices']]}"
        )
    lines.append(
        f"  guest: tick {guest['ticks_before']} before, {guest['ticks_after']} after; {guest['missed']} missed, "
        f"{guest['corrupt']} corrupt; its longest gap {guest['longest_gap_ms']:.1f} ms"
    )
    return lines
