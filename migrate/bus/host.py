"""`org.vmferry.Host1` (docs/dbus/org.vmferry.Host1.xml): what the daemon of a host serves, and its typed client."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote

from migrate.bus import library
from migrate.bus.callers import Guard
from migrate.bus.connection import Bus
from migrate.bus.service import Call, Interface, Method, Property, Signal
from migrate.errors import BusError, UsageError

INTERFACE: Final = "org.vmferry.Host1"
NAME: Final = "org.vmferry.Host"
PATH: Final = "/org/vmferry/Host1"

#: Seconds a call may take. The slow ones start or end a machine: every participant of it in turn, and a patience for each.
QUICK, SLOW = 10.0, 120.0


#: An integer that four bytes may not hold.
_WIDE: Final = {"signature": "t"}


@dataclass(frozen=True, slots=True)
class MigrateOptions:
    """What the caller of Migrate and Check may say; on the bus an `a{sv}` of what differs from the defaults."""

    connections: int = 1  #: page channels; 0: pages go in line on the control channel
    downtime_ms: int = 300  #: how long the guest may stand still
    verify: bool = False  #: compare all memory and states while both sides are stopped; costs downtime
    check_only: bool = False  #: the preflight and nothing more
    keep: str = ""  #: a directory that blobs are left in; "": none
    hold: str = ""  #: points to wait at, separated by commas; for tests
    doubt_seconds: int = 30  #: how long to ask a silent peer before the job ends *in doubt*
    bandwidth: int = field(default=0, metadata=_WIDE)  #: bytes/s that pages may take; 0: no limit
    timeout_seconds: int = 0  #: how long pre-copy may go on; 0: as long as it brings the remainder down
    on_stall: str = "abort"  #: or "extend-downtime", "wait": what to do when it no longer does


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the caller of RunMachine may say."""

    fresh: bool = False  #: start it although the ledger says that it was moved away


@dataclass(frozen=True, slots=True)
class Limits:
    """What SetLimits changes while a migration goes on; -1: as it is."""

    downtime_ms: int = -1  #: how long the guest may stand still
    bandwidth: int = field(default=-1, metadata=_WIDE)  #: bytes/s that pages may take; 0: no limit


Options = TypeVar("Options", MigrateOptions, RunOptions, Limits)
_SIGNATURES: Final = {int: "u", bool: "b", str: "s"}


def _signature(item: Field[Any]) -> str:
    return str(item.metadata.get("signature") or _SIGNATURES[type(item.default)])


def options_to_bus(options: MigrateOptions | RunOptions | Limits) -> dict[str, Any]:
    """The `a{sv}` of what is not a default."""
    return {
        item.name: library.variant(_signature(item), getattr(options, item.name))
        for item in fields(options)
        if getattr(options, item.name) != item.default
    }


def options_from_bus(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """:raises UsageError: for an option that is not known (naming the nearest) or of another type."""
    known = {item.name: item for item in fields(kind)}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"there is no option {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""),
                remedy=f"known options: {', '.join(known)}",
            )
        if type(value) is not type(known[name].default):
            raise UsageError(
                f"the option {name} is {value!r}",
                remedy=f"its D-Bus type is {_signature(known[name])!r}",
            )
    return kind(**given)


class HostService(Protocol):
    """What is behind the interface; every error is a FerryError."""

    def name(self) -> str: ...
    def incarnation(self) -> str: ...
    def listen(self) -> list[str]: ...
    async def run_machine(self, path: str, options: RunOptions) -> str: ...
    async def list_machines(self) -> list[dict[str, Any]]: ...
    async def stop_machine(self, name: str, force: bool) -> None: ...
    async def pause_machine(self, name: str) -> None: ...
    async def resume_machine(self, name: str) -> None: ...
    async def migrate(self, name: str, to: str, options: MigrateOptions) -> str: ...
    async def recover(self, name: str) -> str: ...
    async def resolve(self, name: str, keep: str) -> str: ...
    async def cancel(self, name: str) -> None: ...
    async def proceed(self, name: str) -> None: ...
    async def set_limits(self, name: str, limits: Limits) -> None: ...
    async def job_events(self, job: str) -> list[str]: ...


