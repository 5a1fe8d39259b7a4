"""`org.vmferry.Job1` (docs/dbus/org.vmferry.Job1.xml): one job, as the daemon of its host serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from migrate.bus.callers import Guard
from migrate.bus.host import HostService, Limits, options_from_bus
from migrate.bus.service import Call, Interface, Method, Signal
from migrate.bus.status import JobStatus, properties

INTERFACE: Final = "org.vmferry.Job1"


def job_interface(service: HostService, job: str, status: Callable[[], JobStatus], guard: Guard) -> Interface:
    def method(member: str, takes: str, names: str, handler: Any) -> Method:
        async def serve(call: Call, *args: Any) -> Any:
            await guard(call)
            return await handler(*args)

        return Method(member, takes, "", names.split(), (), serve)

    async def set_limits(given: Mapping[str, Any]) -> None:
        await service.set_limits(job, options_from_bus(Limits, given))

    return Interface(
        INTERFACE,
        methods=[
            method("Cancel", "", "", lambda: service.cancel(job)),
            method("SetLimits", "a{sv}", "limits", set_limits),
            method("Continue", "", "", lambda: service.proceed(job)),
        ],
        properties=properties(JobStatus, status),
        signals=[Signal("Ended", "saa{ss}", ["outcome", "reasons"])],
    )
