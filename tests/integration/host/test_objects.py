"""Machines and jobs as objects on the bus, by the typed client and by `ferry`. One daemon for all; its coordinator is fake."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from daemons import Host as Daemon

from migrate.bus import Bus, Interface, Method, PrivateBus
from migrate.bus.host import NAME
from migrate.bus.job import INTERFACE as JOB
from migrate.bus.machine import INTERFACE as MACHINE
from migrate.bus.objects import Objects
from migrate.bus.service import Call
from migrate.client import Host, JobStatus, Limits, MigrateOptions
from migrate.errors import BusError, DeniedError, UsageError

T = TypeVar("T")


@pytest.fixture(scope="module")
def host() -> Iterator[Daemon]:
    """A daemon with a machine, web1."""
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as base:
        found = Daemon(Path(base) / "h").start()
        with_client(found, lambda client: client.run(found.machine()))
        yield found
        found.close()


def with_client(host: Daemon, work: Callable[[Host], Awaitable[T]]) -> T:
    async def session() -> T:
        async with asyncio.timeout(60), await Host.connect(host.directory) as client:
            return await work(client)

    return asyncio.run(session())


async def moved(client: Host, to: str, options: MigrateOptions | None = None) -> JobStatus:
    return await (await client.machine("web1").migrate(to, options)).outcome()


def ferry(host: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migrate.cli", *words, "--dir", str(host.directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_is_served_is_what_is_documented(host: Daemon) -> None:
    async def both(client: Host) -> list[str]:
        job = await client.machine("web1").migrate("exec:refuse")
        await job.outcome()
        paths = (client.machine("web1").path, job.path)
        introspect = ("org.freedesktop.DBus.Introspectable", "Introspect")
        return [await client._peer.call(path, *introspect, gives="s") for path in paths]

    for xml, name in zip(with_client(host, both), (MACHINE, JOB), strict=True):
        documented = (Path(__file__).parents[3] / "docs" / "dbus" / f"{name}.xml").read_text()
        served, meant = (
            ElementTree.fromstring(text).find(f"interface[@name='{name}']") for text in (xml, documented)
        )
        assert served is not None
        assert meant is not None
        shapes = [
            [(tag.tag, tag.attrib, [arg.attrib for arg in tag]) for tag in interface]
            for interface in (served, meant)
        ]
        assert shapes[0] == shapes[1]


def test_a_machine_is_an_object_that_says_what_it_is(host: Daemon) -> None:
    async def look(client: Host) -> None:
        [machine] = await client.machines()
        assert (machine.name, machine.state, machine.memory_bytes, machine.job) == (
            "web1",
            "running",
            4 << 20,
            "/",
        )
        [device] = machine.devices
        assert (device["id"], device["type"], device["version"]) == ("uart0", "uart16550", 3)
        web1 = client.machine("web1")
        await web1.pause()
        assert (await web1.status()).state == "paused"
        await web1.resume()
        assert (await web1.status()).state == "running"
        with pytest.raises(UsageError, match="there is no machine 'web2' here"):
            await client.machine("web2").status()

    with_client(host, look)


def test_progress_limits_and_the_end_of_a_job_are_told(host: Daemon) -> None:
    async def follow(client: Host) -> list[JobStatus]:
        job = await client.machine("web1").migrate(
            "exec:round+cancellable", MigrateOptions(downtime_ms=50, bandwidth=1 << 33)
        )
        seen = []
        async for status in job.progress():
            seen.append(status)
            if status.state == "held" and status.bandwidth != 1 << 20:
                assert (await client.machine("web1").status()).job == job.path
                await job.set_limits(Limits(downtime_ms=900, bandwidth=1 << 20))
            elif status.state == "held":
                await job.cancel()
        with pytest.raises(UsageError, match="no job of"):
            await job.cancel()
        return seen

    seen = with_client(host, follow)
    held = next(status for status in seen if status.state == "held")
    assert (held.round, held.remaining_bytes, held.sent_bytes, held.dirty_rate) == (1, 4096, 8192, 100)
    assert (held.downtime_limit_ms, held.bandwidth, held.exit_code) == (50.0, 1 << 33, -1)
    end = seen[-1]
    assert (end.state, end.outcome, end.running_on, end.exit_code) == ("ended", "aborted", "source", 1)
    assert (end.downtime_limit_ms, end.bandwidth) == (900.0, 1 << 20)
    reason = {"device": "uart0", "phase": "load", "reason": "cancelled by the user", "remedy": "mend it"}
    assert end.reasons == [reason]


def test_jobs_are_kept_over_a_daemon_that_is_killed(host: Daemon) -> None:
    with_client(host, lambda client: moved(client, "exec:round+complete"))
    before = with_client(host, lambda client: client.jobs())
    host.end(signal.SIGKILL)
    host.start()
    assert with_client(host, lambda client: client.jobs()) == before
    assert (before[-1].outcome, before[-1].sent_bytes, before[-1].exit_code) == ("completed", 8192, 0)


def test_who_follows_a_job_hears_that_the_daemon_ended(host: Daemon) -> None:
    async def follow(client: Host) -> None:
        job = await client.machine("web1").migrate("exec:cancellable")
        async for status in job.progress():
            if status.state == "held":
                host.end(signal.SIGKILL)

    with pytest.raises(BusError, match="the daemon of this host ended"):
        with_client(host, follow)
    host.start()
    with_client(host, lambda client: cancelled(client))


async def cancelled(client: Host) -> None:
    job = client.job((await client.find_job("web1")).id)
    await job.cancel()
    assert (await job.outcome()).outcome == "aborted"


def test_ferry_shows_jobs_and_their_events(host: Daemon) -> None:
    status = with_client(host, lambda client: moved(client, "exec:refuse", MigrateOptions(bandwidth=1 << 20)))
    listed = ferry(host, "jobs").stdout.splitlines()
    assert listed[0].split() == ["JOB", "STARTED", "MACHINE", "KIND", "STATE", "OUTCOME", "TO"]
    assert listed[-1].split()[0] == status.id[:8]
    assert listed[-1].split()[3:] == ["web1", "migrate", "ended", "refused", "exec:refuse"]
    shown = ferry(host, "show", status.id[:8])
    assert shown.returncode == 0
    assert "state     refused (exit 3), runs on: source" in shown.stdout.splitlines()
    assert "limits    downtime 300.0 ms, bandwidth 1.0 MiB/s" in shown.stdout.splitlines()
    assert "reason    uart0: too large (mend it)" in shown.stdout.splitlines()
    assert json.loads(ferry(host, "show", "web1", "--json").stdout.splitlines()[0])["id"] == status.id
    events = [json.loads(line) for line in ferry(host, "events", status.id, "--json").stdout.splitlines()]
    assert [event["event"] for event in events] == ["job", "started", "spec", "phase", "outcome"]
    assert ferry(host, "show", "ffff").stderr == "ferry: there is no job 'ffff' (see `ferry jobs`)\n"


def test_ferry_follows_everything_and_changes_limits(host: Daemon) -> None:
    words = [sys.executable, "-m", "migrate.cli", "events", "--json", "--dir", str(host.directory)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        # Nothing says when it listens but an event: machines are paused until it hears of one.
        asyncio.run(_until_heard(host, following))
        with_client(host, lambda client: client.machine("web1").migrate("exec:cancellable"))
        heard = iter(lambda: json.loads(following.stdout.readline()), None)  # type: ignore[union-attr]
        held = next(event for event in heard if event["event"] == "held")
        assert ferry(host, "set", "web1", "--bandwidth", "64k").stderr == "web1: limits changed\n"
        limits = next(event for event in heard if event["event"] == "limits")
        assert (limits["bandwidth"], limits["job"]) == (65536, held["job"])
        assert ferry(host, "set", "web1").stderr == (
            "ferry: no limit was given (give downtime_ms, bandwidth, or both)\n"
        )
        with_client(host, cancelled)
        assert next(event for event in heard if event["event"] == "outcome")["job"] == held["job"]
        following.send_signal(signal.SIGINT)
        assert following.wait(20) == 0
    assert ferry(host, "set", "web1", "--downtime", "9").returncode == 2


async def _until_heard(host: Daemon, following: subprocess.Popen[str]) -> None:
    line = asyncio.create_task(asyncio.to_thread(following.stdout.readline))  # type: ignore[union-attr]
    async with await Host.connect(host.directory) as client:
        while not line.done():
            await client.machine("web1").pause()
            await client.machine("web1").resume()
    assert json.loads(await line)["event"] == "machine"


def test_another_user_may_look_and_change_nothing() -> None:
    """The bus says whose a caller is; here only somebody else is an owner."""

    async def change(_call: Call) -> None:
        raise AssertionError("it was let through")

    async def session(directory: str) -> None:
        private = PrivateBus(Path(directory) / "bus")
        await private.start()
        ours, theirs = await Bus.connect(private.address), await Bus.connect(private.address)
        try:
            objects = Objects("/org/vmferry", owners={os.getuid() + 1})
            objects.add(
                "/org/vmferry/x", lambda guard: Interface("org.x", [Method("Do", "", "", (), (), guard)])
            )
            objects.attach(ours)
            call = (ours.unique_name, "/org/vmferry/x", "org.x", "Do")
            with pytest.raises(DeniedError, match=f"Do is not for the user {os.getuid()}, who may only look"):
                await theirs.call(*call, timeout=5)
            managed = (
                ours.unique_name,
                "/org/vmferry",
                "org.freedesktop.DBus.ObjectManager",
                "GetManagedObjects",
            )
            assert await theirs.call(*managed, timeout=5) == [{"/org/vmferry/x": {"org.x": {}}}]
        finally:
            await theirs.close()
            await ours.close()
            await private.stop()

    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as directory:
        asyncio.run(session(directory))


def test_a_daemon_is_managed_on_a_shared_bus_and_comes_back_to_it(host: Daemon) -> None:
    async def session() -> None:
        shared = PrivateBus(host.directory.parent / "shared")
        await shared.start()
        try:
            host.end(signal.SIGTERM)
            await asyncio.to_thread(host.start, bus=shared.address)
            async with await Host.connect(shared.address) as client:
                assert [machine.name for machine in await client.machines()] == ["web1"]
            done = await asyncio.to_thread(by_bus, shared.address, "list")
            assert done.stdout.splitlines()[-1].split()[:2] == ["web1", "running"], done.stderr
            await shared.restart()
            async with asyncio.timeout(20):
                await until_there(shared.address)
        finally:
            await shared.stop()

    asyncio.run(session())
    again = Daemon(host.directory.parent / "other")
    with again.spawn(bus="unix:path=/nowhere") as refused:
        assert refused.wait(20) != 0
    assert "no bus at unix:path=/nowhere" in again.log.read_text()


def by_bus(address: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migrate.cli", *words, "--bus", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


async def until_there(address: str) -> None:
    bus = await Bus.connect(address)
    try:
        while not await bus.queued_owners(NAME):
            await asyncio.sleep(0.05)
    finally:
        with contextlib.suppress(BusError):
            await bus.close()
