"""What a machine does to its devices: the kit's own runtime, without a process or a bus around it.

Property tests call a device's hooks themselves: no timers run then, and every run of a test is the same.
"""

from __future__ import annotations

import os
import select
from weakref import WeakKeyDictionary

from devices.kit import Device
from devices.kit.runtime import Runtime
from migrate.state import catalog

_runtimes: WeakKeyDictionary[Device, Runtime] = WeakKeyDictionary()


def runtime(device: Device, max_version: int | None = None) -> Runtime:
    """The one that runs this device; made in STOP when it is first asked for."""
    if device not in _runtimes:
        _runtimes[device] = Runtime(
            device, tracker="log" if device.writes_memory else None, max_version=max_version
        )
    return _runtimes[device]


def go(device: Device, state: str, stopped_ns: int = 0) -> None:
    runtime(device).set_state(state, {"stopped_ns": stopped_ns})


def run(device: Device, stopped_ns: int = 0) -> None:
    go(device, "RUNNING", stopped_ns)


def rest(device: Device) -> None:
    go(device, "STOP")


def payload_of(device: Device) -> bytes:
    """The canonical bytes of what it saves: also proof that it keeps to its schema."""
    schema = catalog.load(device.type)
    return schema.at(schema.version).encode(device.save())


def carry(payload: bytes, destination: Device) -> None:
    schema = catalog.load(destination.type)
    state = schema.at(schema.version).decode(payload)
    destination.check(state)
    destination.load(state)


def live_timers(device: Device) -> int:
    """How many wake its process up."""
    with device.lock:
        return sum(not timer.cancelled for timer in device._timers._timers)


class Edges:
    """The VMM's end of an interrupt: a real eventfd, and how often it was signalled."""

    def __init__(self, device: Device) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        device.irq().connect(os.dup(self._fd))

    def take(self) -> int:
        """Edges since the last call."""
        try:
            return os.eventfd_read(self._fd)
        except BlockingIOError:
            return 0

    def wait(self, seconds: float = 10.0) -> bool:
        """Until there is one; False if none came."""
        return bool(select.select([self._fd], [], [], seconds)[0])

    def close(self) -> None:
        os.close(self._fd)
