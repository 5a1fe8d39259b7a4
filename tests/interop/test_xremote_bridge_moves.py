"""A device in a real x-remote QEMU behind its bridge is moved; and what is wrong with what is sent, or with QEMU, is told."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator

import pytest

from devices.bridges.xremote import command
from devices.protocols.vfio_user.client import RequestRefused
from migrate.errors import DeviceRefused, DeviceTimeout, Phase, UsageError
from migrate.state import blob, catalog, chunks
from tests.faults.rig import eventually
from tests.interop.qemu_world import QEMU
from tests.interop.scripts import DATA, SCNTL1
from tests.interop.xremote_rig import (
    BIG,
    CONFIG,
    MODELS,
    NAME,
    RAM,
    SECTORS,
    Bridged,
    Make,
    bridges,
    chunks_of,
    move,
    sectors,
)

pytestmark = [
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
    pytest.mark.timeout(60),
]


@pytest.fixture
def make() -> Iterator[Make]:
    with bridges() as one:
        yield one


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"lsi53c895a", "nvme", "ich9-ahci"}))
def test_other_functions_of_qemus_move_as_well(make: Make, model: str) -> None:
    here, there = make(model=model), make(model=model, incoming=True)
    assert here.bridge.obstacle() == ""
    here.go("RUNNING")
    here.vmm.region_write(CONFIG, 0x04, 2, 0x0007)
    here.vmm.region_write(CONFIG, 0x3C, 1, 0x2A)
    move(here, there)
    here.runtime.release_locks()
    there.go("RUNNING")
    assert there.vmm.region_read(CONFIG, 0x3C, 1) == 0x2A
    assert there.vmm.read_bytes(CONFIG, 0, 64) == _as_it_was(here)


def _as_it_was(here: Bridged) -> bytes:
    here.go("RUNNING")
    return here.vmm.read_bytes(CONFIG, 0, 64)


def test_a_device_that_qemu_does_not_save_says_so_before_anything_is_stopped(make: Make) -> None:
    bridged = make(model="nvme")
    assert bridged.bridge.obstacle() == (
        "QEMU refuses migrate: State blocked by non-migratable device '0000:00:00.0/nvme'"
    )
    bridged.go("RUNNING")
    assert bridged.vmm.region_read(CONFIG, 0x00, 4) == 0x0010_1B36


def test_one_that_has_never_run_is_moved_as_it_is_after_power_on(make: Make) -> None:
    here, there = make(), make(incoming=True)
    here.go("STOP_COPY")
    for chunk in chunks_of(here):
        there.runtime.take_chunk(chunk)
    there.runtime.stage(here.runtime.save_as(1))
    there.runtime.apply()
    there.go("STOP")
    there.power_on()
    assert sectors(there.controller.read(9, 1)) == [9]


# -- moves -----------------------------------------------------------------------------------------------------------------------


def test_it_is_moved_there_and_back_with_a_command_that_ends_on_the_other_side(make: Make) -> None:
    here = make()
    here.power_on()
    here.vmm.region_write(CONFIG, 0x14, 4, 0x9000_0000)
    here.vmm.region_write(RAM, 0x10, 4, 0xFEED_F00D)
    for turn in range(3):
        there = make(incoming=True)
        here.controller.start(BIG, 512 * SECTORS)
        size = move(here, there)
        assert 10_000 < size < 100_000  # guest memory is not in it
        here.runtime.release_locks()
        there.go("RUNNING")
        here.runtime.finish("completed")
        assert there.controller.finish() == 0
        assert sectors(os.pread(there.memory, 512 * SECTORS, DATA))[10:] == list(range(10, SECTORS))
        assert there.vmm.region_read(CONFIG, 0x14, 4) == 0x9000_0000
        assert there.vmm.region_read(CONFIG, 0x04, 2) == 0x0007
        assert there.vmm.region_read(RAM, 0x10, 4) == 0xFEED_F00D
        there.controller.write(turn, bytes([turn]) * 512)
        assert there.controller.read(turn, 1) == bytes([turn]) * 512
        here = there


def test_an_interrupt_that_is_up_is_up_on_the_other_side(make: Make) -> None:
    here = make()
    here.power_on()
    here.controller.start(bytes(6))
    eventually(here.bridge.function.asserted, "the command ends")
    there = make(incoming=True)
    move(here, there)
    here.runtime.release_locks()
    there.go("RUNNING")
    assert there.bridge.function.asserted()
    assert there.controller.finish() == 0
    assert not there.bridge.function.asserted()
    there.interrupted()
    assert there.controller.command(bytes(6)) == 0
    eventually(there.interrupted, "the next one comes")


def test_one_that_was_saved_runs_on_and_is_saved_again_as_it_is_then(make: Make) -> None:
    here, there = make(), make(incoming=True)
    here.power_on()
    here.vmm.region_write(RAM, 0, 4, 1)
    move(here, there)
    here.go("STOP")
    here.go("STOP_COPY")  # QEMU itself would refuse a second time
    assert here.bridge.streamed is not None
    chunk, left = here.bridge.streamed.read_chunk(1 << 20)
    assert (len(chunk) > 10_000, left) == (True, 0)
    here.go("RUNNING")  # the abort
    assert sectors(here.controller.read(9, 1)) == [9]
    here.vmm.region_write(RAM, 0, 4, 2)
    there.go("RESUMING")  # which needs a QEMU that waits: a new one
    move(here, there)
    here.runtime.release_locks()
    there.go("RUNNING")
    assert there.vmm.region_read(RAM, 0, 4) == 2
    assert sectors(there.controller.read(9, 1)) == [9]


def test_one_that_is_reset_in_pre_copy_is_moved_as_it_is_after_the_reset(make: Make) -> None:
    here, there = make(), make(incoming=True)
    here.power_on()
    here.vmm.region_write(CONFIG, 0x14, 4, 0x9000_0000)
    here.go("PRE_COPY")
    here.controller.start(BIG, 512 * SECTORS)
    here.vmm.reset()
    here.go("STOP_COPY")
    for chunk in chunks_of(here):
        there.runtime.take_chunk(chunk)
    there.runtime.stage(here.runtime.save_as(1))
    there.runtime.apply()
    there.go("STOP")
    here.runtime.release_locks()
    there.go("RUNNING")
    assert there.vmm.region_read(CONFIG, 0x14, 4) == 0
    there.power_on()
    assert sectors(there.controller.read(9, 1)) == [9]


def test_two_at_a_time_do_not_have_the_image(make: Make) -> None:
    here, there = make(), make(incoming=True)
    here.power_on()
    move(here, there)
    with pytest.raises(DeviceRefused, match="is locked by another process"):
        there.go("RUNNING_P2P")
    assert there.bridge.state == "STOP"
    here.go("RUNNING")
    assert sectors(here.controller.read(9, 1)) == [9]


def test_what_was_read_and_what_was_written_have_one_fingerprint(make: Make) -> None:
    here, there = make(), make(incoming=True)
    here.power_on()
    move(here, there)
    assert here.runtime.fingerprint() == there.runtime.fingerprint()


# -- what is wrong ---------------------------------------------------------------------------------------------------------------


def _sent(here: Bridged) -> tuple[list[bytes], bytes]:
    here.go("PRE_COPY")
    here.go("STOP_COPY")
    return chunks_of(here), here.runtime.save_as(1)


def _changed(data: bytes, **values: object) -> bytes:
    version, found = blob.read(data, catalog.load("x-remote"))
    return blob.write(version, NAME, {**found, **values})


def test_a_stream_that_is_damaged_is_refused_by_qemu_and_named_and_the_source_runs_on(make: Make) -> None:
    here, there = make(), make(incoming=True)
    here.power_on()
    sent, state = _sent(here)
    for chunk in sent:
        there.runtime.take_chunk(chunk[:16] + bytes(len(chunk) - 16) if chunk is sent[0] else chunk)
    there.runtime.stage(state)
    with pytest.raises(
        DeviceRefused, match="its QEMU does not take the state sent: QEMU exited with 1: qemu-"
    ) as refused:
        there.runtime.apply()
    assert refused.value.device == NAME
    assert there.bridge.state == "ERROR"
    assert there.ends == []  # it is no surprise
    here.go("RUNNING")
    assert sectors(here.controller.read(9, 1)) == [9]


def test_a_stream_that_is_cut_off_or_not_in_order_never_comes_to_qemu(make: Make) -> None:
    here, there = make(), make(incoming=True)
    here.power_on()
    sent, state = _sent(here)
    assert len(sent) > 3
    there.runtime.take_chunk(sent[0])
    with pytest.raises(DeviceRefused, match="where number 1 is next"):
        there.runtime.take_chunk(sent[2])
    with pytest.raises(DeviceRefused, match="are no chunk"):
        there.runtime.take_chunk(b"anything")
    there.runtime.stage(state)
    with pytest.raises(DeviceRefused, match="4080 bytes of its stream came, and 15"):
        there.runtime.apply()
    assert there.remote.obituary() == ""


def test_a_stream_without_its_last_chunk_is_refused(make: Make) -> None:
    here, there = make(), make(incoming=True)
    here.power_on()
    sent, state = _sent(here)
    for chunk in sent[:-1]:
        there.runtime.take_chunk(chunk)
    size = sum(len(chunk) - chunks.OVERHEAD for chunk in sent[:-1])
    there.runtime.stage(_changed(state, stream_size=size))
    with pytest.raises(DeviceRefused, match="its stream has not come to its end"):
        there.runtime.apply()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"device": 1}, "device 1 where this one has 18"),
        ({"model": "other"}, "model 'other' where this one has 'lsi53c895a'"),
        ({"bar_sizes": [256, 1024, 4096, 0, 0, 0]}, "bar_sizes"),
    ],
)
def test_the_state_of_another_function_is_refused_before_the_stop(
    make: Make, values: dict[str, object], why: str
) -> None:
    here, there = make(), make(incoming=True)
    with pytest.raises(DeviceRefused, match="of another function") as refused:
        there.runtime.check_incoming(_changed(here.runtime.save_as(1), **values))
    assert why in refused.value.reason


def test_a_qemu_that_is_killed_is_told_with_its_end(make: Make) -> None:
    bridged = make()
    bridged.power_on()
    assert bridged.remote._process is not None
    os.kill(bridged.remote._process.pid, 9)
    eventually(lambda: bool(bridged.ends), "it is told")
    assert bridged.ends == ["QEMU was killed by SIGKILL: it said nothing"]
    with pytest.raises(RequestRefused, match="EIO"):
        bridged.read(SCNTL1)


def test_a_qemu_that_hangs_is_told_by_its_deadline_and_leaves_nothing_of_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("devices.bridges.xremote.remote.SECONDS", 0.5)
    here, there = make(), make(incoming=True)
    here.power_on()
    sent, state = _sent(here)
    for chunk in sent:
        there.runtime.take_chunk(chunk)
    there.runtime.stage(state)
    assert there.remote._process is not None
    os.kill(there.remote._process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(DeviceRefused, match=r"did not answer getfd within 0\.5 s"):
        there.runtime.apply()
    assert time.monotonic() - began < 2.0
    here.go("RUNNING")
    assert sectors(here.controller.read(9, 1)) == [9]


def test_a_qemu_that_hung_at_the_stop_goes_on_once_it_answers_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("devices.bridges.xremote.remote.SECONDS", 0.5)
    bridged = make()
    bridged.power_on()
    assert bridged.remote._process is not None
    pid = bridged.remote._process.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DeviceTimeout) as hangs:
        bridged.go("STOP")
    assert hangs.value.device == NAME
    os.kill(pid, signal.SIGCONT)
    assert bridged.bridge.state == "RUNNING"
    assert sectors(bridged.controller.read(9, 1)) == [9]
    bridged.go("STOP")
    bridged.go("RUNNING")
    assert sectors(bridged.controller.read(9, 1)) == [9]


def test_a_stop_that_was_given_up_and_took_effect_is_taken_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridged = make()
    bridged.power_on()
    real = bridged.remote.state

    def late(phase: Phase) -> str:
        monkeypatch.setattr(bridged.remote, "state", real)
        raise DeviceTimeout("it took too long", device=NAME, phase=phase)

    bridged.go("RUNNING_P2P")
    for undone in (True, False):  # by the stop itself; or, where QEMU hangs still, by the resume
        monkeypatch.setattr(bridged.remote, "state", late)
        if not undone:
            monkeypatch.setattr(bridged.bridge, "_as_it_was", lambda _: None)
        with pytest.raises(DeviceTimeout, match="too long"):
            bridged.go("STOP")
        assert bridged.bridge.state == "RUNNING_P2P"
        assert (real(Phase.STOP) == "running") is undone
    bridged.go("RUNNING")
    assert sectors(bridged.controller.read(9, 1)) == [9]


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("-incoming", "has -incoming, which the bridge has to say itself"),
        ("-machine", "has -machine"),
        ("id=d,file={image}", "by which QEMU locks the image"),
    ],
)
def test_a_command_that_says_what_is_the_bridges_to_say_is_refused(word: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        command.check(["qemu", "-drive", word])


def test_a_comma_in_a_path_stays_a_part_of_it() -> None:
    command.check(command.BUILT_IN["lsi53c895a"])
    assert command.escaped("/a,b") == "/a,,b"
    line = command.build(["qemu"], "d", "/a,b/m", 3, 4, incoming=True)
    assert "unix:/a,,b/m,server=on,wait=off" in line
    assert line[-2:] == ["-incoming", "defer"]