def host_interface(service: HostService, guard: Guard) -> Interface:
    def method(
        name: str, takes: str, gives: str, names: str, out: str, handler: Any, looks: bool = False
    ) -> Method:
        async def serve(call: Call, *args: Any) -> Any:
            if not looks:
                await guard(call)
            return await handler(*args)

        return Method(name, takes, gives, names.split(), out.split(), serve)

    s = service

    async def run_machine(path: str, options: Mapping[str, Any]) -> str:
        return await s.run_machine(path, options_from_bus(RunOptions, options))

    async def list_machines() -> str:
        return json.dumps(await s.list_machines())

    async def migrate(name: str, to: str, options: Mapping[str, Any]) -> str:
        return await s.migrate(name, to, options_from_bus(MigrateOptions, options))

    async def set_limits(name: str, limits: Mapping[str, Any]) -> None:
        await s.set_limits(name, options_from_bus(Limits, limits))

    async def recover(name: str, options: Mapping[str, Any]) -> str:
        if options:
            raise UsageError("Recover knows no options yet", remedy="give an empty a{sv}")
        return await s.recover(name)

    return Interface(
        INTERFACE,
        methods=[
            method("RunMachine", "sa{sv}", "s", "path options", "machine", run_machine),
            method("ListMachines", "", "s", "", "machines", list_machines, looks=True),
            method("StopMachine", "sb", "", "name force", "", s.stop_machine),
            method("PauseMachine", "s", "", "name", "", s.pause_machine),
            method("ResumeMachine", "s", "", "name", "", s.resume_machine),
            method("Migrate", "ssa{sv}", "s", "name to options", "job", migrate),
            method("Recover", "sa{sv}", "s", "name options", "job", recover),
            method("Resolve", "ss", "s", "name keep", "state", s.resolve),
            method("Cancel", "s", "", "name", "", s.cancel),
            method("Continue", "s", "", "name", "", s.proceed),
            method("SetLimits", "sa{sv}", "", "name limits", "", set_limits),
            method("JobEvents", "s", "as", "job", "lines", s.job_events, looks=True),
        ],
        properties=[
            Property("Name", "s", s.name),
            Property("Incarnation", "s", s.incarnation),
            Property("Listen", "as", s.listen),
        ],
        signals=[
            Signal("JobEvent", "sus", ["job", "number", "event"]),
            Signal("MachineChanged", "sss", ["name", "state", "detail"]),
        ],
    )


