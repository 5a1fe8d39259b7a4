"""Where our server answers otherwise than libvfio-user's, and why. What is not here is the same, errno by errno.

docs/vfio-user.md has it as a table (`python -m tests.interop.libvfio.differences` prints that), and a test compares the two.
"""

from __future__ import annotations

import errno
import json
import sys
from typing import Final, NamedTuple

from tests.interop.libvfio.script import RECORDED, SCENES
from tests.interop.libvfio.talk import Answer

EEXIST, EINVAL, ENOENT, ENOTSUP = 17, 22, 2, 95


class Difference(NamedTuple):
    ours: Answer
    why: str


_TYPES = "a capability of the wrong type, or below zero, is not guessed at"
_DROPPED = "the specification no longer has this capability, so it is skipped as any that is unknown"
_TWICE = (
    "no version is agreed on twice, and the number is known: ENOTSUP, as for any command that is not for now"
)
_UNKNOWN = "ENOTSUP says that a command is not known, EINVAL that it is wrong"
_LONGER = "a message that is longer than it says, or than it can be, is not half understood"
_NOTHING = "the reply to a count of 0 has the fields of every other reply"
_RIGHTS = "a window that may be neither read nor written is a mistake of the client's"
_AROUND = "no window goes round the end of the address space"
_FILE = "beyond the end of its file an access would be SIGBUS, in the device's process"
_SEALS = "memory that is no memfd, or may shrink, would end the device's process when the client wants it"
_AFTER = "there is no such window here: it was not mapped before"
_OVERLAP = "EEXIST, as the kernel's VFIO says it"
_FLAGS = "an unknown flag may mean what is not done"
_EVENTFD = "masking by an eventfd is not offered (IRQ info says so), and not ignored"
_SHORT = "a field that is not there is not taken for zero"
_ARC = "what was written is no whole state: it is judged on the way out of RESUMING"
_NO_LOG = "nothing is logged yet: EINVAL, before it is asked what is mapped"
_NO_IRQS = "an index without interrupts has no way of telling any"
_NOT_OURS = (
    "libvfio-user gives every PCI function an error and a request interrupt; ours has those that it raises"
)
_NO_STREAM = "the device here streams nothing, so it has no PRE_COPY; libvfio-user offers it for every device"
_NO_FD = "there is no data descriptor: -1, as the kernel says it"
_TOO_MANY = "more descriptors than were agreed on, with a command that takes none"


def _error(number: int, why: str) -> Difference:
    return Difference({"errno": number}, why)


def _good(size: int, why: str) -> Difference:
    return Difference({"errno": 0, "size": size}, why)


def _data(content: str, why: str) -> Difference:
    """:param content: hexadecimal."""
    return Difference({"errno": 0, "size": len(content) // 2, "data": content}, why)


DIFFERENCES: Final[dict[tuple[str, str], Difference]] = {
    ("version: an array", "version"): _error(EINVAL, _TYPES),
    ("version: negative transfer size", "version"): _error(EINVAL, _TYPES),
    ("version: page size that is text", "version"): _error(EINVAL, _TYPES),
    ("version: write_multiple that is a number", "version"): _error(EINVAL, _TYPES),
    ("version: dma maps that are text", "version"): _error(EINVAL, _TYPES),
    ("version: migration page size that is text", "version"): Difference({"errno": 0}, _DROPPED),
    ("version: twice", "again"): _error(ENOTSUP, _TWICE),
    ("requests", "unknown command"): _error(ENOTSUP, _UNKNOWN),
    ("requests", "command 0"): _error(ENOTSUP, _UNKNOWN),
    ("requests", "command 14, which was never given"): _error(ENOTSUP, _UNKNOWN),
    ("info", "info, long"): _error(EINVAL, _LONGER),
    ("info", "irq 1"): _data("10000000000000000100000000000000", _NO_IRQS),
    ("info", "irq 2"): _data("10000000000000000200000000000000", _NO_IRQS),
    ("info", "irq 3"): _data("10000000000000000300000000000000", _NOT_OURS),
    ("info", "irq 4"): _data("10000000000000000400000000000000", _NOT_OURS),
    ("regions", "read nothing"): _good(16, _NOTHING),
    ("regions", "read with data"): _error(EINVAL, _LONGER),
    ("regions", "write nothing"): _good(16, _NOTHING),
    ("regions", "reset with a payload"): _error(EINVAL, _LONGER),
    ("regions", "many writes, not negotiated"): _error(ENOTSUP, _UNKNOWN),
    ("dma", "map without rights"): _error(EINVAL, _RIGHTS),
    ("dma", "unmap what may not be touched"): _error(ENOENT, _AFTER),
    ("dma", "map around"): _error(EINVAL, _AROUND),
    ("dma", "unmap around"): _error(EINVAL, _AROUND),
    ("dma", "map more than the file has"): _error(EINVAL, _FILE),
    ("dma", "unmap more than the file has"): _error(ENOENT, _AFTER),
    ("dma", "map a pipe"): _error(EINVAL, _SEALS),
    ("dma", "map what may shrink"): _error(EINVAL, _SEALS),
    ("dma", "unmap what may shrink"): _error(ENOENT, _AFTER),
    ("dma", "the same again"): _error(EEXIST, _OVERLAP),
    ("dma", "map over its end"): _error(EEXIST, _OVERLAP),
    ("dma", "map within"): _error(EEXIST, _OVERLAP),
    ("dma", "map around it"): _error(EEXIST, _OVERLAP),
    ("irqs", "unknown flags"): _error(EINVAL, _FLAGS),
    ("irqs", "mask by eventfd"): _error(EINVAL, _EVENTFD),
    ("migration", "flags"): _data("10000000010001000100000000000000", _NO_STREAM),
    ("migration", "state"): _data("100000000200010002000000ffffffff", _NO_FD),
    ("migration", "to RESUMING without its data"): _error(EINVAL, _SHORT),
    ("migration", "write data of more than it says"): _error(EINVAL, _LONGER),
    ("migration", "to PRE_COPY while it resumes"): _error(EINVAL, _ARC),
    ("dirty", "report before a start"): _error(EINVAL, _NO_LOG),
    ("dirty", "start, short"): _error(EINVAL, _SHORT),
    ("frame: more descriptors than were agreed", "nine"): _error(EINVAL, _TOO_MANY),
}


def table() -> str:
    """As Markdown."""
    rows = ["| message | libvfio-user | here | why |", "|---|---|---|---|"]
    theirs = json.loads(RECORDED.read_text())
    for (scene, name), found in DIFFERENCES.items():
        there = theirs[scene][[step.name for step in SCENES[scene]].index(name)]
        what = f"{scene}: {name}".removesuffix(": version")
        rows.append(f"| {what} | {_said(there)} | {_said(found.ours)} | {found.why} |")
    return "\n".join(rows) + "\n"


def _said(answer: Answer) -> str:
    number = int(answer.get("errno", 0))
    if number:
        return errno.errorcode[number]
    return (
        f"`{answer['data']}`"
        if "data" in answer
        else f"{answer['size']} bytes"
        if "size" in answer
        else "taken"
    )


if __name__ == "__main__":
    sys.stdout.write(table())
