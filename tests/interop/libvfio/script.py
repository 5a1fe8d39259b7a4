"""The messages, in scenes: each plays to a server of its own, on one connection. What libvfio-user's own tests ask for, and more.

Layouts are written out here, and not taken from our codec: it would hide its own mistakes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

#: What libvfio-user efd091b answered.
RECORDED: Final = Path(__file__).parents[2] / "data" / "libvfio-user.json"
PAGE: Final = 4096
IOVA: Final = 0x10_0000
#: Flags of DMA_MAP: readable, writable, and to be mapped by its descriptor.
R, W, MMAP = 1, 2, 4
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
MIGRATION, STATE, START, STOP_LOG, REPORT = 1, 2, 6, 7, 8
STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY = 1, 2, 3, 4, 5, 6
NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True, slots=True)
class Step:
    """One message. What is compared of the reply: its errno; also how long it is, and what is in it where `data`."""

    name: str
    command: int
    payload: bytes = b""
    fds: str = ""  #: descriptors that go with it: m a sealed memfd of 16 pages, u one without seals, e an eventfd, p a pipe's end
    flags: int = 0
    size: int = -1  #: what the header claims; -1: what is so
    data: bool = False


def version(major: int = 0, minor: int = 1, data: bytes | None = None, **capabilities: Any) -> bytes:
    if data is None:
        data = json.dumps({"capabilities": capabilities}).encode() + b"\0" if capabilities else b""
    return struct.pack("=HH", major, minor) + data


def map_(address: int, size: int, flags: int = R | W | MMAP, offset: int = 0, argsz: int = 32) -> bytes:
    return struct.pack("=IIQQQ", argsz, flags, offset, address, size)


def unmap(address: int, size: int, flags: int = 0, argsz: int = 24) -> bytes:
    return struct.pack("=IIQQ", argsz, flags, address, size)


def access(offset: int, region: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("=QII", offset, region, count) + data


def irqs(flags: int, index: int, start: int, count: int, data: bytes = b"", argsz: int = -1) -> bytes:
    size = 20 + len(data) if argsz < 0 else argsz
    return struct.pack("=IIIII", size, flags, index, start, count) + data


def feature(number: int, operation: int, data: bytes = b"", argsz: int = -1) -> bytes:
    return struct.pack("=II", 8 + len(data) if argsz < 0 else argsz, number | operation) + data


def to(state: int) -> bytes:
    return feature(STATE, SET, struct.pack("=II", state, 0))


def read_data(size: int, argsz: int = -1) -> bytes:
    return struct.pack("=II", 8 + size if argsz < 0 else argsz, size)


def write_data(data: bytes, size: int = -1, argsz: int = -1) -> bytes:
    size = len(data) if size < 0 else size
    return struct.pack("=II", 8 + size if argsz < 0 else argsz, size) + data


def start(page: int, ranges: list[tuple[int, int]] | None = None) -> bytes:
    found = ranges or []
    body = struct.pack("=QII", page, len(found), 0) + b"".join(struct.pack("=QQ", *one) for one in found)
    return feature(START, SET, body)


def report(address: int, length: int, page: int = PAGE, room: int = 8) -> bytes:
    return feature(REPORT, GET, struct.pack("=QQQ", address, length, page), argsz=8 + 24 + room)


HELLO: Final = Step("hello", 1, version(max_msg_fds=8, max_data_xfer_size=1 << 20))
_TOUCH: Final = Step("the device writes to the first page", 10, access(8, 0, 8, struct.pack("=Q", IOVA)))
_TOUCH_THIRD: Final = Step(
    "the device writes to the third page", 10, access(8, 0, 8, struct.pack("=Q", IOVA + 2 * PAGE))
)
_MAP: Final = Step("map", 2, map_(IOVA, 16 * PAGE), "m")


def _alone() -> Iterator[tuple[str, list[Step]]]:
    """VERSION, of which a connection has one."""
    for name, payload in {
        "plain": version(),
        "older minor": version(0, 0),
        "newer minor": version(0, 9),
        "newer major": version(1, 0),
        "two bytes": b"\0\0",
        "nothing": b"",
        "no json": version(data=b"not json\0"),
        "json without its NUL": version(data=b"{}"),
        "an array": version(data=b"[]\0"),
        "capabilities that are no object": version(data=b'{"capabilities": 1}\0'),
        "descriptors that are text": version(max_msg_fds="8"),
        "negative descriptors": version(max_msg_fds=-1),
        "too many descriptors": version(max_msg_fds=1 << 40),
        "transfer size that is text": version(max_data_xfer_size="8"),
        "negative transfer size": version(max_data_xfer_size=-1),
        "large transfer size": version(max_data_xfer_size=1 << 40),
        "page size that is text": version(pgsizes="x"),
        "unknown capability": version(something_new=True),
        "old migration capability": version(migration={"pgsize": 4096}),
        "migration page size that is text": version(migration={"pgsize": "x"}),
        "write_multiple": version(write_multiple=True),
        "write_multiple that is a number": version(write_multiple=3),
        "dma maps that are text": version(max_dma_maps="x"),
    }.items():
        yield f"version: {name}", [Step("version", 1, payload)]
    yield "version: another command first", [Step("info", 4, struct.pack("=IIII", 16, 0, 0, 0))]
    yield "version: twice", [HELLO, Step("again", 1, version())]


_REQUESTS: Final = [
    HELLO,
    Step("unknown command", 99),
    Step("command 0", 0),
    Step("command 14, which was never given", 14),
    Step("a reply nobody asked for", 4, struct.pack("=IIII", 16, 0, 0, 0), flags=1),
]
_INFO: Final = [
    HELLO,
    Step("info", 4, struct.pack("=IIII", 16, 0, 0, 0), data=True),
    Step("info, short", 4, struct.pack("=III", 16, 0, 0)),
    Step("info, long", 4, struct.pack("=IIIII", 16, 0, 0, 0, 0)),
    Step("info, small argsz", 4, struct.pack("=IIII", 8, 0, 0, 0)),
    Step("info, large argsz", 4, struct.pack("=IIII", 1000, 0, 0, 0)),
    Step("info, nothing", 4),
    *[Step(f"region {n}", 5, struct.pack("=IIIIQQ", 32, 0, n, 0, 0, 0), data=True) for n in range(9)],
    Step("region 9", 5, struct.pack("=IIIIQQ", 32, 0, 9, 0, 0, 0)),
    Step("region, small argsz", 5, struct.pack("=IIIIQQ", 31, 0, 0, 0, 0, 0)),
    Step("region, large argsz", 5, struct.pack("=IIIIQQ", 64, 0, 0, 0, 0, 0)),
    Step("region, short", 5, struct.pack("=III", 32, 0, 0)),
    *[Step(f"irq {n}", 7, struct.pack("=IIII", 16, 0, n, 0), data=True) for n in range(5)],
    Step("irq 5", 7, struct.pack("=IIII", 16, 0, 5, 0)),
    Step("irq, small argsz", 7, struct.pack("=IIII", 15, 0, 0, 0)),
    Step("irq, large argsz", 7, struct.pack("=IIII", 32, 0, 0, 0)),
    Step("irq, short", 7, struct.pack("=II", 16, 0)),
    Step("io fds, none", 6, struct.pack("=IIII", 16, 0, 0, 0), data=True),
    Step("io fds, small argsz", 6, struct.pack("=IIII", 15, 0, 0, 0)),
    Step("io fds, flags", 6, struct.pack("=IIII", 16, 1, 0, 0)),
    Step("io fds, count", 6, struct.pack("=IIII", 16, 0, 0, 1)),
    Step("io fds, no such region", 6, struct.pack("=IIII", 16, 0, 9, 0)),
    Step("io fds, short", 6, struct.pack("=II", 16, 0)),
]
_REGIONS: Final = [
    HELLO,
    Step("write 4", 10, access(0, 0, 4, b"abcd"), data=True),
    Step("read 4", 9, access(0, 0, 4), data=True),
    Step("read 1", 9, access(3, 0, 1), data=True),
    Step("read 8", 9, access(0, 0, 8), data=True),
    Step("read 3", 9, access(0, 0, 3), data=True),
    Step("read across the end", 9, access(12, 0, 8)),
    Step("read at the end", 9, access(16, 0, 1)),
    Step("read beyond", 9, access(1 << 40, 0, 4)),
    Step("read around", 9, access((1 << 64) - 4, 0, 8)),
    Step("read nothing", 9, access(0, 0, 0)),
    Step("read of region 1, which is empty", 9, access(0, 1, 4)),
    Step("read of region 9", 9, access(0, 9, 4)),
    Step("read of 2 MiB", 9, access(0, 0, 2 << 20)),
    Step("read, short", 9, struct.pack("=QI", 0, 0)),
    Step("read with data", 9, access(0, 0, 4, b"abcd")),
    Step("write of less than it says", 10, access(0, 0, 8, b"abcd")),
    Step("write of more than it says", 10, access(0, 0, 2, b"abcd")),
    Step("write across the end", 10, access(14, 0, 4, b"abcd")),
    Step("write nothing", 10, access(0, 0, 0)),
    Step("write to region 9", 10, access(0, 9, 4, b"abcd")),
    Step("configuration", 9, access(0, 7, 4)),
    Step("configuration across its end", 9, access(254, 7, 4)),
    Step("reset", 13),
    Step("read after reset", 9, access(0, 0, 4), data=True),
    Step("reset with a payload", 13, b"abcd"),
    Step("write without a reply", 10, access(0, 0, 4, b"wxyz"), flags=0x10),
    Step("what it wrote", 9, access(0, 0, 4), data=True),
    Step("many writes, not negotiated", 15, struct.pack("=Q", 0)),
]
_DMA: Final = [
    HELLO,
    Step("map, small argsz", 2, map_(IOVA, PAGE, argsz=31), "m"),
    Step("map, large argsz", 2, map_(IOVA, PAGE, argsz=64), "m"),
    Step("unmap that", 3, unmap(IOVA, PAGE)),
    Step("map, short", 2, map_(IOVA, PAGE)[:24], "m"),
    Step("map nothing", 2, map_(IOVA, 0), "m"),
    Step("map without rights", 2, map_(IOVA, PAGE, MMAP), "m"),
    Step("unmap what may not be touched", 3, unmap(IOVA, PAGE)),
    Step("map with unknown flags", 2, map_(IOVA, PAGE, 0x80), "m"),
    Step("map around", 2, map_((1 << 64) - PAGE, 2 * PAGE), "m"),
    Step("unmap around", 3, unmap((1 << 64) - PAGE, 2 * PAGE)),
    Step("map more than the file has", 2, map_(IOVA, 64 * PAGE), "m"),
    Step("unmap more than the file has", 3, unmap(IOVA, 64 * PAGE)),
    Step("map with two descriptors", 2, map_(IOVA, PAGE), "mm"),
    Step("unmap the first of them", 3, unmap(IOVA, PAGE)),
    Step("map a pipe", 2, map_(IOVA, PAGE), "p"),
    Step("map what may shrink", 2, map_(IOVA, PAGE), "u"),
    Step("unmap what may shrink", 3, unmap(IOVA, PAGE)),
    Step("map without a descriptor", 2, map_(IOVA, PAGE, R | W)),
    Step("unmap it", 3, unmap(IOVA, PAGE), data=True),
    Step("map by a descriptor that is not there", 2, map_(IOVA, PAGE)),
    Step("unmap that too", 3, unmap(IOVA, PAGE)),
    Step("a descriptor with a map that says none", 2, map_(IOVA, PAGE, R | W), "m"),
    Step("unmap that again", 3, unmap(IOVA, PAGE)),
    _MAP,
    Step("the same again", 2, map_(IOVA, 16 * PAGE), "m"),
    Step("map over its end", 2, map_(IOVA + 15 * PAGE, 2 * PAGE), "m"),
    Step("map within", 2, map_(IOVA + PAGE, PAGE), "m"),
    Step("map around it", 2, map_(IOVA - PAGE, 32 * PAGE), "m"),
    Step("unmap a part", 3, unmap(IOVA, PAGE)),
    Step("unmap more", 3, unmap(IOVA, 32 * PAGE)),
    Step("unmap elsewhere", 3, unmap(0x4000_0000, PAGE)),
    Step("unmap, small argsz", 3, unmap(IOVA, 16 * PAGE, argsz=23)),
    Step("unmap, short", 3, unmap(IOVA, 16 * PAGE)[:16]),
    Step("unmap with unknown flags", 3, unmap(IOVA, 16 * PAGE, 0x40)),
    Step("unmap everything, and a window", 3, unmap(IOVA, 16 * PAGE, 2)),
    Step("unmap all", 3, unmap(0, 0, 2), data=True),
    Step("unmap all of nothing", 3, unmap(0, 0, 2)),
    Step("unmap what is gone", 3, unmap(IOVA, 16 * PAGE)),
]
_IRQS: Final = [
    HELLO,
    Step("eventfd", 8, irqs(EVENTFD | TRIGGER, 0, 0, 1), "e"),
    Step("trigger", 8, irqs(NONE | TRIGGER, 0, 0, 1)),
    Step("trigger by bool", 8, irqs(BOOL | TRIGGER, 0, 0, 1, b"\1")),
    Step("bool without its data", 8, irqs(BOOL | TRIGGER, 0, 0, 1)),
    Step("bool with more", 8, irqs(BOOL | TRIGGER, 0, 0, 1, b"\1\1")),
    Step("disable", 8, irqs(NONE | TRIGGER, 0, 0, 0)),
    Step("trigger with nobody listening", 8, irqs(NONE | TRIGGER, 0, 0, 1)),
    Step("eventfd away", 8, irqs(EVENTFD | TRIGGER, 0, 0, 1)),
    Step("no such index", 8, irqs(EVENTFD | TRIGGER, 5, 0, 1), "e"),
    Step("an index without interrupts", 8, irqs(EVENTFD | TRIGGER, 1, 0, 1), "e"),
    Step("beyond the last", 8, irqs(EVENTFD | TRIGGER, 0, 1, 1), "e"),
    Step("two of one", 8, irqs(EVENTFD | TRIGGER, 0, 0, 2), "ee"),
    Step("two descriptors for one", 8, irqs(EVENTFD | TRIGGER, 0, 0, 1), "ee"),
    Step("start and count around", 8, irqs(NONE | TRIGGER, 0, 0xFFFF_FFFF, 2)),
    Step("no kind of data", 8, irqs(TRIGGER, 0, 0, 1)),
    Step("two kinds of data", 8, irqs(NONE | BOOL | TRIGGER, 0, 0, 1, b"\1")),
    Step("no action", 8, irqs(NONE, 0, 0, 1)),
    Step("two actions", 8, irqs(NONE | TRIGGER | MASK, 0, 0, 1)),
    Step("unknown flags", 8, irqs(NONE | TRIGGER | 0x100, 0, 0, 1)),
    Step("small argsz", 8, irqs(NONE | TRIGGER, 0, 0, 1, argsz=19)),
    Step("short", 8, irqs(NONE | TRIGGER, 0, 0, 1)[:12]),
    Step("nothing masked", 8, irqs(NONE | MASK, 0, 0, 0)),
    Step("mask by eventfd", 8, irqs(EVENTFD | MASK, 0, 0, 1), "e"),
]
_MIGRATION: Final = [
    HELLO,
    Step("flags", 16, feature(MIGRATION, GET, argsz=16), data=True),
    Step("flags, small argsz", 16, feature(MIGRATION, GET, argsz=12)),
    Step("probe flags", 16, feature(MIGRATION, PROBE | GET)),
    Step("probe flags, set", 16, feature(MIGRATION, PROBE | SET)),
    Step("flags, set", 16, feature(MIGRATION, SET, bytes(8))),
    Step("probe of nothing", 16, feature(MIGRATION, PROBE)),
    Step("get and set", 16, feature(STATE, GET | SET, bytes(8))),
    Step("no operation", 16, feature(STATE, 0)),
    Step("unknown feature", 16, feature(0x1234, GET, argsz=64)),
    Step("probe of an unknown feature", 16, feature(0x1234, PROBE | GET)),
    Step("unknown flags", 16, feature(STATE, GET | 1 << 20, argsz=16)),
    Step("short", 16, struct.pack("=I", 8)),
    Step("state", 16, feature(STATE, GET, argsz=16), data=True),
    Step("state, small argsz", 16, feature(STATE, GET, argsz=12)),
    Step("probe state", 16, feature(STATE, PROBE | GET | SET)),
    Step("read data while it runs", 17, read_data(4)),
    Step("write data while it runs", 18, write_data(b"abcd")),
    Step("to ERROR", 16, to(0)),
    Step("to RUNNING_P2P", 16, to(RUNNING_P2P)),
    Step("to no state", 16, to(0xABCD)),
    Step("to RESUMING without its data", 16, feature(STATE, SET, struct.pack("=I", RESUMING))),
    Step("to RUNNING again", 16, to(RUNNING)),
    Step("to STOP", 16, to(STOP)),
    Step("to STOP_COPY", 16, to(STOP_COPY)),
    Step("back to PRE_COPY", 16, to(PRE_COPY)),
    Step("read data, small argsz", 17, read_data(4, argsz=8)),
    Step("read data, short", 17, struct.pack("=I", 8)),
    Step("read data, 2 MiB", 17, read_data(2 << 20)),
    Step("read data", 17, read_data(4)),
    Step("write data while it is read", 18, write_data(b"abcd")),
    Step("from STOP_COPY to RUNNING", 16, to(RUNNING)),
    Step("to STOP_COPY at once", 16, to(STOP_COPY)),
    Step("from STOP_COPY to STOP", 16, to(STOP)),
    Step("to RESUMING", 16, to(RESUMING)),
    Step("read data while it resumes", 17, read_data(4)),
    Step("write data of less than it says", 18, write_data(b"abcd", size=8)),
    Step("write data of more than it says", 18, write_data(b"abcd", size=2)),
    Step("write data, small argsz", 18, write_data(b"abcd", argsz=8)),
    Step("write data, short", 18, struct.pack("=I", 8)),
    Step("to PRE_COPY while it resumes", 16, to(PRE_COPY)),
]
_DIRTY: Final = [
    HELLO,
    Step("report before a start", 16, report(IOVA, 16 * PAGE)),
    Step("start, short", 16, feature(START, SET, struct.pack("=Q", PAGE))),
    Step("start by get", 16, feature(START, GET, argsz=64)),
    _MAP,
    Step("start", 16, start(PAGE, [(IOVA, 16 * PAGE)])),
    Step("start again", 16, start(PAGE)),
    Step("start with another page", 16, start(8192)),
    Step("nothing yet", 16, report(IOVA, 16 * PAGE), data=True),
    _TOUCH,
    Step("the first page", 16, report(IOVA, 16 * PAGE), data=True),
    Step("cleared", 16, report(IOVA, 16 * PAGE), data=True),
    _TOUCH,
    _TOUCH_THIRD,
    Step("two pages", 16, report(IOVA, 16 * PAGE), data=True),
    _TOUCH_THIRD,
    Step("by pages twice as large", 16, report(IOVA, 16 * PAGE, 2 * PAGE), data=True),
    _TOUCH_THIRD,
    Step("by pages half as large", 16, report(IOVA, 16 * PAGE, PAGE // 2), data=True),
    Step("too little room", 16, report(IOVA, 16 * PAGE, room=0)),
    Step("a part of a window", 16, report(IOVA, PAGE)),
    Step("of nothing mapped", 16, report(0x4000_0000, 16 * PAGE)),
    Step("page 0", 16, report(IOVA, 16 * PAGE, 0)),
    Step("page of 16 MiB", 16, report(IOVA, 16 * PAGE, 1 << 24)),
    Step("page of 3000", 16, report(IOVA, 16 * PAGE, 3000)),
    Step("report by set", 16, feature(REPORT, SET, struct.pack("=QQQ", IOVA, 16 * PAGE, PAGE) + bytes(8))),
    Step("report, short", 16, feature(REPORT, GET, struct.pack("=Q", IOVA))),
    Step("unmap while it logs", 3, unmap(IOVA, 16 * PAGE)),
    Step("report of what is gone", 16, report(IOVA, 16 * PAGE)),
    Step("stop by get", 16, feature(STOP_LOG, GET)),
    Step("stop", 16, feature(STOP_LOG, SET)),
    Step("stop again", 16, feature(STOP_LOG, SET)),
]
_ODD_PAGES: Final = [
    HELLO,
    _MAP,
    Step("start with page 0", 16, start(0)),
    Step("stop", 16, feature(STOP_LOG, SET)),
    Step("start with a page that is none", 16, start(4095)),
]
_FRAMES: Final = {
    "frame: a header that claims less than itself": [HELLO, Step("small", 4, size=15)],
    "frame: a header that claims 16 MiB": [HELLO, Step("large", 4, size=16 << 20)],
    "frame: more descriptors than were agreed": [HELLO, Step("nine", 4, struct.pack("=IIII", 16, 0, 0, 0), "e" * 9)],
    "frame: descriptors with what takes none": [HELLO, Step("one", 4, struct.pack("=IIII", 16, 0, 0, 0), "e")],
}  # fmt: skip

SCENES: Final[dict[str, list[Step]]] = {
    **dict(_alone()),
    "requests": _REQUESTS,
    "info": _INFO,
    "regions": _REGIONS,
    "dma": _DMA,
    "irqs": _IRQS,
    "migration": _MIGRATION,
    "dirty": _DIRTY,
    "odd pages": _ODD_PAGES,
    **_FRAMES,
}
