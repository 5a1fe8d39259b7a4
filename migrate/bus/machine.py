"""`org.vmferry.Machine1` (docs/dbus/org.vmferry.Machine1.xml): one machine, as the daemon of its host serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from migrate.bus.callers import Guard
from migrate.bus.host import HostService, MigrateOptions, options_from_bus
from migrate.bus.service import Call, Interface, Method
from migrate.bus.status import MachineStatus, job_path, properties
from migrate.errors import UsageError

INTERFACE: Final = "org.vmferry.Machine1"


def machine_interface(
    service: HostService, name: str, status: Callable[[], MachineStatus], guard: Guard
) -> Interface:
    def method(member: str, takes: str, gives: str, names: str, out: str, handler: Any) -> Method:
        async def serve(call: Call, *args: Any) -> Any:
            await guard(call)
            return await handler(*args)

        return Method(member, takes, gives, names.split(), out.split(), serve)

    async def migrate(to: str, given: Mapping[str, Any], check_only: bool = False) -> str:
        options = options_from_bus(MigrateOptions, given)
        return job_path(
            await service.migrate(name, to, replace(options, check_only=options.check_only or check_only))
        )

    async def check(to: str, given: Mapping[str, Any]) -> str:
        return await migrate(to, given, check_only=True)

    async def recover(given: Mapping[str, Any]) -> str:
        if given:
            raise UsageError("Recover knows no options yet", remedy="give an empty a{sv}")
        return job_path(await service.recover(name))

    return Interface(
        INTERFACE,
        methods=[
            method("Pause", "", "", "", "", lambda: service.pause_machine(name)),
            method("Resume", "", "", "", "", lambda: service.resume_machine(name)),
            method("Stop", "b", "", "force", "", lambda force: service.stop_machine(name, force)),
            method("Check", "sa{sv}", "o", "to options", "job", check),
            method("Migrate", "sa{sv}", "o", "to options", "job", migrate),
            method("Resolve", "s", "s", "keep", "state", lambda keep: service.resolve(name, keep)),
            method("Recover", "a{sv}", "o", "options", "job", recover),
        ],
        properties=properties(MachineStatus, status),
    )
