"""A typed asyncio client of a host's daemon: what `ferry` and other programs manage machines with.

    async with await Host.connect() as host:
        job = await (await host.machine("web1")).migrate("tls://hostb:4789", MigrateOptions(bandwidth=100 << 20))
        async for status in job.progress():
            print(status.round, status.remaining_bytes)
        print((await job.status()).outcome)

Every error is one of migrate.errors; those that the daemon raised arrive as themselves. It stands on migrate.bus alone.
"""

from migrate.bus.host import Limits, MigrateOptions, RunOptions
from migrate.bus.status import JobStatus, MachineStatus
from migrate.client.host import Event, Host, directory_address
from migrate.client.job import Job
from migrate.client.machine import Machine

__all__ = [
    "Event",
    "Host",
    "Job",
    "JobStatus",
    "Limits",
    "Machine",
    "MachineStatus",
    "MigrateOptions",
    "RunOptions",
    "directory_address",
]
