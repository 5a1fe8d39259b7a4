"""QEMU's command line: the words of a model, and what makes it a device process of ours.

A model's words make one PCI function with `id={id}`. Besides, `{image}` is the device's image on this host: the bridge has the
lock on it, so QEMU is told not to (`file.locking=off`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from devices.bridges.xremote.requests import EVENTS
from migrate.errors import Phase, UsageError

#: What is there without --serve.
BUILT_IN: Final[Mapping[str, Sequence[str]]] = {
    "lsi53c895a": (
        "qemu-system-x86_64",
        # What it loads comes from another host.
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-drive", "id={id}-disk,if=none,format=raw,file={image},file.locking=off",
        "-device", "lsi53c895a,id={id}",
        # An error is the guest's to hear: by default QEMU stops where its storage is full, and nobody here would tell it to go on.
        "-device", "scsi-hd,drive={id}-disk,bus={id}.0,scsi-id=0,werror=report,rerror=report",
    ),
}  # fmt: skip
#: What would take QEMU's place or keep it from us.
FORBIDDEN: Final = ("-daemonize", "-incoming", "-S", "-qmp", "-monitor", "-machine", "-M", "-D", "-trace")


def escaped(text: str) -> str:
    """A comma ends an option's value in QEMU's language, and two are one."""
    return text.replace(",", ",,")


def check(words: Sequence[str]) -> None:
    """A model's words, as they are written. :raise UsageError: some are ours to say, or have QEMU lock the image before us."""
    for word in words:
        if word in FORBIDDEN:
            raise UsageError(
                f"the command of this model has {word}, which the bridge has to say itself",
                remedy="leave it out",
                phase=Phase.SETUP,
            )
        if "{image}" in word and "locking=off" not in word:
            raise UsageError(
                f"the command of this model has {word}, by which QEMU locks the image; the lock is the bridge's",
                remedy="add ,file.locking=off to it",
                phase=Phase.SETUP,
            )


def build(
    words: Sequence[str], device: str, monitor: str, connection: int, trace: int, *, incoming: bool
) -> list[str]:
    """:param connection: the device's end of a socket pair. :param trace: where QEMU logs. QEMU inherits both."""
    line = [
        *words,
        "-machine", "x-remote", "-nodefaults", "-display", "none", "-S",
        "-object", f"x-remote-object,id=ferry-remote,devid={escaped(device)},fd={connection}",
        "-qmp", f"unix:{escaped(monitor)},server=on,wait=off",
        "-D", f"/proc/self/fd/{trace}",
    ]  # fmt: skip
    for event in EVENTS:
        line += ["-trace", event]
    return [*line, "-incoming", "defer"] if incoming else line
