"""QEMU's side of a migration, as its coordinator sees it: capabilities, the way out and in, how far it is, limits, cancel.

Goes through org.vmferry.Qemu1, because the monitor itself belongs to the participant that stops and resumes the guest. QEMU's own
words are carried into our errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from migrate.bus.qemu import QemuClient
from migrate.errors import DeviceRefused, DeviceTimeout, Phase
from migrate.qemu.facts import NEEDED, WANTED, Facts

#: No limit of bandwidth, in bytes/s: QEMU has no word for it, and its own default is 128 MiB/s.
UNLIMITED: Final = 1 << 50
#: The longest downtime limit that QEMU takes, ms.
MAX_DOWNTIME_MS: Final = 2_000_000
#: Events tell at once; where one was missed this finds out, s.
POLL_SECONDS: Final = 0.05
#: QEMU's statuses (qapi/migration.json, MigrationStatus) after which a migration has ended.
ENDED: Final = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class Progress:
    """What query-migrate says; sizes in bytes, rates in bytes/s, times in ms."""

    status: str
    transferred: int
    remaining: int
    passes: int
    dirty_rate: float
    rate: float
    error: str

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Progress:
        ram = raw.get("ram", {})
        return cls(
            str(raw.get("status", "none")),
            int(ram.get("transferred", 0)),
            int(ram.get("remaining", 0)),
            int(ram.get("dirty-sync-count", 0)),
            float(ram.get("dirty-pages-rate", 0)) * int(ram.get("page-size", 4096)),
            float(ram.get("mbps", 0)) * 1e6 / 8,
            str(raw.get("error-desc", "")),
        )


class Qemu:
    """One migration of one QEMU. `watch` first, `close` last."""

    def __init__(self, client: QemuClient) -> None:
        self.client = client
        self.stopped_ns = 0  #: our monotonic clock when QEMU stopped its guest; 0 while it runs
        self._changed = asyncio.Event()
        self._unwatch: Callable[[], None] | None = None

    async def watch(self) -> None:
        def event(name: str, _data: dict[str, Any], monotonic_ns: int) -> None:
            if name == "STOP":
                self.stopped_ns = monotonic_ns
            elif name == "RESUME":
                self.stopped_ns = 0
            self._changed.set()

        self._unwatch = await self.client.on_event(event)

    def close(self) -> None:
        if self._unwatch is not None:
            self._unwatch()

    async def facts(self) -> Facts:
        return Facts.from_qemu(await self.client.facts())

    async def _prepare(self, facts: Facts, multifd: int) -> None:
        """The same on both sides, before `migrate` and `migrate-incoming`; read back, for QEMU may take one and not set it.

        :raise DeviceRefused: with QEMU's own words.
        """
        wanted = dict.fromkeys(NEEDED, True) | {"multifd": multifd > 0}
        wanted |= {name: True for name in WANTED if name in facts.capabilities}
        settings = [{"capability": name, "state": state} for name, state in wanted.items()]
        await self.client.execute("migrate-set-capabilities", {"capabilities": settings})
        if multifd:
            await self.client.execute("migrate-set-parameters", {"multifd-channels": multifd})
        now = {
            item["capability"]: item["state"]
            for item in await self.client.execute("query-migrate-capabilities")
        }
        if wrong := [name for name, state in wanted.items() if now.get(name) is not state]:
            raise DeviceRefused(
                f"QEMU did not set {', '.join(wrong)}", device=self.client.device, phase=Phase.PRECOPY
            )

    async def incoming(self, facts: Facts, path: Path, multifd: int) -> None:
        """Listen at `path`. :param multifd: connections beside the main one; 0: it is not used."""
        await self._prepare(facts, multifd)
        await self.client.execute("migrate-incoming", {"uri": f"unix:{path}"})

    async def outgoing(
        self, facts: Facts, path: Path, multifd: int, downtime_ms: float, bandwidth: float
    ) -> None:
        """Migrate to `path`. Limits as `limit`."""
        await self._prepare(facts, multifd)
        await self.limit(downtime_ms=downtime_ms, bandwidth=bandwidth)
        await self.client.execute("migrate", {"uri": f"unix:{path}"})

    async def limit(self, *, downtime_ms: float, bandwidth: float) -> None:
        """:param downtime_ms: what QEMU may take for itself. :param bandwidth: bytes/s; 0: no limit."""
        await self.client.execute(
            "migrate-set-parameters",
            {
                "downtime-limit": max(0, min(int(downtime_ms), MAX_DOWNTIME_MS)),
                "max-bandwidth": int(bandwidth) or UNLIMITED,
            },
        )

    async def progress(self, *, phase: Phase = Phase.PRECOPY) -> Progress:
        return Progress.read(await self.client.execute("query-migrate", phase=phase))

    async def proceed(self) -> None:
        """From pre-switchover on: the last pages and QEMU's own devices."""
        await self.client.execute("migrate-continue", {"state": "pre-switchover"}, phase=Phase.SAVE)

    async def changed(self) -> None:
        """Until QEMU has said something, or it is time to ask again."""
        try:
            await asyncio.wait_for(self._changed.wait(), POLL_SECONDS)
        except TimeoutError:
            pass  # then ask
        self._changed.clear()

    async def until(self, statuses: Collection[str], *, seconds: float, phase: Phase) -> Progress:
        """Wait for one of these statuses.

        :raise DeviceRefused: it failed or was cancelled: with QEMU's own words. :raise DeviceTimeout: it takes too long.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            now = await self.progress(phase=phase)
            if now.status in statuses:
                return now
            if now.status in ENDED:
                raise self.failed(now, phase)
            if asyncio.get_running_loop().time() > deadline:
                raise DeviceTimeout(
                    f"QEMU's migration is {now.status} after {seconds:g} s, not {' or '.join(sorted(statuses))}",
                    device=self.client.device,
                    phase=phase,
                    remedy="see QEMU's log on both hosts",
                )
            await self.changed()

    def failed(self, now: Progress, phase: Phase) -> DeviceRefused:
        """QEMU gives few reasons (none at all for some); what the destination says comes beside it."""
        return DeviceRefused(
            f"QEMU's own migration {now.status}: {now.error or 'it gives no reason'}",
            device=self.client.device,
            phase=phase,
            remedy="see QEMU's log on both hosts",
        )

    async def check_committable(self) -> None:
        """QEMU resumes by itself on a late failure, so COMMIT needs both: its migration completed, its guest given away.

        :raise DeviceRefused: otherwise.
        """
        now = await self.progress(phase=Phase.COMMIT)
        state = (await self.client.execute("query-status", phase=Phase.COMMIT))["status"]
        if now.status != "completed" or state != "postmigrate":
            raise DeviceRefused(
                f"QEMU says {now.status} and {state}, not completed and postmigrate",
                device=self.client.device,
                phase=Phase.COMMIT,
                remedy="the machine goes on here; see QEMU's log",
            )
