"""The objects that management sees: org.vmferry.Host1, a Machine1 for each machine, a Job1 for each job that is kept.

It only shows: what the daemon's parts say of jobs and machines goes out as properties and signals, on every bus.
"""

from __future__ import annotations

from typing import Any

from migrate.bus import host
from migrate.bus.host import HostService, host_interface
from migrate.bus.job import job_interface
from migrate.bus.machine import machine_interface
from migrate.bus.objects import Objects
from migrate.bus.status import NONE, MachineStatus, job_path, machine_path
from migrate.host.doubt import Doubt
from migrate.host.jobs import Jobs
from migrate.host.machines import Machines
from migrate.machine import ledger


class Tree:
    """Told of every change; asks the parts what it came to."""

    def __init__(
        self, objects: Objects, service: HostService, machines: Machines, jobs: Jobs, doubt: Doubt
    ) -> None:
        self._objects, self._service = objects, service
        self._machines, self._jobs, self._doubt = machines, jobs, doubt
        self._shown: dict[str, MachineStatus] = {}
        objects.add(host.PATH, lambda guard: host_interface(service, guard))

    def show_everything(self) -> None:
        """At the daemon's start, when its machines have been found."""
        for name in ledger.machines(self._machines.host.directory):
            self.machine(name)

    def event(self, signal: str, *body: Any) -> None:
        """A signal of Host1."""
        self._objects.emit(host.PATH, signal, *body)

    # -- jobs ------------------------------------------------------------------------------------------------------------

    def job(self, name: str, urgent: bool) -> None:
        """The status of a job is new, another, or no longer kept."""
        path, status = job_path(name), self._jobs.status(name)
        if status is None:
            self._objects.remove(path)
        elif path not in self._objects:
            # Looked up each time: a job that is there again under its old name has a status of its own.
            self._objects.add(
                path,
                lambda guard: job_interface(
                    self._service, name, lambda: self._jobs.status(name) or status, guard
                ),
            )
            self.machine(status.machine)
        else:
            self._objects.changed(path, now=urgent)
            if status.state == "ended":
                self._objects.emit(path, "Ended", status.outcome, status.reasons)

    # -- machines --------------------------------------------------------------------------------------------------------

    def machine(self, name: str) -> None:
        """A machine is there, is another, or is not there any more."""
        path, status = machine_path(name), self._status(name)
        if status is None:
            self._shown.pop(name, None)
            self._objects.remove(path)
            return
        self._shown[name] = status
        if path in self._objects:
            self._objects.changed(path, now=True)
            return
        self._objects.add(
            path,
            lambda guard: machine_interface(self._service, name, lambda: self._shown[name], guard),
        )

    def _status(self, name: str) -> MachineStatus | None:
        machine = self._machines.get(name)
        job = self._jobs.active_of(name)
        going_on = job_path(job.id) if job is not None else NONE
        if machine is None:
            found = self._doubt.of_ledger(name)
            if found is None:
                return None
            return MachineStatus(name, found["state"], found["detail"], job=going_on)
        devices = [
            {key: device.get(key) or "" for key in ("id", "type", "tracker")}
            | {key: int(device.get(key) or 0) for key in ("version", "pid")}
            for device in machine.description.get("devices", [])
        ]
        memory = sum(region["size"] for region in machine.description.get("regions", []))
        return MachineStatus(name, machine.state, machine.detail, memory, devices, going_on)
