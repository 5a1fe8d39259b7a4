"""`ferry demo` when all goes well: by every tracker, over any number of connections, with a busy guest."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest

from migrate.errors import TrackerError
from migrate.machine import ledger
from migrate.memory import prove
from migrate.state import blob, catalog
from migrate.state.walk import walk
from tests.integration.demo.demo_runs import DemoRun
from tests.integration.demo.outcomes import DEVICES, MIB, check, check_moved

#: More than any CI machine needs. That the limit is kept is not what these are about.
PATIENT = ("--downtime", "5000")
SCAN_WORKS = True
try:
    prove.prove("scan")
except TrackerError:
    SCAN_WORKS = False


@pytest.mark.demo(*PATIENT, "--keep")
def test_the_guest_moves_and_the_last_line_tells_everything(played: DemoRun) -> None:
    check_moved(played)
    assert played.phases == ["preflight", "pre-copy", "stop", "save", "load", "commit", "resume"]


@pytest.mark.demo("--devices", "vfio-user", "--keep", *PATIENT)
def test_devices_that_know_no_bus_move_over_vfio_user_alone(played: DemoRun) -> None:
    """State and dirty log; the disk's lock goes with it, for there is one image."""
    check_moved(played, clock_moves=False)
    assert played.kept is not None
    blobs = {path.stem: blob.unpack(path.read_bytes()).type for path in played.kept.glob("*.blob")}
    assert blobs == dict.fromkeys(DEVICES, "vfio-user") | {"vcpu0": "vcpu"}
    servers = [process.words for process in played.processes if "--migration" in process.words]
    assert {words[words.index("--id") + 1] for words in servers} == DEVICES - {"vcpu0"}
    assert [words for words in servers if "--bus" in words] == []


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed")
@pytest.mark.demo("--devices", "x-remote", "--keep", *PATIENT)
def test_a_scsi_controller_of_qemus_moves_beside_our_devices(played: DemoRun) -> None:
    check_moved(played)
    assert played.kept is not None
    types = {path.stem: blob.unpack(path.read_bytes()).type for path in played.kept.glob("*.blob")}
    assert types.keys() == DEVICES | {"scsi0"}
    assert types["scsi0"] == "x-remote"
    assert (played.kept / "scsi0.chunks").stat().st_size > 10_000
    said = (played.kept / "hosta" / "machines" / "demo" / "uart0.out").read_bytes()
    assert said.count(b"\nF ") > 2, "its disk is flushed"


@pytest.mark.demo(*PATIENT, "--keep")
def test_keep_leaves_blobs_that_can_be_read_ledgers_and_logs(played: DemoRun) -> None:
    assert played.kept is not None
    blobs = {path.stem: blob.unpack(path.read_bytes()) for path in played.kept.glob("*.blob")}
    assert {name: found.type for name, found in blobs.items()} == {
        "uart0": "uart16550", "rtc0": "rtc", "display0": "display", "disk0": "virtio-blk", "vcpu0": "vcpu",
    }  # fmt: skip
    assert {found.instance for found in blobs.values()} == DEVICES
    verdicts = {
        host: ledger.verdict_of(ledger.read(played.kept / host, "demo")) for host in ("hosta", "hostb")
    }
    assert verdicts == {"hosta": ledger.Verdict.RELEASED, "hostb": ledger.Verdict.COMMITTED}
    for host in ("hosta", "hostb"):
        names = {path.name for path in (played.kept / host).rglob("*.log")}
        assert {"supervisor.log", "uart0.log", "vcpu0.log", "demo-host.log"} <= names
        assert (played.kept / host / "machines" / "demo" / "uart0.out").stat().st_size > 0


@pytest.mark.demo(*PATIENT, "--keep")
def test_every_byte_of_every_blob_that_the_demo_leaves_is_explained_once(played: DemoRun) -> None:
    assert played.kept is not None
    kept = sorted(played.kept.glob("*.blob"))
    assert len(kept) == len(DEVICES)
    for path in kept:
        data = path.read_bytes()
        made = blob.unpack(data)
        parts = list(walk(data, catalog.load(made.type).at(made.version)))
        assert [part for part in parts if part.what == "damage"] == [], path
        ranges = [(part.offset, part.offset + part.length) for part in parts]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == len(data)
        assert [pair for pair in pairwise(ranges) if pair[0][1] != pair[1][0]] == [], path
        assert [
            part.path
            for part in parts
            if part.is_value and part.path.count(".") == 1 and "[" not in part.path and not part.doc
        ] == []


@pytest.mark.demo("--back", *PATIENT)
def test_a_second_run_takes_the_guest_back_to_where_it_was(played: DemoRun) -> None:
    back = check_moved(played)
    [there] = played.of_kind("there")
    assert (there["outcome"], there["running_on"]) == ("completed", "destination"), played
    assert there["verified"] == {"ram": True, "devices": True}, played
    # Of one guest: it went on where it was taken to, and its ticks are counted over both ways.
    assert there["guest"]["ticks_after"] < back["guest"]["ticks_before"] < back["guest"]["ticks_after"]
    assert "migrating to tls://" in played.says()
    assert "name=hosta" in played.says()


@pytest.mark.demo("--tracker", "log", "--connections", "0", *PATIENT)
def test_it_moves_with_the_tracker_log_and_pages_in_line_with_the_control_messages(played: DemoRun) -> None:
    check_moved(played)
    for module in ("devices.vcpu", "devices.display"):
        [words] = played.command_lines(module)
        assert "--tracker log" in words


@pytest.mark.demo("--tracker", "scan", "--connections", "4", *PATIENT)
def test_it_moves_with_the_tracker_scan_over_four_connections_or_says_that_this_kernel_has_none(
    played: DemoRun,
) -> None:
    if SCAN_WORKS:
        check_moved(played)
        [words] = played.command_lines("devices.vcpu")
        assert "--tracker scan" in words
    else:
        assert played.code == 1
        assert "scan" in played.stderr


@pytest.mark.demo("--tracker", "compare", *PATIENT)
def test_it_moves_with_the_tracker_compare_and_warns_of_its_cost(played: DemoRun) -> None:
    check_moved(played)
    [warning] = played.of_kind("warning")
    assert "vcpu0" in warning["warning"]
    assert warning["cost_bytes"] == 64 * MIB


@pytest.mark.demo("--dirty-rate", "max", *PATIENT)
def test_a_guest_that_writes_as_fast_as_it_can_moves(played: DemoRun) -> None:
    last = check_moved(played)
    assert last["rounds"][0]["dirty_rate"] > 0


@pytest.mark.demo("--dirty-rate", "max", "--downtime", "1")
def test_a_guest_that_cannot_fit_the_downtime_limit_stays_and_the_reason_says_so(played: DemoRun) -> None:
    last = check(played, "aborted", "source", 1)
    [reason] = last["reasons"]
    assert reason["phase"] == "pre-copy"
    assert "limit of 1 ms" in reason["reason"]
    assert "--downtime" in reason["remedy"]
    assert "stop" not in played.phases
    assert last["downtime_ms"] is None
