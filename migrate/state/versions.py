"""Rules of compatibility between what one side writes and the other reads; words for the preflight where they do not meet.

A device writes the version that the destination reads, as QEMU's versioned machine types do: nobody guesses at an unknown
version. The rules look at numbers and digests only; changing a state from one version to another is not done here.
"""

from __future__ import annotations

from collections.abc import Collection


def can_read(readable: Collection[int], writable: Collection[int]) -> int | None:
    """The version to use: the highest that the source writes and the destination reads, or None if there is none."""
    return max(set(readable) & set(writable), default=None)


def why_not(device_type: str, *, readable: Collection[int], writable: Collection[int]) -> tuple[str, str]:
    """Reason and remedy when `can_read` found nothing, from the point of view of whoever asked for the migration."""
    reason = (
        f"the source writes {_versions(writable)} of {device_type} and the destination reads {_versions(readable)}: "
        "no version in common"
    )
    if not readable:
        return reason, f"install a vmferry that has {device_type} on the destination"
    if not writable:
        return reason, f"start {device_type} on the source in a mode that can save"
    if min(writable) > max(readable):
        return reason, f"upgrade {device_type} on the destination to {_versions([min(writable)])} or later"
    if max(writable) < min(readable):
        return reason, f"upgrade {device_type} on the source to {_versions([min(readable)])} or later"
    return reason, f"run the same release of {device_type} on both hosts"


def digests_differ(
    device_type: str, version: int, *, source: bytes, destination: bytes
) -> tuple[str, str] | None:
    """Reason and remedy when both sides know a version by its number but define it otherwise; None if they agree."""
    if source == destination:
        return None
    return (
        f"{device_type} version {version} is defined otherwise on the source (digest {source.hex()[:16]}) "
        f"than on the destination ({destination.hex()[:16]})",
        "a released version was changed on one of the hosts: give both the same schema file",
    )


def _versions(numbers: Collection[int]) -> str:
    """Version numbers for a person: "version 2", "versions 1, 2"."""
    if not numbers:
        return "no version"
    word = "version" if len(numbers) == 1 else "versions"
    return f"{word} {', '.join(map(str, sorted(numbers)))}"
