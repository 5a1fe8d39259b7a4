"""Objects that come, change and go, on every bus that their process is on: ObjectManager and PropertiesChanged, as the D-Bus
specification has them.

Each object has one interface of ours. What changes often is told at most so often, the last change always.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

from migrate.bus import library
from migrate.bus.callers import Guard, only_owners
from migrate.bus.connection import Bus
from migrate.bus.service import Call, Interface, Method, Signal
from migrate.errors import BusError

LOG = logging.getLogger(__name__)

MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
#: Least time between two PropertiesChanged of one object, s.
PERIOD: Final = 0.1

#: Makes an object's interface for the callers of one bus.
Build = Callable[[Guard], Interface]


async def _nobody(_call: Call) -> None:
    raise AssertionError("only asked for its properties")


@dataclass(slots=True, eq=False)
class _Object:
    build: Build
    interface: Interface  #: for its properties, whoever asks
    told: dict[str, Any] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    pause_until: float = 0.0

    def values(self) -> dict[str, Any]:
        return {
            item.name: library.variant(item.signature, item.getter()) for item in self.interface.properties
        }


class Objects:
    """All objects of this process below `root`."""

    def __init__(self, root: str, owners: Collection[int] | None = None) -> None:
        """:param owners: the user ids that may change things; callers.py has the default."""
        self.root = root
        self._owners = owners
        self._objects: dict[str, _Object] = {}
        self._buses: dict[Bus, Guard] = {}

    # -- buses -----------------------------------------------------------------------------------------------------------

    def attach(self, bus: Bus) -> None:
        """Offer everything there too, until the connection ends. Call it before requesting the name that others find us by."""
        self._buses = {known: guard for known, guard in self._buses.items() if not known.closed.is_set()}
        guard = self._buses[bus] = only_owners(bus, self._owners)
        bus.export(self.root, self._manager())
        for path, found in self._objects.items():
            bus.export(path, found.build(guard))

    def _manager(self) -> Interface:
        async def managed(_call: Call) -> dict[str, Any]:
            return {path: {found.interface.name: found.values()} for path, found in self._objects.items()}

        return Interface(
            MANAGER,
            methods=[Method("GetManagedObjects", "", "a{oa{sa{sv}}}", (), ("objects",), managed)],
            signals=[
                Signal("InterfacesAdded", "oa{sa{sv}}", ("object", "interfaces")),
                Signal("InterfacesRemoved", "oas", ("object", "interfaces")),
            ],
        )

    # -- objects ---------------------------------------------------------------------------------------------------------

    def __contains__(self, path: str) -> bool:
        return path in self._objects

    def add(self, path: str, build: Build) -> None:
        found = self._objects[path] = _Object(build, build(_nobody))
        for bus, guard in self._buses.items():
            bus.export(path, build(guard))
        found.told = found.values()
        body = [path, {found.interface.name: found.told}]
        self._emit(self.root, MANAGER, "InterfacesAdded", "oa{sa{sv}}", body)

    def remove(self, path: str) -> None:
        """Nothing where it is not there."""
        found = self._objects.pop(path, None)
        if found is None:
            return
        if found.timer is not None:
            found.timer.cancel()
        for bus in self._buses:
            bus.unexport(path)
        self._emit(self.root, MANAGER, "InterfacesRemoved", "oas", [path, [found.interface.name]])

    def changed(self, path: str, *, now: bool = False) -> None:
        """Tell what differs from what was told; at once, or when PERIOD has passed since the last time."""
        found = self._objects[path]
        loop = asyncio.get_running_loop()
        if not now and loop.time() < found.pause_until:
            if found.timer is None:
                found.timer = loop.call_at(found.pause_until, self.changed, path)
            return
        if found.timer is not None:
            found.timer.cancel()
            found.timer = None
        values = found.values()
        news = {name: value for name, value in values.items() if value != found.told.get(name)}
        if news:
            found.told, found.pause_until = values, loop.time() + PERIOD
            self._emit(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [found.interface.name, news, []])

    def emit(self, path: str, signal: str, *body: Any) -> None:
        """A signal of an object's own interface."""
        interface = self._objects[path].interface
        signature = next(item.signature for item in interface.signals if item.name == signal)
        self._emit(path, interface.name, signal, signature, list(body))

    def _emit(self, path: str, interface: str, signal: str, signature: str, body: list[Any]) -> None:
        for bus in self._buses:
            if not bus.closed.is_set():
                try:
                    bus.emit(path, interface, signal, signature, body)
                except BusError as error:
                    LOG.info("event=not-emitted signal=%s error=%s", signal, error)
