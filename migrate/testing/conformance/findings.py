"""Every check of the conformance run: its id, which stays, what is looked at, and what it means for a migration if it fails.

What is said of QEMU was measured with QEMU 7.2.22 (docs/architecture.md); its version stands with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Verdict(StrEnum):
    OK = "OK"
    WARN = "WARN"  #: it can be moved, and this is what may go wrong
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Check:
    what: str
    means: str


@dataclass(frozen=True, slots=True)
class Finding:
    id: str  #: of CHECKS
    device: str
    verdict: Verdict
    text: str  #: what was seen

    @property
    def means(self) -> str:
        return CHECKS[self.id].means


CHECKS: Final[Mapping[str, Check]] = {
    "vmstate.identity": Check(
        "GetAll tells an Id of 1 to 255 bytes", "without an Id nobody carries it: its state stays behind"
    ),
    "vmstate.unique": Check(
        "no other process has this Id",
        "two helpers with one Id crash the source QEMU (7.2); vmferry refuses the machine",
    ),
    "vmstate.queued": Check(
        "it queues for the name org.qemu.VMState1",
        "QEMU looks only there: it would leave this state behind without a word",
    ),
    "vmstate.save": Check(
        "Save answers with bytes",
        "the migration fails at the stop; with QEMU 7.2's defaults the guest is lost",
    ),
    "vmstate.save-time": Check(
        "Save takes a fraction of a second",
        "the guest stands still as long; after 25 s QEMU 7.2 goes on without this state",
    ),
    "vmstate.save-size": Check(
        "Save gives at most 1 MiB",
        "QEMU 7.2 says `completed` and loses the guest; stream it beside the blob (Device1)",
    ),
    "vmstate.runs-on": Check(
        "Save leaves it running", "after a migration that was aborted the source must go on with this device"
    ),
    "vmstate.save-again": Check("Save twice gives the same", "what is saved depends on more than the state"),
    "vmstate.load-own": Check(
        "Load takes what Save gave, and Save then gives it again", "the device does not arrive as it left"
    ),
    "vmstate.load-damaged": Check(
        "Load refuses a damaged blob and changes nothing",
        "damage goes unnoticed, or half of it is taken over",
    ),
    "vmstate.words": Check(
        "a refusal says why, in words for a person", "whoever asks why gets nothing, or a traceback"
    ),
    "blob.readable": Check(
        "the blob is one that can be looked into", "nothing of it can be checked before the guest stops"
    ),
    "device.properties": Check("Device1's properties are as promised", "the preflight refuses the machine"),
    "device.quiesce": Check(
        "it stops in two phases and runs again", "the machine cannot be stopped, or not resumed"
    ),
    "device.arcs": Check(
        "every move between states that is allowed works", "a migration, or its abort, gets stuck there"
    ),
    "device.forbidden": Check(
        "every move that is forbidden is refused, and changes nothing",
        "a mistake of a coordinator would not be noticed",
    ),
    "device.saved-still": Check(
        "stopped, it saves the same again and again", "something changes while the machine stands still"
    ),
    "device.versions": Check(
        "it writes every version that it says it writes",
        "an older destination is promised what it does not get",
    ),
    "device.checks": Check(
        "CheckIncoming takes a good blob, refuses a bad one, and touches nothing",
        "what would not load is found after the stop only",
    ),
    "device.stages": Check(
        "a bad blob is not staged, nothing unstaged is applied, a good one is applied whole",
        "half a state may be loaded",
    ),
    "device.fields": Check(
        "every field that is loaded is saved again",
        "the device forgets something on its way, or makes something up",
    ),
    "device.memory-still": Check(
        "stopped, it writes no guest memory",
        "the last pages are sent already: what it writes then is lost, and the guest is corrupt",
    ),
    "device.tracking": Check(
        "it tracks what it writes to guest memory", "pages would be missed, or all of memory must be compared"
    ),
    "device.finish": Check(
        "it is told how a migration ended, by words that it knows",
        "it never learns that it may let go, or go on",
    ),
    "device.as-found": Check("it is as it was found", "this run has changed it: start it anew"),
}
