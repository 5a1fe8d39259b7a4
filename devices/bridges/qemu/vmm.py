"""QEMU as a participant: what stopping, resuming, loading and giving up are for a guest whose VMM is QEMU.

    here                     there
    RUNNING_P2P entered      the guest is stopped: by `stop`; while QEMU is migrated, by QEMU itself at pre-switchover
    RUNNING entered          a migration that goes on is cancelled; then `cont`, which must have started every ring
    RESUMING                 `-incoming defer -S`; it becomes STOP when QEMU has loaded all of its own stream
    ReleaseLocks             allowed only where QEMU says `completed` and `postmigrate`: else it may yet resume by itself

So the supervisor stops and resumes a machine of QEMU's as any other, and knows nothing of QEMU.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Final

from devices.bridges.qemu import command, facts
from devices.bridges.qemu.command import Platform
from devices.bridges.qemu.monitor import Monitor
from devices.bridges.qemu.process import Process
from devices.kit import Participant
from migrate.bus import Bus
from migrate.bus.qemu import INTERFACE, PATH, qemu_interface
from migrate.errors import BusError, DeviceGone, DeviceRefused, DeviceTimeout, Phase
from migrate.memory.region import Region
from migrate.state.lifecycle import DeviceState

log = logging.getLogger(__name__)

#: What a coordinator may ask for; what stops or resumes a guest is not among it.
ALLOWED: Final = frozenset(
    {
        "migrate", "migrate-incoming", "migrate-continue", "migrate_cancel", "migrate-set-capabilities",
        "migrate-set-parameters", "query-migrate", "query-migrate-capabilities", "query-migrate-parameters",
        "query-status", "query-version", "query-block", "query-pci", "qom-get", "qom-list", "qom-set",
    }
)  # fmt: skip
#: Migration statuses in which QEMU is doing something, and those after which the guest is stopped here for good or for now.
GOING_ON: Final = frozenset(
    {"setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug", "postcopy-active"}
)
#: Seconds for each step; SetState's own deadline is 5.
STOP_SECONDS: Final = 4.0
CANCEL_SECONDS: Final = 4.0
LOAD_SECONDS: Final = 4.0
#: For a device's process to take QEMU's connection.
_CONNECT_SECONDS: Final = 2.0
_POLL: Final = 0.002


class QemuVmm(Participant):
    type: ClassVar[str] = "qemu"
    #: It would carry itself.
    for_qemu: ClassVar[bool] = False

    def __init__(self, identity: str, platform: Platform, directory: Path, *, incoming: bool) -> None:
        super().__init__(identity)
        self._platform = platform
        self._directory = directory
        self._incoming = incoming
        self._monitor: Monitor | None = None
        self._process: Process | None = None
        self._migrating_out = False  # since it last ran here, QEMU was told to migrate
        self._ran = False
        self._bus: Bus | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = threading.Event()
        self._saved: dict[str, object] | None = None
        if platform.qmp:
            self._connect(Path(platform.qmp), lambda: True)
            if (state := self._runstate()) != "running" or self._migration() in GOING_ON:
                raise DeviceRefused(
                    f"the QEMU at {platform.qmp} is {state}, or is being migrated",
                    device=identity,
                    phase=Phase.SETUP,
                    remedy="adopt it while it runs",
                )

    # -- QEMU's life --------------------------------------------------------------------------------------------------------

    def memory_attached(self, region: Region) -> None:
        """The guest's memory is here: QEMU is started with it. The devices' processes listen by now."""
        if self._process is not None or self._platform.qmp:
            raise DeviceRefused(
                "the memory of a QEMU guest is one region",
                device=self.id,
                phase=Phase.SETUP,
                remedy="write memory = …",
            )
        path = self._directory / "qmp.sock"
        path.unlink(missing_ok=True)
        with ExitStack() as inherited:
            fd = os.dup(region.fd)
            inherited.callback(os.close, fd)
            proxies = {one.id: self._proxy(one, inherited) for one in self._platform.proxied}
            words = command.build(
                self._platform,
                self._directory,
                path,
                (fd, region.size),
                incoming=self._incoming,
                proxies=proxies,
            )
            fds = [fd, *proxies.values()]
            self._process = Process(self.id, words, self._directory / "qemu.log", fds, self._ended)
        self._connect(path, lambda: self._process is not None and self._process.alive)

    def _proxy(self, device: command.DeviceEntry, inherited: ExitStack) -> int:
        """A connection to a device, for QEMU to inherit: an x-pci-proxy-dev does not connect by itself."""
        connection = inherited.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(_CONNECT_SECONDS)
        try:
            connection.connect(device.socket)
            connection.settimeout(None)  # QEMU reads and writes it as one that blocks
        except OSError as error:
            raise DeviceGone(
                f"{device.id} is not there for QEMU to drive: {error.strerror or error}",
                device=self.id,
                phase=Phase.SETUP,
                remedy=f"see {self._directory / device.id}.log",
            ) from None
        return connection.fileno()

    def _connect(self, path: Path, alive: Callable[[], bool]) -> None:
        monitor = Monitor(self.id, self._event, self._lost)
        try:
            monitor.connect(str(path), alive=alive)
        except DeviceGone as error:
            raise self._gone(error) from None
        self._monitor = monitor

    def _gone(self, error: DeviceGone) -> DeviceGone:
        words = self._process.last_words() if self._process is not None else ""
        return DeviceGone(
            f"{error.reason}: {words}" if words else error.reason,
            device=self.id,
            phase=error.phase,
            remedy=f"see {self._directory / 'qemu.log'}" if self._process is not None else error.remedy,
        )

    @property
    def monitor(self) -> Monitor:
        """:raise DeviceGone: there is no QEMU yet."""
        if self._monitor is None:
            raise DeviceGone(
                "QEMU is not started yet: it waits for the machine's memory",
                device=self.id,
                phase=Phase.SETUP,
            )
        return self._monitor

    def _ended(self) -> None:
        """QEMU ended by itself: with status 0 the guest has powered off. So do we, with its last words as ours."""
        assert self._process is not None
        status, words = self._process.status, self._process.last_words()
        if self._monitor is None or self._ending.is_set():
            return  # whoever starts it, or ends it, says so
        if status == 0:
            log.info("event=powered_off id=%s", self.id)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        how = f"exited with {status}" if status is None or status >= 0 else f"was killed by signal {-status}"
        os.write(2, f"error: QEMU {how}: {words or 'it said nothing'}\n".encode())
        os._exit(1)

    def _lost(self) -> None:
        """The monitor's connection is gone. A QEMU of ours is ending, which is told by its process; an adopted one has ended."""
        if self._process is None and not self._ending.is_set():
            os.write(
                2, b"error: the adopted QEMU has closed its monitor: it ended, or another client took it\n"
            )
            os._exit(1)

    def close(self) -> None:
        self._ending.set()
        if self._monitor is not None:
            self._monitor.close()
        if self._process is not None:
            self._process.end()

    # -- on the bus -----------------------------------------------------------------------------------------------------------

    def on_bus(self, bus: Bus) -> None:
        self._bus, self._loop = bus, asyncio.get_running_loop()
        bus.export(PATH, qemu_interface(self))

    async def execute(self, command: str, arguments: dict[str, Any], seconds: float) -> Any:
        """For a coordinator. Not under the lock: it asks while the supervisor waits for QEMU to stop."""
        if command not in ALLOWED:
            raise DeviceRefused(
                f"{command} is not a coordinator's to say",
                device=self.id,
                phase=Phase.PRECOPY,
                remedy="see the XML",
            )
        if command == "migrate":
            self._migrating_out = True
        return await asyncio.to_thread(
            self.monitor.execute, command, arguments, seconds=min(seconds, 60.0), phase=Phase.PRECOPY
        )

    async def facts(self) -> dict[str, Any]:
        found = await asyncio.to_thread(facts.read, self.monitor)
        return found | {"state": self._platform.state, "adopted": not self._platform.command}

    def _event(self, name: str, data: dict[str, Any], monotonic_ns: int) -> None:
        log.info("event=qemu name=%s data=%s", name, json.dumps(data))
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._tell, name, json.dumps(data), monotonic_ns)

    def _tell(self, name: str, data: str, monotonic_ns: int) -> None:
        if self._bus is not None and not self._bus.closed.is_set():
            try:
                self._bus.emit(PATH, INTERFACE, "Event", "sst", [name, data, monotonic_ns])
            except BusError as error:
                log.debug("event=not-told error=%s", error)

    # -- coming to rest and back ----------------------------------------------------------------------------------------------

    def _migration(self) -> str:
        return str(self.monitor.execute("query-migrate").get("status", "none"))

    def _runstate(self) -> str:
        return str(self.monitor.execute("query-status")["status"])

    def enter_p2p(self) -> None:
        """The guest executes nothing when this returns."""
        if self._migration() in ("setup", "active"):
            # QEMU stops the guest by itself, when what is left fits its limit: from now on whatever is left does.
            self.monitor.execute("migrate-set-parameters", {"downtime-limit": 2_000_000})
            self._wait(
                lambda: self._migration() not in ("setup", "active"),
                STOP_SECONDS,
                "did not come to pre-switchover",
            )
        if self._runstate() == "running":
            if self._migration() == "pre-switchover":
                raise DeviceRefused("QEMU runs at pre-switchover", device=self.id, phase=Phase.STOP)
            self.monitor.execute("stop", phase=Phase.STOP)
        if self._runstate() == "running":
            raise DeviceTimeout(
                "QEMU was told to stop and runs", device=self.id, phase=Phase.STOP, remedy="see its log"
            )

    def start(self, stopped_ns: int) -> None:
        """The half of resuming that can be taken back: is there a QEMU that could run?"""
        state = self._runstate()
        if state in ("internal-error", "io-error", "guest-panicked", "shutdown", "watchdog"):
            raise DeviceRefused(
                f"QEMU says {state}: it would not run",
                device=self.id,
                phase=Phase.RESUME,
                remedy="see its log",
            )

    def leave_p2p(self) -> None:
        self._cancel()
        if self._runstate() != "running":
            self.monitor.execute("cont", phase=Phase.RESUME)
        if (state := self._runstate()) != "running":
            raise DeviceRefused(
                f"QEMU was told to run and is {state}",
                device=self.id,
                phase=Phase.RESUME,
                remedy="see its log",
            )
        self._ran, self._migrating_out = True, False
        self._see_rings()

    def _see_rings(self) -> None:
        """`cont` says nothing of back ends that would not start: such a guest runs without its disk.

        :raise DeviceRefused: naming the first.
        """
        try:
            known = {
                str(item["path"]).rsplit("/", 2)[-2]: str(item["path"])
                for item in self.monitor.execute("x-query-virtio")
                if "/peripheral/" in str(item["path"])
            }
        except DeviceRefused as error:  # not in this QEMU: the back ends' own word has to do
            log.warning("event=rings-unseen reason=%r", error.reason)
            return
        for device in self._platform.driven:
            if device.id not in known:
                continue
            status = self.monitor.execute("x-query-virtio-status", {"path": known[device.id]})
            wants = any(
                str(text).startswith("VIRTIO_CONFIG_S_DRIVER_OK") for text in status["status"]["statuses"]
            )
            if wants and status["vhost-dev"] is not None and not status.get("vhost-started", False):
                raise DeviceRefused(
                    "QEMU runs, and has not started its back end",
                    device=device.id,
                    phase=Phase.RESUME,
                    remedy="see QEMU's log",
                )

    def _cancel(self) -> None:
        """No migration goes on when this returns."""
        if self._migration() in GOING_ON:
            self.monitor.execute("migrate_cancel")
            self._wait(
                lambda: self._migration() not in GOING_ON, CANCEL_SECONDS, "did not cancel its migration"
            )

    def _wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise DeviceTimeout(
                    f"QEMU {what} within {seconds:g} s",
                    device=self.id,
                    phase=Phase.STOP,
                    remedy="see its log",
                )
            time.sleep(_POLL)

    def release_locks(self) -> None:
        """COMMIT follows, and nothing may run here after it. A migration that fails late makes QEMU resume: it must have ended."""
        if not self._migrating_out and self._incoming and not self._ran:
            return  # it is a copy that was never run
        migration, state = self._migration(), self._runstate()
        if migration != "completed" or state != "postmigrate":
            raise DeviceRefused(
                f"QEMU says {migration} and {state}, not completed and postmigrate: it might resume by itself",
                device=self.id,
                phase=Phase.COMMIT,
                remedy="the machine goes on here; see QEMU's log",
            )

    def finish(self, outcome: str) -> None:
        if outcome == "aborted":
            self._cancel()
        elif self._platform.qmp and self._migrating_out:
            # Adopted, and moved away: nobody may `cont` what runs elsewhere.
            self._ending.set()
            try:
                self.monitor.execute("quit")
            except DeviceGone:
                pass  # it was faster than its answer

    # -- state ------------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """Nothing of it changes while the guest stands still, and a QEMU that sends its last pages is slow to answer."""
        if self._saved is None or self.state not in (DeviceState.STOP, DeviceState.STOP_COPY):
            self._saved = {
                "machine": facts.machine_type(self.monitor),
                "ram": facts.ram(self.monitor),
                "cpus": facts.cpus(self.monitor),
                "devices": [device.id for device in self._platform.devices],
            }
        return self._saved

    def check(self, state: Mapping[str, Any]) -> None:
        mine = self.save()
        wrong = [
            f"{key} {state[key]!r} where this one has {mine[key]!r}"
            for key in mine
            if state[key] != mine[key]
        ]
        if wrong:
            raise DeviceRefused(
                f"the state sent is of another machine: {'; '.join(wrong)}",
                remedy="both sides need the same [qemu] command in what the guest sees",
                phase=Phase.LOAD,
                device=self.id,
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """QEMU has its own stream by now, or has failed on it."""
        self._wait(lambda: self._migration() not in GOING_ON, LOAD_SECONDS, "has not loaded its stream")
        if (migration := self._migration()) != "completed":
            words = self.monitor.execute("query-migrate").get("error-desc", "it gives no reason")
            raise DeviceRefused(
                f"QEMU's own migration is {migration} here: {words}",
                device=self.id,
                phase=Phase.LOAD,
                remedy=f"see {self._directory / 'qemu.log'}",
            )
