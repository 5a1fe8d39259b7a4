"""The participants of one machine: started, found on the bus, given memory, stopped and resumed in two phases.

The order is DESIGN 2.3's. Stopping: the vCPU enters its P2P state first, then every device (start nothing new, answer others);
only when all are there does any stop. Resuming mirrors it: all RUNNING_P2P, then RUNNING, the vCPU last.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from migrate.bus import Bus, DeviceClient, DeviceInfo, discover
from migrate.errors import DeviceGone, DeviceRefused, DeviceTimeout, FerryError, Phase
from migrate.machine.children import Adopted, Child
from migrate.machine.config import VCPU_ID, DeviceConfig, MachineConfig
from migrate.machine.hostconfig import HostConfig
from migrate.memory import GuestMemory
from migrate.state import DeviceState
from migrate.state.lifecycle import ACTIVE

log = logging.getLogger(__name__)

#: How long a participant may take to appear on the bus, s. Importing NumPy and Unicorn on a loaded host takes seconds.
APPEAR_SECONDS = 30.0
POLL_SECONDS = 0.02
#: How long a back end may take to do what its VMM has asked for when the machine resumes, s.
SERVED_SECONDS = 5.0
SERVED_POLL_SECONDS = 0.002


@dataclass(slots=True)
class Participant:
    config: DeviceConfig
    child: Child | Adopted
    client: DeviceClient
    info: DeviceInfo


@dataclass(slots=True)
class Times:
    """Of one quiesce or resume, ns."""

    total_ns: int = 0
    devices: dict[str, int] = field(default_factory=dict)


class Roster:
    """All participants by Id. Knows nothing of migrations or ledgers."""

    def __init__(
        self, machine: MachineConfig, host: HostConfig, on_death: Callable[[Child | Adopted], None]
    ) -> None:
        self.machine = machine
        self.host = host
        self.directory = host.machine_directory(machine.name)
        self.participants: dict[str, Participant] = {}
        self.children: dict[str, Child | Adopted] = {}
        self._on_death = on_death
        self._found = asyncio.Condition()  #: told when the participants were looked up anew

    # -- starting ------------------------------------------------------------------------------------------------------

    async def start(self, bus: Bus, address: str, memory: GuestMemory, *, incoming: bool) -> None:
        """Start every process, wait for it on the bus, attach memory. All are then in STOP, or RESUMING when incoming.

        :raises DeviceError: naming the device that did not start, and its last words.
        """
        if self.machine.qemu and self.machine.qemu.qmp:
            await self._adopt(bus, address)
            return
        mode = "--incoming" if incoming else "--paused"
        for device in self.configs():
            command = [
                *(device.command or self.host.command_of(device.type)),
                *self._arguments(device, address),
                mode,
            ]
            self.children[device.id] = await Child.start(
                device.id, command, self.directory / f"{device.id}.log", self._on_death
            )
        await self.find(bus)
        # QEMU has the memory of its guest to itself, and gives it to those that it drives.
        takers = [self.vcpu] if self.machine.qemu and self.vcpu else self.participants.values()
        for region in memory.regions:
            await self._each(
                takers,
                lambda p, r=region: p.client.attach_memory(r.gpa, r.size, r.fd, r.offset),  # type: ignore[misc]
            )

    async def _adopt(self, bus: Bus, address: str) -> None:
        """The devices are those on the bus, and they run; QEMU is shown by a process of ours, which adopts it.

        :raises DeviceError: naming the one that does not run, or says nothing.
        """
        assert self.machine.qemu is not None
        images, devices = self.machine.qemu.images, []
        for number, (name, client) in enumerate(sorted((await discover(bus)).items()), 1):
            info = await client.info()
            if not info.opaque and info.state != DeviceState.RUNNING:
                raise DeviceRefused(
                    f"it is {info.state}; what is adopted has to run", device=name, phase=Phase.SETUP,
                    remedy="start it without --paused and --incoming",
                )  # fmt: skip
            kind = name if info.opaque else info.type
            protocol = "vhost-user" if kind.startswith("vhost-user-") else "none"
            local = {"image": images[name]} if name in images else {}
            devices.append(DeviceConfig(name, kind, protocol, irq=number, local=local))
            self.children[name] = Adopted(name, info.pid, self._on_death)
        self.machine = replace(self.machine, devices=devices)
        vcpu = self.configs()[-1]
        command = [*self.host.command_of(vcpu.type), *self._arguments(vcpu, address)]
        self.children[vcpu.id] = await Child.start(
            vcpu.id, command, self.directory / f"{vcpu.id}.log", self._on_death
        )
        await self.find(bus)

    def configs(self) -> list[DeviceConfig]:
        """Every participant's configuration, the vCPU last."""
        kind, protocol = ("qemu", "qmp") if self.machine.qemu else ("vcpu", "none")
        vcpu = [DeviceConfig(VCPU_ID, kind, protocol=protocol, tracker=self.machine.vcpu_tracker)]
        return [*self.machine.devices, *(vcpu if self.machine.vcpu else [])]

    def _arguments(self, device: DeviceConfig, address: str) -> list[str]:
        words = ["--id", device.id, "--bus", address]
        if device.id == VCPU_ID:
            path = self.directory / "platform.json"
            path.write_text(json.dumps(self._qemu(address) if self.machine.qemu else self._platform()))
            words += ["--platform", str(path)]
        else:
            ours: dict[str, str] = {}
            if device.protocol == "vhost-user":
                ours = {"vhost_user": self.socket_of(device)}
                if "image" in device.local:
                    ours["lock"] = "machine"
            elif device.protocol != "none":
                words += ["--socket", self.socket_of(device)]
                words += ["--protocol", "mpqemu"] if device.protocol == "mpqemu" else []
            for key, value in [*device.options.items(), *self._local(device).items(), *ours.items()]:
                words += ["--option", f"{key}={value}"]
        if device.tracker:
            words += ["--tracker", device.tracker]
        return words

    def socket_of(self, device: DeviceConfig) -> str:
        number = next(index for index, item in enumerate(self.machine.devices) if item.id == device.id)
        return str(self.directory / f"d{number}.sock")

    def _local(self, device: DeviceConfig) -> Mapping[str, str]:
        """Back ends of this host: where nothing is named, a serial port writes into the machine's directory."""
        if device.type == "uart16550" and "output" not in device.local:
            return {**device.local, "output": str(self.directory / f"{device.id}.out")}
        return device.local

    def _platform(self) -> dict[str, object]:
        return {
            "devices": [
                {"id": d.id, "type": d.seen_as, "socket": self.socket_of(d), "gpa": d.gpa, "irq": d.irq}
                | ({"vectors": d.vectors} if d.vectors > 1 else {})
                for d in self.machine.devices
            ],
            "guest": self.machine.guest or None,
            "cmdline": self.machine.cmdline,
        }

    def _qemu(self, address: str) -> dict[str, object]:
        """As devices.bridges.qemu reads it."""
        qemu = self.machine.qemu
        assert qemu is not None
        return {
            "command": list(qemu.command),
            "qmp": qemu.qmp,
            "bus": address,
            "state": qemu.state,
            "backend": qemu.backend,
            "devices": [
                {
                    "id": d.id,
                    "type": d.type,
                    "protocol": d.protocol,
                    "socket": "" if d.protocol == "none" else self.socket_of(d),
                    "options": dict(d.options),
                }
                for d in self.machine.devices
            ],
        }

    async def find(self, bus: Bus) -> None:
        """Wait until every configured participant is on the bus.

        :raises DeviceGone: if one's process ended. :raises DeviceTimeout: naming the one that never came.
        """
        wanted = {config.id: config for config in self.configs()}
        deadline = time.monotonic() + APPEAR_SECONDS
        while True:
            for child in self.children.values():
                if not child.alive:
                    raise child.obituary(Phase.SETUP)
            found = await discover(bus)
            missing = wanted.keys() - found.keys()
            if not missing:
                break
            if time.monotonic() > deadline:
                name = sorted(missing)[0]
                raise DeviceTimeout(
                    f"it did not appear on the machine's bus within {APPEAR_SECONDS:.0f} s",
                    device=name,
                    phase=Phase.SETUP,
                    remedy=f"see {self.directory / (name + '.log')}",
                )
            await asyncio.sleep(POLL_SECONDS)
        for name, config in wanted.items():
            info = await found[name].info()
            if not info.opaque and info.type != config.type:
                raise DeviceRefused(
                    f"its process says it is a {info.type!r}, the machine wants a {config.type!r}",
                    device=name,
                    phase=Phase.SETUP,
                    remedy="mend `type` or `command` in machine.toml",
                )
            self.participants[name] = Participant(config, self.children[name], found[name], info)
        async with self._found:
            self._found.notify_all()

    # -- two-phase stop and start --------------------------------------------------------------------------------------

    @property
    def vcpu(self) -> Participant | None:
        return self.participants.get(VCPU_ID)

    def devices(self) -> list[Participant]:
        return [p for name, p in self.participants.items() if name != VCPU_ID and not p.info.opaque]

    def all(self) -> list[Participant]:
        return [p for p in self.participants.values() if not p.info.opaque]

    async def quiesce(self) -> Times:
        """Stop all; nobody stops before all have entered P2P.

        :raises DeviceError: naming the first participant that failed; the others may be anywhere between: call `resume`.
        """
        copying: set[str] = set()

        async def ask(p: Participant) -> None:
            if (await p.client.info()).state in (DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P):
                copying.add(p.config.id)

        def p2p(p: Participant) -> DeviceState:
            return DeviceState.PRE_COPY_P2P if p.config.id in copying else DeviceState.RUNNING_P2P

        def stop(p: Participant) -> DeviceState:
            return DeviceState.STOP_COPY if p.config.id in copying else DeviceState.STOP

        times = Times()
        start = time.monotonic_ns()
        await asyncio.gather(
            self._move(
                [self.vcpu] if self.vcpu is not None else [], p2p, times, Phase.STOP
            ),  # streams nothing
            self._each((p for p in self.devices() if p.info.streams), ask),
        )
        await self._move(self.devices(), p2p, times, Phase.STOP)
        await self._move(self.all(), stop, times, Phase.STOP)
        times.total_ns = time.monotonic_ns() - start
        return times

    async def prepare(self, stopped_ns: int) -> Times:
        """All into RUNNING_P2P: the half of resuming that can still be taken back."""
        times = Times()
        start = time.monotonic_ns()
        await self._move(self.all(), lambda _: DeviceState.RUNNING_P2P, times, Phase.RESUME, stopped_ns)
        times.total_ns = time.monotonic_ns() - start
        return times

    async def release(self, stopped_ns: int) -> Times:
        """From RUNNING_P2P to RUNNING, the vCPU last."""
        times = Times()
        start = time.monotonic_ns()
        await self._move(self.devices(), lambda _: DeviceState.RUNNING, times, Phase.RESUME, stopped_ns)
        if self.vcpu is not None:
            await self._move([self.vcpu], lambda _: DeviceState.RUNNING, times, Phase.RESUME, stopped_ns)
        await self._served()
        times.total_ns = time.monotonic_ns() - start
        return times

    async def _served(self) -> None:
        """Wait until back ends that a VMM starts by messages of its own do what it asked for: it does not wait for that.

        :raises DeviceError: naming the one that does not, with its reason.
        """
        deadline = time.monotonic() + SERVED_SECONDS

        async def one(p: Participant) -> None:
            while True:
                try:
                    await p.client.serving(phase=Phase.RESUME)
                    return
                except DeviceRefused:
                    if time.monotonic() > deadline:
                        raise
                await asyncio.sleep(SERVED_POLL_SECONDS)

        await self._each((p for p in self.devices() if p.config.protocol == "vhost-user"), one)

    async def resume(self, stopped_ns: int) -> None:
        """All to RUNNING, from wherever they are. One that has not come to rest is not asked to on the way: it may refuse again."""
        active: set[str] = set()

        async def ask(p: Participant) -> None:
            if (await p.client.info()).state in ACTIVE:
                active.add(p.config.id)

        await self._each(self.devices(), ask)
        going = [p for p in self.devices() if p.config.id in active]
        await self._move(going, lambda _: DeviceState.RUNNING, Times(), Phase.RESUME)
        resting = [p for p in self.all() if p.config.id not in active]
        await self._move(resting, lambda _: DeviceState.RUNNING_P2P, Times(), Phase.RESUME, stopped_ns)
        await self.release(stopped_ns)

    async def end_copying(self) -> None:
        """Of a machine that runs, and is not migrated any more: those that stream leave PRE_COPY. Nobody else is touched."""
        times = Times()
        streaming = [p for p in self.devices() if p.info.streams]
        await self._move(streaming, lambda _: DeviceState.RUNNING, times, Phase.PRECOPY)

    async def release_locks(self) -> None:
        """Let go of the locks on back-end files; entering RUNNING_P2P takes them again."""
        await self._each(
            (p for p in self.all() if p.info.disks or p.config.type == "qemu"),
            lambda p: p.client.release_locks(phase=Phase.COMMIT),
        )

    async def halt(self) -> None:
        """All to STOP from wherever they are, the vCPU first: after a resume that failed half-way."""
        times = Times()
        if self.vcpu is not None:
            await self._move([self.vcpu], lambda _: DeviceState.STOP, times, Phase.STOP)
        await self._move(self.devices(), lambda _: DeviceState.STOP, times, Phase.STOP)

    async def take_back(self, why: FerryError | None = None) -> None:
        """After a `prepare` that came to nothing: all stand still, and locks that it took are let go.

        :param why: what it failed by. Who missed a deadline does not obey this either, so then nobody is asked.
        """
        if isinstance(why, DeviceTimeout):
            return
        try:
            await self.halt()
            await self.release_locks()
        except FerryError as error:
            log.warning("event=let-go error=%s", error)

    async def end_migration(self, outcome: str) -> None:
        """Tracking off, and `Finish`; a participant that fails here is logged, for nothing depends on it any more."""
        for participant in self.all():
            try:
                if participant.info.tracker in ("scan", "log"):
                    await participant.client.stop_tracking()
                await participant.client.finish(outcome)
            except FerryError as error:
                log.warning("event=finish device=%s error=%s", participant.config.id, error)

    async def _move(
        self,
        participants: Iterable[Participant],
        target: Callable[[Participant], DeviceState],
        times: Times,
        phase: Phase,
        stopped_ns: int | None = None,
    ) -> None:
        async def one(p: Participant) -> None:
            start = time.monotonic_ns()
            await p.client.set_state(target(p), stopped_ns=stopped_ns, phase=phase)
            name = p.config.id
            times.devices[name] = times.devices.get(name, 0) + time.monotonic_ns() - start

        await self._each(participants, one)

    async def _each(
        self, participants: Iterable[Participant], action: Callable[[Participant], Awaitable[None]]
    ) -> None:
        """All at once; every one is waited for, then the first failure is raised."""
        wanted = [p for p in participants if not p.info.opaque]
        results = await asyncio.gather(*(self._one(p, action) for p in wanted), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _one(self, p: Participant, action: Callable[[Participant], Awaitable[None]]) -> None:
        """Once more where the bus died under it and the participant did not: all that is asked here may be asked twice."""
        try:
            await action(p)
        except DeviceGone:
            if not (p.child.alive and p.client.bus.closed.is_set()):
                raise
            log.warning("event=bus-lost-under-call device=%s", p.config.id)
            try:
                async with asyncio.timeout(APPEAR_SECONDS), self._found:
                    await self._found.wait_for(lambda: self.participants[p.config.id] is not p)
            except TimeoutError:
                pass  # it is as it was: the error below says so
            await action(self.participants[p.config.id])

    async def stop_all(self) -> None:
        """End every process; the vCPU first, for it is the client of the others."""
        order = sorted(self.children.values(), key=lambda child: child.name != VCPU_ID)
        for child in order:
            child.expected = True
        await asyncio.gather(*(child.stop() for child in order))
