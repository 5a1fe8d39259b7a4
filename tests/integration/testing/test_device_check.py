"""`ferry device check` on real processes: ours pass, each planted fault is found by its own check, strangers are no faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.bus import Bus, PrivateBus, discover
from migrate.errors import FerryError
from migrate.testing.conformance import CHECKS

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENVIRONMENT = {**os.environ, "FERRY_SCHEMAS": str(HERE), "PYTHONPATH": str(ROOT)}
Finding = dict[str, Any]


@contextlib.contextmanager
def processes(*commands: list[str]) -> Iterator[str]:
    """These processes on a bus of their own; its address."""
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))

    async def start() -> PrivateBus:
        private = PrivateBus(directory / "bus")
        await private.start()
        return private

    async def there(address: str, count: int) -> None:
        bus = await Bus.connect(address)
        async with asyncio.timeout(20):
            while len(await bus.queued_owners("org.qemu.VMState1")) < count and not await _typed(bus, count):
                await asyncio.sleep(0.02)
        await bus.close()

    loop = asyncio.new_event_loop()
    private = loop.run_until_complete(start())
    running = [
        subprocess.Popen(
            [sys.executable, *words, "--bus", private.address],
            env=ENVIRONMENT,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        for words in commands
    ]
    try:
        loop.run_until_complete(there(private.address, len(commands)))
        yield private.address
    finally:
        for process in running:
            process.kill()
            process.wait()
        loop.run_until_complete(private.stop())
        loop.close()
        shutil.rmtree(directory)


async def _typed(bus: Bus, count: int) -> bool:
    with contextlib.suppress(FerryError):
        return len(await discover(bus)) >= count
    return False


def check(address: str, *words: str) -> tuple[int, list[Finding], str]:
    done = subprocess.run(
        [sys.executable, "-m", "migrate.cli", "device", "check", address, "--json", "--timeout", "2", *words],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, [line for line in lines if line["event"] == "finding"], done.stderr


def of(findings: list[Finding], verdict: str) -> dict[str, str]:
    return {found["check"]: found["text"] for found in findings if found["verdict"] == verdict}


@pytest.mark.parametrize(
    "words",
    [["devices.uart16550"], ["devices.rtc"], ["devices.display", "--option", "vram=1M"]],
    ids=lambda words: words[0],
)
def test_devices_of_ours_pass(words: list[str]) -> None:
    with processes(["-m", *words, "--id", "d0"]) as address:
        code, findings, err = check(address)
    assert of(findings, "FAIL") == {}
    assert code == 0, err
    assert {found["check"] for found in findings} <= CHECKS.keys()
    assert "device.arcs" in of(findings, "OK")


def test_a_disk_passes_and_is_locked_again_afterwards(tmp_path: Path) -> None:
    with (tmp_path / "disk.img").open("wb") as image:
        image.truncate(1 << 20)
    with processes(
        ["-m", "devices.virtio_blk", "--id", "disk0", "--option", f"image={tmp_path}/disk.img"]
    ) as address:
        code, findings, _ = check(address)
    assert of(findings, "FAIL") == {}
    assert code == 0


def test_a_device_without_a_planted_fault_passes() -> None:
    with processes([str(HERE / "planted.py"), "none", "--id", "t0"]) as address:
        code, findings, _ = check(address)
    assert of(findings, "FAIL") == {}
    assert code == 0


@pytest.mark.parametrize(
    ("fault", "found_by", "says"),
    [
        ("forgets-register", "device.fields", ".scratch was loaded as"),
        ("wrong-timer", "device.fields", ".count was loaded as"),
        ("writes-after-stop", "device.memory-still", "in STOP it wrote to guest address 0x40"),
        ("half-load", "vmstate.load-own", "the second half does not fit"),
    ],
)
def test_each_planted_fault_is_found_by_its_own_message(fault: str, found_by: str, says: str) -> None:
    with processes([str(HERE / "planted.py"), fault, "--id", "t0"]) as address:
        code, findings, err = check(address)
    assert code == 1
    assert says in of(findings, "FAIL")[found_by]
    assert "failed (mend what is marked [FAIL])" in err
    [meant] = [
        found["means"] for found in findings if found["check"] == found_by and found["verdict"] == "FAIL"
    ]
    assert meant == CHECKS[found_by].means


def test_a_helper_that_only_speaks_to_qemu_passes_and_is_opaque() -> None:
    with processes(["-m", "migrate.testing.helper", "right", "--id", "h0"]) as address:
        code, findings, _ = check(address)
    assert code == 0
    assert of(findings, "FAIL") == {}
    assert of(findings, "WARN").keys() == {"blob.readable", "vmstate.load-damaged"}  # it has no checksum
    assert not any(found["check"].startswith("device.") for found in findings)


@pytest.mark.parametrize(
    ("kind", "found_by", "verdict"),
    [
        ("hang-save", "vmstate.save-time", "FAIL"),
        ("oversize", "vmstate.save-size", "FAIL"),
        ("refuse-save", "vmstate.save", "FAIL"),
        ("dies", "vmstate.save", "FAIL"),
        ("wrong-type", "vmstate.save", "FAIL"),
        ("refuse-load", "vmstate.load-own", "FAIL"),
        ("takes-all", "vmstate.load-damaged", "FAIL"),
        ("half-load", "vmstate.load-damaged", "FAIL"),
        ("mutates", "vmstate.save-again", "WARN"),
        ("traceback", "vmstate.words", "FAIL"),
        ("terse", "vmstate.words", "FAIL"),
        ("no-id", "vmstate.identity", "FAIL"),
        ("long-id", "vmstate.identity", "FAIL"),
    ],
)
def test_what_a_helper_does_wrong_is_found_whoever_wrote_it(kind: str, found_by: str, verdict: str) -> None:
    with processes(["-m", "migrate.testing.helper", kind, "--id", "h0"]) as address:
        code, findings, _ = check(address)
    assert found_by in of(findings, verdict), findings
    assert code == int(verdict == "FAIL")


def test_two_with_one_id_are_both_named() -> None:
    command = ["-m", "migrate.testing.helper", "right", "--id", "twin"]
    with processes(command, command) as address:
        code, findings, _ = check(address)
    assert code == 1
    assert [found["check"] for found in findings if found["verdict"] == "FAIL"] == ["vmstate.unique"] * 2


def test_one_device_of_several_is_chosen_by_its_id() -> None:
    helper = ["-m", "migrate.testing.helper"]
    with processes([*helper, "right", "--id", "good"], [*helper, "refuse-save", "--id", "bad"]) as address:
        assert check(address, "--id", "good")[0] == 0
        assert check(address)[0] == 1
        code, findings, err = check(address, "--id", "other")
    assert (code, findings) == (2, [])
    assert "no process with the Id 'other'" in err
    assert "good" in err


def test_nobody_there_and_no_bus_are_one_line_each() -> None:
    with processes() as address:
        code, _, err = check(address)
        assert code == 2
        assert "nobody on this bus has org.qemu.VMState1" in err
    code, _, err = check("unix:path=/nowhere/bus")
    assert code == 1
    assert len(err.splitlines()) == 1
