"""The checks of org.qemu.VMState1: what QEMU asks of a helper, and what it does not ask and then loses the guest by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Final

from migrate.bus.device import MAX_BLOB
from migrate.errors import BlobError, DeviceGone, DeviceTimeout, FerryError, SchemaError
from migrate.state import blob, catalog
from migrate.testing.conformance.findings import Verdict
from migrate.testing.conformance.process import Process

Seen = tuple[str, Verdict, str]
OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

#: What QEMU calls "a fraction of a second", and its own deadline (GLib's default), s.
_FRACTION, _DEADLINE = 0.3, 25.0
_MOST: Final = 1 << 20
#: What changes by itself does so within that, s.
_MOVES: Final = 0.1


async def check(process: Process, streams: bool, still: bool) -> AsyncIterator[Seen]:
    """:param streams: its state is larger than a blob, so it is right not to queue. :param still: it stands still while we look."""
    yield _queued(process, streams)
    if streams:
        return  # its state does not fit VMState1, and it says so by not queueing
    began = time.monotonic()
    try:
        data = await process.save()
    except DeviceTimeout as error:
        yield "vmstate.save-time", FAIL, error.reason
        return
    except FerryError as error:
        id_ = "vmstate.save-size" if "bytes" in error.reason and "most" in error.reason else "vmstate.save"
        yield id_, FAIL, error.reason
        return
    took = time.monotonic() - began
    yield "vmstate.save", OK, f"{len(data)} bytes"
    yield (
        "vmstate.save-time",
        FAIL if took > _DEADLINE else WARN if took > _FRACTION else OK,
        f"{took * 1e3:.0f} ms",
    )
    yield "vmstate.save-size", FAIL if len(data) > _MOST else OK, f"{len(data)} of {_MOST} bytes"
    yield readable(data)
    async for seen in _again(process, data, still):
        yield seen


def _queued(process: Process, streams: bool) -> Seen:
    if process.found.queued and streams:
        return "vmstate.queued", FAIL, "it queues, and its state does not fit what QEMU carries"
    if process.found.queued:
        return "vmstate.queued", OK, "it queues for org.qemu.VMState1"
    if streams:
        return (
            "vmstate.queued",
            OK,
            "it does not queue, because its state is streamed: plain QEMU cannot carry it",
        )
    return (
        "vmstate.queued",
        FAIL,
        "it does not queue for org.qemu.VMState1 (request the name without DO_NOT_QUEUE)",
    )


def readable(data: bytes) -> Seen:
    """Whether the blob can be looked into."""
    try:
        made = blob.unpack(data)
    except BlobError as error:
        return "blob.readable", WARN, f"opaque: {error.reason}"
    try:
        version, _ = blob.read(data, catalog.load(made.type))
    except SchemaError as error:
        return "blob.readable", WARN, error.reason
    except BlobError as error:
        return "blob.readable", FAIL, error.reason
    return "blob.readable", OK, f"{version.type} version {version.version}, every field known"


async def _again(process: Process, data: bytes, still: bool) -> AsyncIterator[Seen]:
    try:
        again = await process.save()
        yield "vmstate.runs-on", OK, "it answers after Save as before"
    except FerryError as error:
        yield "vmstate.runs-on", FAIL, error.reason
        return
    same = again == data
    # A device with Device1 is stopped later, and must save the same then; of others nobody knows whether time moves them.
    moves = OK if process.found.typed and not still else FAIL if still else WARN
    yield "vmstate.save-again", OK if same else moves, "the same" if same else _differ(data, again)
    try:
        await process.load(data)
        after = await process.save()
    except FerryError as error:
        yield "vmstate.load-own", FAIL, error.reason
        return
    verdict = OK if after == data else FAIL if same and not process.found.typed else moves
    yield "vmstate.load-own", verdict, "the same after Load" if after == data else _differ(data, after)
    async for seen in _damaged(process, data):
        yield seen


def _differ(one: bytes, other: bytes) -> str:
    if len(one) != len(other):
        return f"{len(one)} bytes, then {len(other)}"
    at = next(at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
    return f"it differs from byte {at} on; if time is part of the state, that alone may be why"


async def _damaged(process: Process, data: bytes) -> AsyncIterator[Seen]:
    taken = []
    opaque = not data.startswith(blob.MAGIC)
    for what, damaged, must in damages(data):
        before = await process.save()
        try:
            refused = await process.refuses(process.load(damaged))
            after = await process.save()
        except (DeviceGone, DeviceTimeout) as error:
            yield "vmstate.load-damaged", FAIL, f"{what}: {error.reason}"
            return
        if not refused:
            taken.append((what, must or not opaque))
            await process.load(data)
        elif after != before and not await _moves(process, after):
            yield "vmstate.load-damaged", FAIL, f"{what}: refused, and the state is another than before"
            return
    if taken:
        names = ", ".join(what for what, _ in taken)
        yield (
            "vmstate.load-damaged",
            FAIL if any(must for _, must in taken) else WARN,
            f"it was loaded: {names}",
        )
    else:
        yield "vmstate.load-damaged", OK, "all refused, and the state stayed"
    if process.refusals:
        wrong = process.bad_words()
        yield "vmstate.words", FAIL if wrong else OK, wrong or f"such as: {process.refusals[0].reason[:100]}"


async def _moves(process: Process, data: bytes) -> bool:
    """Whether its state changes by itself. One with Device1 is looked at again when it is stopped (device.checks)."""
    if process.found.typed:
        return True
    await asyncio.sleep(_MOVES)
    return await process.save() != data


def damages(data: bytes) -> Iterator[tuple[str, bytes, bool]]:
    """What is wrong, the bytes, and whether a helper must notice even without a checksum."""
    yield "nothing at all", b"", True
    yield "cut in half", data[: len(data) // 2], True
    yield "the last byte missing", data[:-1], True
    yield "more behind it", data + b"more", False
    for where, at in (
        ("at the beginning", 2),
        ("in the middle", len(data) // 2),
        ("at the end", len(data) - 1),
    ):
        if 0 <= at < len(data):
            yield f"a bit {where}", data[:at] + bytes((data[at] ^ 4,)) + data[at + 1 :], False
    yield "noise", bytes(at * 167 % 256 for at in range(min(len(data) + 9, MAX_BLOB))), True
