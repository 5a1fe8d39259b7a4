"""Jobs as callers see them: events, outcomes, one at a time, cancelled, left by a killed daemon. The coordinator is fake."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from daemons import Host, client_of, events_of, eventually, processes_of, run, state_of, until

from migrate.bus.host import HostClient, MigrateOptions
from migrate.errors import FerryError, UsageError
from migrate.machine import ledger
from migrate.machine.ledger import Entry, Ledger, Verdict


@pytest.fixture
def running(host: Host) -> Host:
    host.start()
    run(host, lambda client: client.run_machine(str(host.machine())))
    return host


async def migrate(client: HostClient, to: str, **options: Any) -> str:
    return await client.migrate("web1", to, MigrateOptions(**options))


async def whole(client: HostClient, to: str, **options: Any) -> list[dict[str, Any]]:
    return await events_of(client, await migrate(client, to, **options))


def jobs_left(host: Host) -> list[str]:
    return [path.name for path in (host.directory / "jobs").glob("*.in")]


def test_the_events_of_a_job_are_followed_from_first_to_outcome(running: Host) -> None:
    events = run(running, lambda client: whole(client, "exec:round+garbage+complete"))
    assert [event["event"] for event in events] == ["job", "started", "spec", "phase", "round", "outcome"]
    assert events[-1]["outcome"] == "completed"
    again = run(running, lambda client: client.job_events(events[0]["job"]))
    assert again == events
    running.end(signal.SIGTERM)
    running.start()
    assert run(running, lambda client: client.job_events(events[0]["job"])) == events
    assert jobs_left(running) == []


def test_a_coordinator_is_told_what_was_asked_for(running: Host) -> None:
    options = {
        "connections": 4,
        "downtime_ms": 50,
        "verify": True,
        "keep": "/tmp/kept",
        "hold": "round:1,ready",
        "bandwidth": 5 << 30,
        "timeout_seconds": 60,
        "on_stall": "extend-downtime",
    }
    events = run(running, lambda client: whole(client, "exec:complete", **options))
    spec = next(event for event in events if event["event"] == "spec")["spec"]
    wanted = {
        **options,
        "hold": ["round:1", "ready"],
        "machine": "web1",
        "to": "exec:complete",
        "check_only": False,
    }
    assert {key: spec[key] for key in wanted} == wanted
    assert spec["job"] == events[0]["job"]
    assert spec["bus"] == f"unix:path={running.directory}/machines/web1/bus"
    assert spec["incarnation"] == (running.directory / "incarnation").read_text().strip()
    assert set(spec) == {
        "job", "machine", "bus", "to", "credentials", "host_name", "incarnation", "connections", "downtime_ms",
        "verify", "check_only", "keep", "hold", "doubt_seconds", "bandwidth", "timeout_seconds", "on_stall",
    }  # fmt: skip


def test_one_job_a_machine_at_a_time(running: Host) -> None:
    async def two(client: HostClient) -> None:
        job = await migrate(client, "exec:cancellable")
        await until(client, job, "held")
        with pytest.raises(UsageError, match="a job of web1 goes on already: migrate exec:cancellable"):
            await migrate(client, "exec:complete")
        with pytest.raises(UsageError, match="goes on already"):
            await client.stop_machine("web1", force=False)
        [machine] = await client.list_machines()
        assert machine["active"] == {"job": job, "kind": "migrate"}
        await client.cancel("web1")
        assert (await until(client, job, "outcome"))["reasons"][0]["reason"] == "cancelled by the user"
        with pytest.raises(UsageError, match="no job of 'web1' goes on"):
            await client.cancel("web1")
        assert (await whole(client, "exec:complete"))[-1]["exit_code"] == 0

    run(running, two)


def test_a_job_that_is_held_goes_on_when_it_is_told(running: Host) -> None:
    async def hold(client: HostClient) -> None:
        job = await migrate(client, "exec:hold+complete")
        await until(client, job, "held")
        await client.proceed("web1")
        assert (await until(client, job, "outcome"))["outcome"] == "completed"

    run(running, hold)


def test_a_job_outlives_its_daemon_and_the_next_one_can_cancel_it(running: Host) -> None:
    async def begin(client: HostClient) -> str:
        job = await migrate(client, "exec:cancellable")
        await until(client, job, "held")
        return job

    job = run(running, begin)
    running.end(signal.SIGKILL)
    assert any("fake_coordinator" in line for line in processes_of(running.directory)) or jobs_left(running)
    running.start()

    async def end(client: HostClient) -> list[dict[str, Any]]:
        with pytest.raises(UsageError, match="goes on already"):
            await migrate(client, "exec:complete")
        await client.cancel("web1")
        return await events_of(client, job)

    events = run(running, end)
    assert [event["event"] for event in events] == ["job", "started", "spec", "phase", "held", "outcome"]
    assert jobs_left(running) == []


def test_whoever_follows_learns_that_the_daemon_has_gone(running: Host) -> None:
    async def follow() -> None:
        async with client_of(running) as client:
            job = await migrate(client, "exec:cancellable")
            following = asyncio.ensure_future(events_of(client, job))
            await until(client, job, "held")
            await asyncio.to_thread(running.end, signal.SIGKILL)
            with pytest.raises(FerryError, match="the daemon of this host ended while the job went on"):
                await following

    asyncio.run(follow())
    running.start()
    run(running, lambda client: client.cancel("web1"))


def test_whoever_follows_by_a_client_that_is_closed_does_not_wait_for_ever(running: Host) -> None:
    async def follow() -> None:
        async with client_of(running) as client:
            job = await migrate(client, "exec:cancellable")
            following = asyncio.ensure_future(events_of(client, job))
            await until(client, job, "held")
            await client.close()
            with pytest.raises(FerryError, match="what became of it is not known from here"):
                await asyncio.wait_for(following, 30)

    asyncio.run(follow())
    run(running, lambda client: client.cancel("web1"))


def test_a_daemon_that_is_stopped_takes_its_jobs_back_first(running: Host) -> None:
    async def begin(client: HostClient) -> str:
        job = await migrate(client, "exec:cancellable")
        await until(client, job, "held")
        return job

    job = run(running, begin)
    assert running.end(signal.SIGTERM) == 0
    assert jobs_left(running) == []
    running.start()
    [*_, outcome] = run(running, lambda client: client.job_events(job))
    assert outcome["reasons"][0]["reason"] == "cancelled by the user"
    assert state_of(running) == "running"


def test_ctrl_c_on_the_terminal_of_a_daemon_is_for_the_daemon_alone(running: Host) -> None:
    async def begin(client: HostClient) -> str:
        job = await migrate(client, "exec:cancellable")
        await until(client, job, "held")
        return job

    job = run(running, begin)
    assert running.process is not None
    os.killpg(running.process.pid, signal.SIGINT)  # as a terminal does: to all of the group in the foreground
    assert running.process.wait(60) == 0
    running.start()
    [*_, outcome] = run(running, lambda client: client.job_events(job))
    assert outcome["reasons"][0]["reason"] == "cancelled by the user"
    assert state_of(running) == "running"


def test_a_coordinator_that_dies_without_a_word_leaves_an_outcome(running: Host) -> None:
    events = run(running, lambda client: whole(client, "exec:round+die"))
    outcome = events[-1]
    assert (outcome["outcome"], outcome["running_on"], outcome["exit_code"]) == ("aborted", "source", 1)
    assert outcome["reasons"][0]["reason"] == "the coordinator of the migration was killed by SIGKILL"
    assert outcome["reasons"][0]["phase"] == "pre-copy"
    assert outcome["rounds"] == [{"n": 1, "pages": 2, "bytes": 8192, "seconds": 0.5, "dirty_rate": 100}]


def test_a_coordinator_that_dies_in_the_stop_is_told_of_when_the_machine_runs_again(running: Host) -> None:
    events = run(running, lambda client: whole(client, "exec:begin"))
    assert (events[-1]["outcome"], events[-1]["running_on"]) == ("aborted", "source")
    assert state_of(running) == "running"


def test_a_coordinator_that_dies_after_commit_leaves_a_doubt_that_is_asked_about(running: Host) -> None:
    async def doubt(client: HostClient) -> str:
        [*_, outcome] = await whole(client, "exec:commit")
        assert (outcome["outcome"], outcome["running_on"], outcome["exit_code"]) == ("in_doubt", "neither", 4)
        job = await client.recover("web1")
        asked = (await until(client, job, "spec"))["spec"]
        assert asked["job"] == outcome["job"]
        assert (asked["to"], asked["epoch"], asked["peer_incarnation"]) == (
            "exec:commit",
            1,
            "peer-incarnation",
        )
        assert asked["bus"] == f"unix:path={running.directory}/machines/web1/bus"
        assert await client.recover("web1") == job  # one asks, however often it is wanted
        with pytest.raises(UsageError, match="in doubt, which nothing cancels"):
            await client.cancel("web1")
        with pytest.raises(UsageError):
            await client.stop_machine("web1", force=False)
        return job

    job = run(running, doubt)
    running.end(signal.SIGKILL)
    running.start()  # finds the machine in doubt, and the one that asks
    assert run(running, lambda client: client.recover("web1")) == job
    assert state_of(running) == "in-doubt"
    assert run(running, lambda client: client.resolve("web1", "source")) == "running"
    eventually(lambda: jobs_left(running) == [], "nobody asks any more")
    with pytest.raises(UsageError, match="not in doubt"):
        run(running, lambda client: client.recover("web1"))


def test_a_doubt_that_outlived_its_machine_is_asked_about_and_resolved(host: Host) -> None:
    written = Ledger(host.directory, "web1")
    written.write(Entry.OUTGOING, "ab" * 16, 7, peer="exec:there")
    written.write(Entry.PEER, "ab" * 16, 7, peer="exec:there", detail="peer-incarnation")
    written.write(Entry.COMMIT, "ab" * 16, 7, peer="exec:there")
    written.close()
    host.start()

    async def look(client: HostClient) -> None:
        [machine] = await client.list_machines()
        assert (machine["state"], machine["pid"]) == ("in-doubt", 0)
        assert machine["active"]["kind"] == "recover"
        spec = (await until(client, machine["active"]["job"], "spec"))["spec"]
        assert (spec["job"], spec["epoch"], spec["bus"]) == ("ab" * 16, 7, "")
        assert spec["peer_incarnation"] == "peer-incarnation"
        with pytest.raises(UsageError, match="web1"):
            await client.run_machine(str(host.machine()))
        await client.resolve("web1", "destination")
        assert await client.list_machines() == []

    run(host, look)
    assert ledger.verdict_of(ledger.read(host.directory, "web1")) is Verdict.RELEASED


def test_options_that_nobody_knows_are_refused_with_the_nearest(running: Host) -> None:
    from migrate.bus import library
    from migrate.bus.host import INTERFACE, NAME, PATH

    async def call(client: HostClient, **given: Any) -> None:
        body = ["web1", "exec:complete", given]
        await client._bus.call(NAME, PATH, INTERFACE, "Migrate", "ssa{sv}", body, timeout=5)

    with pytest.raises(UsageError, match=r"no option 'conections' \(did you mean 'connections'\?\)"):
        run(running, lambda client: call(client, conections=library.variant("u", 1)))
    with pytest.raises(UsageError, match="the option connections is 'many'"):
        run(running, lambda client: call(client, connections=library.variant("s", "many")))
    for options, to, said in (
        ({"connections": 17}, "exec:x", "17 connections"),
        ({"downtime_ms": 0}, "exec:x", "a downtime of 0 ms"),
        ({"keep": "here"}, "exec:x", "not an absolute path"),
        ({"bandwidth": 1000}, "exec:x", "a bandwidth of 1000 bytes/s"),
        ({"on_stall": "hope"}, "exec:x", "'hope' is nothing to do on a stall"),
        ({}, "hostb:4789", "no scheme"),
        ({}, "tls://hostb:4789", "no certificate"),
        ({}, "local:", "does not work yet"),
    ):
        with pytest.raises(UsageError, match=said):
            run(running, lambda client, to=to, options=options: migrate(client, to, **options))  # type: ignore[misc]
    for job in ("../../incarnation", "00" * 16):
        with pytest.raises(UsageError, match="there is no job"):
            run(running, lambda client, job=job: client.job_events(job))  # type: ignore[misc]


def test_only_so_many_journals_are_kept(running: Host) -> None:
    jobs = running.directory / "jobs"
    for number in range(210):
        old = jobs / f"{number:032x}.jsonl"
        old.write_text('{"event": "job"}\n{"event": "outcome"}\n')
        os.utime(old, (number, number))
    run(running, lambda client: whole(client, "exec:complete"))
    assert len(list(jobs.glob("*.jsonl"))) <= 201
    assert not (jobs / f"{0:032x}.jsonl").exists()
