"""The supervisor as the bus sees it: texts and descriptors in, texts and descriptors out. Nothing is decided here."""

from __future__ import annotations

import json
import os

from migrate.errors import UsageError
from migrate.machine.supervisor import Supervisor


class SupervisorFace:
    """What migrate.bus.supervisor.supervisor_interface serves."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._it = supervisor

    def state(self) -> str:
        return str(self._it.state)

    async def describe(self) -> str:
        return json.dumps(description(self._it))

    async def region(self, index: int) -> tuple[int, int, int, int]:
        """:returns: gpa, size, a descriptor that the caller of this method closes, offset."""
        regions = self._it.memory.regions
        if index >= len(regions):
            raise UsageError(f"there is no region {index}", remedy=f"the machine has {len(regions)}")
        region = regions[index]
        return region.gpa, region.size, os.dup(region.fd), region.offset

    async def pause(self) -> None:
        await self._it.pause()

    async def run(self) -> None:
        await self._it.run()

    async def quit(self, force: bool) -> None:
        await self._it.quit(force=force)

    async def begin_outgoing(self, sender: str, job: str, peer: str) -> int:
        return await self._it.begin_outgoing(job, peer, sender)

    async def peer_is(self, job: str, incarnation: str) -> None:
        await self._it.peer_is(job, incarnation)

    async def quiesce(self, job: str) -> str:
        return json.dumps(await self._it.quiesce(job))

    async def abort_outgoing(self, job: str, reasons: str) -> None:
        await self._it.abort_outgoing(job, reasons)

    async def commit(self, job: str, epoch: int) -> int:
        return await self._it.commit(job, epoch)

    async def peer_said(self, job: str, epoch: int, answer: str, reasons: str) -> None:
        await self._it.peer_said(job, epoch, answer, reasons)

    async def begin_incoming(self, sender: str, job: str, epoch: int, peer: str) -> None:
        await self._it.begin_incoming(job, epoch, peer, sender)

    async def ready(self, job: str) -> None:
        await self._it.ready(job)

    async def commit_incoming(self, job: str, epoch: int, stopped_ns: int, paused: bool) -> str:
        return json.dumps(await self._it.commit_incoming(job, epoch, stopped_ns, paused=paused))

    async def abort_incoming(self, job: str, reasons: str) -> None:
        await self._it.abort_incoming(job, reasons)

    async def ask(self, job: str, epoch: int) -> str:
        return await self._it.ask(job, epoch)

    async def resolve(self, keep: str) -> str:
        return await self._it.resolve(keep)


def description(it: Supervisor) -> dict[str, object]:
    """What a coordinator or a daemon wants to know of a machine."""
    return {
        "name": it.machine.name,
        "state": str(it.state),
        "detail": it.detail,
        "regions": [{"gpa": region.gpa, "size": region.size} for region in it.machine.regions],
        "mapped": bool(it.memory.regions),
        "qemu": it.machine.qemu.state if it.machine.qemu is not None else None,
        "devices": [
            {
                "id": p.config.id,
                "type": p.config.type,
                "protocol": p.config.protocol,
                "pid": p.child.pid,
                "bus_name": p.client.unique_name,
                "gpa": p.config.gpa,
                "irq": p.config.irq,
                "vectors": p.config.vectors,
                "images": {key: p.config.local[key] for key in ("image",) if key in p.config.local},
                "options": dict(p.config.options),
                "tracker": p.config.tracker,
                "version": p.info.version,
            }
            for p in it.roster.participants.values()
        ],
        "job": it.job.name if it.job else "",
        "epoch": it.job.epoch if it.job else 0,
        "peer": it.job.peer if it.job else "",
        "next_epoch": it.ledger.next_epoch(),
        "stopped_ns": it.stopped_ns(),
        "sync_ns": it.ledger.sync_cost_ns(),
    }
