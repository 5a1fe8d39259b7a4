"""Management from another program: two real hosts, and nothing but `busctl` to drive them. Every command is in
docs/how-to-manage.md in its words."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Host, eventually

BUSCTL = shutil.which("busctl")
pytestmark = pytest.mark.skipif(BUSCTL is None, reason="busctl is not installed: apt-get install systemd")

NAME = "org.vmferry.Host"
WEB1 = "/org/vmferry/machine/web1"


class Busctl:
    """One host as `busctl` sees it."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        address = f"--address=unix:path={self.host.directory}/bus"
        return subprocess.run(
            [str(BUSCTL), address, "--json=short", "--timeout=60", *words],
            capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip

    def call(self, path: str, interface: str, member: str, *words: str) -> Any:
        done = self._run("call", NAME, path, f"org.vmferry.{interface}", member, *words)
        assert done.returncode == 0, done.stderr
        values = json.loads(done.stdout)["data"] if done.stdout.strip() else []
        return values[0] if values else None

    def refused(self, path: str, interface: str, member: str, *words: str) -> str:
        done = self._run("call", NAME, path, f"org.vmferry.{interface}", member, *words)
        assert done.returncode == 1
        return done.stderr

    def get(self, path: str, interface: str, member: str) -> Any:
        done = self._run("get-property", NAME, path, f"org.vmferry.{interface}", member)
        return json.loads(done.stdout)["data"] if done.returncode == 0 else None

    def job(self, path: str, **wanted: object) -> None:
        """Wait until the job is so."""
        for member, value in wanted.items():
            eventually(lambda m=member, v=value: self.get(path, "Job1", m) == v, f"{member} is {value}", 60)  # type: ignore[misc]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Busctl, Busctl]]:
    """Two daemons; web1 runs on the first."""
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as base:
        here, there = (Host(Path(base) / name, real=True).start("--name", name) for name in ("a", "b"))
        try:
            one = Busctl(here)
            one.call("/org/vmferry/Host1", "Host1", "RunMachine", "sa{sv}", str(here.machine()), "0")
            yield one, Busctl(there)
        finally:
            here.close()
            there.close()


def to(host: Busctl) -> str:
    return f"unix:{host.host.directory}/accept.sock"


def test_a_refusal_says_why_and_stops_nothing(hosts: tuple[Busctl, Busctl]) -> None:
    here, there = hosts
    there.call("/org/vmferry/Host1", "Host1", "RunMachine", "sa{sv}", str(here.host.machine()), "0")
    job = here.call(WEB1, "Machine1", "Check", "sa{sv}", to(there), "0")
    here.job(job, State="ended")
    assert [here.get(job, "Job1", name) for name in ("Outcome", "RunningOn", "ExitCode")] == [
        "refused",
        "source",
        3,
    ]
    [reason] = here.get(job, "Job1", "Reasons")
    assert reason["reason"] == "a machine web1 is on that host already; it is running"
    assert here.get(WEB1, "Machine1", "State") == "running"
    there.call(WEB1, "Machine1", "Stop", "b", "false")
    error = here.refused(WEB1, "Machine1", "Migrate", "sa{sv}", "hostb:4789", "0")
    [reason] = json.loads(error.partition("Call failed: ")[2])
    assert "there is no scheme" in reason["reason"], reason
    assert reason["remedy"]


def test_a_migration_that_is_cancelled_goes_on_here(hosts: tuple[Busctl, Busctl]) -> None:
    here, there = hosts
    job = here.call(WEB1, "Machine1", "Migrate", "sa{sv}", to(there), "1", "hold", "s", "round:1")
    here.job(job, State="held")
    assert here.get(WEB1, "Machine1", "Job") == job
    here.call(job, "Job1", "Cancel")
    here.job(job, State="ended", Outcome="aborted", RunningOn="source")
    assert here.get(WEB1, "Machine1", "State") == "running"


def test_limits_are_changed_while_a_migration_goes_on_and_it_arrives(hosts: tuple[Busctl, Busctl]) -> None:
    here, there = hosts
    options = ("3", "hold", "s", "round:1", "bandwidth", "t", "1000000", "downtime_ms", "u", "5000")
    job = here.call(WEB1, "Machine1", "Migrate", "sa{sv}", to(there), *options)
    here.job(job, State="held", Bandwidth=1000000, DowntimeLimitMs=5000)
    here.call(job, "Job1", "SetLimits", "a{sv}", "2", "bandwidth", "t", "500000", "downtime_ms", "u", "9000")
    here.job(job, Bandwidth=500000, DowntimeLimitMs=9000)
    here.call(job, "Job1", "Continue")
    here.job(job, State="ended", Outcome="completed", RunningOn="destination", ExitCode=0)
    assert here.get(job, "Job1", "DowntimeMs") > 0
    eventually(lambda: here.get(WEB1, "Machine1", "State") is None, "it is gone here")
    assert there.get(WEB1, "Machine1", "State") == "running"