class HostClient:
    """A host's daemon, over its bus. Errors are those that the daemon raised; BusError or DeviceGone where it is gone."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._followers: set[asyncio.Queue[Any]] = set()  #: None in one: there will be no more
        bus.on_disconnect(self._tell_followers)

    @classmethod
    async def connect(cls, where: Path | str) -> HostClient:
        """Connect to the daemon of a host's directory (a path, absolute), or to the one on a bus (its address, as text).

        :raises BusError: if none runs there.
        """
        if isinstance(where, str):
            bus = await Bus.connect(where)
            if not await bus.queued_owners(NAME):
                await bus.close()
                raise BusError(f"no `ferry host` is on the bus {where}", remedy="start it with this --bus")
            return cls(bus)
        try:
            return cls(await Bus.connect("unix:path=" + quote(str(where / "bus"), safe="/-_.")))
        except BusError:
            raise BusError(
                f"no `ferry host` runs in {where}",
                remedy="start it, or name its directory by --dir or FERRY_DIR",
            ) from None

    async def close(self) -> None:
        """End the connection. Whoever follows a job by it is told."""
        await self._bus.close()
        self._tell_followers()

    def _tell_followers(self) -> None:
        for queue in self._followers:
            queue.put_nowait(None)

    async def _call(
        self, member: str, signature: str = "", *body: Any, gives: str = "", timeout: float = QUICK
    ) -> Any:
        answer = await self._bus.call(
            NAME, PATH, INTERFACE, member, signature, body, timeout=timeout, reply_signature=gives
        )
        return answer[0] if answer else None

    async def properties(self) -> dict[str, Any]:
        """Name, Incarnation and Listen."""
        [found] = await self._bus.call(
            NAME, PATH, "org.freedesktop.DBus.Properties", "GetAll", "s", [INTERFACE], timeout=QUICK
        )
        return dict(found)

    async def run_machine(self, path: str, options: RunOptions | None = None) -> str:
        """:returns: the machine's name, once it runs."""
        given = options_to_bus(options or RunOptions())
        return str(await self._call("RunMachine", "sa{sv}", path, given, gives="s", timeout=SLOW))

    async def list_machines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(await self._call("ListMachines", gives="s"))
        return found

    async def stop_machine(self, name: str, *, force: bool) -> None:
        await self._call("StopMachine", "sb", name, force, timeout=SLOW)

    async def pause_machine(self, name: str) -> None:
        await self._call("PauseMachine", "s", name, timeout=SLOW)

    async def resume_machine(self, name: str) -> None:
        await self._call("ResumeMachine", "s", name, timeout=SLOW)

    async def migrate(self, name: str, to: str, options: MigrateOptions) -> str:
        """:returns: the job, for `follow`."""
        return str(await self._call("Migrate", "ssa{sv}", name, to, options_to_bus(options), gives="s"))

    async def recover(self, name: str) -> str:
        return str(await self._call("Recover", "sa{sv}", name, {}, gives="s"))

    async def resolve(self, name: str, keep: str) -> str:
        """:returns: the machine's state afterwards."""
        return str(await self._call("Resolve", "ss", name, keep, gives="s", timeout=SLOW))

    async def cancel(self, name: str) -> None:
        await self._call("Cancel", "s", name)

    async def proceed(self, name: str) -> None:
        await self._call("Continue", "s", name)

    async def set_limits(self, name: str, limits: Limits) -> None:
        await self._call("SetLimits", "sa{sv}", name, options_to_bus(limits))

    async def job_events(self, job: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in await self._call("JobEvents", "s", job, gives="as")]

    async def follow(self, job: str) -> AsyncGenerator[dict[str, Any], None]:
        """Every event of a job from its first to its outcome, whether they have happened yet or not.

        :raises BusError: if the daemon goes, or this client is closed, before the outcome is known.
        """
        queue: asyncio.Queue[tuple[int, dict[str, Any]] | None] = asyncio.Queue()

        def heard(_sender: str, _path: str, body: list[Any]) -> None:
            if body[0] == job:
                queue.put_nowait((body[1], json.loads(body[2])))

        stop = await self._bus.on_signal(INTERFACE, "JobEvent", heard)
        self._followers.add(queue)
        if self._bus.closed.is_set():
            queue.put_nowait(None)
        try:
            past = await self.job_events(job)
            for event in past:
                yield event
                if event.get("event") == "outcome":
                    return
            while (item := await queue.get()) is not None:
                number, event = item
                if number >= len(past):
                    yield event
                    if event.get("event") == "outcome":
                        return
        finally:
            stop()
            self._followers.discard(queue)
        raise BusError(
            "the daemon of this host ended while the job went on; what became of it is not known from here",
            remedy="start `ferry host` again and look at `ferry list`",
        )

    async def on_machine_changed(self, callback: Any) -> Any:
        """Have `callback(name, state, detail)` called at every change of a machine; answers with what stops it."""
        return await self._bus.on_signal(INTERFACE, "MachineChanged", lambda _s, _p, body: callback(*body))
