"""Does every field of a state survive a load? Each is given another value, one after the other, and must be saved again.

A device may refuse a state that it cannot be in; then another value is tried, and a field for which none is taken is counted as
not tried. It stands still all the while, so that time moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from migrate.bus import DeviceInfo
from migrate.errors import DeviceGone, DeviceTimeout, FerryError, SchemaError
from migrate.state import SchemaVersion, blob, catalog
from migrate.state.compare import differences
from migrate.state.kinds import Bool, Bytes, Enum, Int, Kind, List, Str
from migrate.state.lifecycle import DeviceState
from migrate.testing.conformance.process import Process
from migrate.testing.conformance.vmstate import FAIL, OK, WARN, Seen


async def survive(process: Process, info: DeviceInfo, good: bytes) -> Seen:
    """:param good: a blob of its own, by its newest version; it is loaded again at the end."""
    try:
        schema = catalog.load(info.type)
        version, values = blob.read(good, schema)
    except (SchemaError, FerryError) as error:
        return "device.fields", WARN, f"not tried: {error.reason}"
    tried: list[str] = []
    refused: list[str] = []
    done: list[str] = []  # flags of something that waits may be carried out by the load itself
    try:
        for field in version.fields:
            if field.optional:
                continue
            verdict = await _field(process, info, version, values, field.name, field.kind)
            if isinstance(verdict, str):
                await _load(process, good)
                return "device.fields", FAIL, verdict
            (done if verdict is None else tried if verdict else refused).append(field.name)
        await _load(process, good)
    except FerryError as error:
        return "device.fields", FAIL, error.reason
    text = f"{len(tried)} fields came back as they were loaded"
    if refused:
        text += f"; not tried, for it takes no other value now: {', '.join(refused)}"
    if done:
        text += f"; loaded as true and saved as false, is it carried out at once?: {', '.join(done)}"
    return "device.fields", OK if tried and not done else WARN, text


async def _field(
    process: Process,
    info: DeviceInfo,
    version: SchemaVersion,
    values: dict[str, object],
    name: str,
    kind: Kind,
) -> bool | str | None:
    """True: it survives. False: no other value is taken. None: it was carried out at once. Text: what went wrong."""
    for other in others(kind, values[name]):
        wanted = deepcopy(values) | {name: other}
        try:
            await _load(process, blob.write(version, info.id, wanted))
        except (DeviceGone, DeviceTimeout):
            raise
        except FerryError:
            await process.client.set_state(DeviceState.STOP, timeout=process.timeout)
            continue
        _, found = blob.read(
            await process.client.save_as(version.version, timeout=process.timeout), catalog.load(info.type)
        )
        for difference in differences(wanted, found):
            path = difference.path.split("[")[0].split(".")[1]
            field = next(entry for entry in version.fields if entry.name == path)
            if difference.left is True and difference.right is False:
                return None
            if not field.optional:
                return f"{difference.path} was loaded as {_text(difference.left)} and is saved as {_text(difference.right)}"
        return True
    return False


async def _load(process: Process, data: bytes) -> None:
    """In STOP, by VMState1: it judges before it takes anything over, and stays where it is."""
    await process.load(data)


def others(kind: Kind, value: object) -> Iterator[object]:
    """Other values that fit, the more harmless first."""
    match kind:
        case Bool():
            yield not value
        case Int():
            assert isinstance(value, int)
            near = (value ^ 1, value + 1, value - 1, kind.low, kind.high, (kind.low + kind.high) // 2)
            yield from (number for number in near if kind.low <= number <= kind.high and number != value)
        case Enum():
            yield from (word for word in kind.values if word != value)
        case Bytes():
            assert isinstance(value, bytes)
            if value:
                yield bytes((value[0] ^ 1,)) + value[1:]
            if len(value) < kind.high:
                yield value + b"\x41"
        case Str():
            assert isinstance(value, str)
            if value:
                yield ("x" if value[0] != "x" else "y") + value[1:]
            elif kind.high:
                yield "x"
        case List() if isinstance(value, list) and value:
            for other in others(kind.item, value[0]):
                yield [other, *value[1:]]


def _text(value: object) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) and len(value) > 8 else repr(value)[:60]
