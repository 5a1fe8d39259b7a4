"""A device in a real x-remote QEMU behind its bridge: an LSI SCSI controller with a disk, driven by a VMM's client."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import time
from collections.abc import Iterator

import pytest

from devices.bridges.xremote import bridge as bridge_module
from devices.bridges.xremote import remote as remote_module
from devices.protocols.vfio_user.client import RequestRefused
from devices.virtio.backing import Image
from migrate.errors import DeviceRefused, DeviceTimeout, Phase, TrackerError
from migrate.memory.memfd import create_memfd
from migrate.state.lifecycle import DeviceState
from tests.faults.rig import eventually
from tests.interop.qemu_world import QEMU
from tests.interop.scripts import CONNECTED, DATA, DSTAT, ISTAT, SCNTL1, SIST0, read
from tests.interop.xremote_rig import (
    BIG,
    CONFIG,
    NAME,
    RAM,
    SECTORS,
    SIZE,
    Make,
    bridges,
    sectors,
    slow,
)

pytestmark = [
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
    pytest.mark.timeout(60),
]


@pytest.fixture
def make() -> Iterator[Make]:
    with bridges() as one:
        yield one


# -- what the guest sees ---------------------------------------------------------------------------------------------------------


def test_its_regions_are_its_bars_and_a_configuration_space(make: Make) -> None:
    vmm = make().vmm
    assert [vmm.region_info(number).size for number in range(9)] == [256, 1024, 8192, 0, 0, 0, 0, 256, 0]
    assert [vmm.irq_info(index).count for index in range(5)] == [1, 0, 0, 0, 0]


def test_bars_read_back_what_the_guest_wrote_and_say_their_size(make: Make) -> None:
    bridged = make()
    bridged.go("RUNNING")
    vmm = bridged.vmm
    assert vmm.region_read(CONFIG, 0x00, 4) == 0x0012_1000
    for bar, (offset, size_mask) in enumerate(
        ((0x10, 0xFFFF_FF01), (0x14, 0xFFFF_FC00), (0x18, 0xFFFF_E000))
    ):
        vmm.region_write(CONFIG, offset, 4, 0xFFFF_FFFF)
        assert vmm.region_read(CONFIG, offset, 4) == size_mask, bar
        vmm.region_write(CONFIG, offset, 4, 0x1234_5678)
        assert vmm.region_read(CONFIG, offset, 4) == (0x1234_5678 & size_mask) | int(bar == 0), bar
    vmm.region_write(CONFIG, 0x12, 1, 0xAB)
    assert vmm.region_read(CONFIG, 0x10, 4) == 0x12AB_5601
    vmm.region_write(CONFIG, 0x30, 4, 0xFFFF_FFFF)  # no ROM
    assert vmm.region_read(CONFIG, 0x30, 4) == 0
    assert vmm.read_bytes(CONFIG, 0, 16)[:4] == bytes.fromhex("00101200")


def test_whether_it_is_decoded_is_the_guests_word_and_nothing_moves_in_qemu(make: Make) -> None:
    bridged = make()
    bridged.go("RUNNING")
    vmm = bridged.vmm
    assert vmm.region_read(CONFIG, 0x04, 2) == 0
    vmm.region_write(CONFIG, 0x04, 2, 0x0006)
    assert vmm.region_read(CONFIG, 0x04, 2) == 0x0006
    vmm.region_write(CONFIG, 0x14, 4, 0x9000_0000)
    vmm.region_write(RAM, 0x100, 8, 0x1122_3344_5566_7788)
    assert vmm.region_read(RAM, 0x104, 4) == 0x1122_3344
    assert vmm.read_bytes(RAM, 0x101, 5) == bytes.fromhex("7766554433")


def test_its_disk_is_read_and_written_through_shared_memory_and_interrupts_come(make: Make) -> None:
    bridged = make()
    bridged.power_on()
    eventually(bridged.interrupted, "power-on's interrupts come")
    assert sectors(bridged.controller.read(100, 8)) == list(range(100, 108))
    eventually(bridged.interrupted, "its interrupt comes")
    bridged.controller.write(100, b"\x77" * 1024)
    assert bridged.controller.read(99, 4)[512:1536] == b"\x77" * 1024


def test_an_interrupt_that_is_up_is_told_to_whoever_connects_or_unmasks(make: Make) -> None:
    """QEMU signals a level once, when it rises."""
    bridged = make()
    bridged.power_on()
    eventually(bridged.interrupted, "the last command's interrupt comes")
    bridged.vmm.mask_irq(0, 0, masked=True)
    bridged.controller.start(bytes(6))
    eventually(lambda: bool(bridged.bridge.function.asserted()), "the command ends")
    assert not bridged.interrupted()
    bridged.vmm.mask_irq(0, 0, masked=False)
    assert bridged.interrupted()
    bridged.vmm.set_irq_eventfd(0, None, 0)
    bridged.vmm.set_irq_eventfd(0, bridged.interrupt, 0)
    assert bridged.interrupted()
    assert bridged.controller.finish() == 0
    bridged.vmm.set_irq_eventfd(0, bridged.interrupt, 0)
    assert not bridged.interrupted()
    assert not os.get_blocking(bridged.interrupt)  # QEMU makes what it is sent block


def test_a_reset_waits_for_what_is_under_way_and_leaves_what_power_on_does(make: Make) -> None:
    bridged = make()
    bridged.power_on()
    bridged.vmm.region_write(CONFIG, 0x14, 4, 0x9000_0000)
    bridged.controller.start(BIG, 512 * SECTORS)
    bridged.vmm.reset()
    assert bridged.remote.under_way() == 0
    assert bridged.vmm.region_read(CONFIG, 0x14, 4) == 0
    assert bridged.vmm.region_read(CONFIG, 0x04, 2) == 0
    bridged.power_on()
    assert sectors(bridged.controller.read(7, 2)) == [7, 8]


@pytest.mark.parametrize(("register", "bit"), [(ISTAT, 0x40), (SCNTL1, 0x08)], ids=["chip", "bus"])
def test_a_reset_by_the_guests_driver_leaves_nothing_under_way(make: Make, register: int, bit: int) -> None:
    bridged = make()
    bridged.power_on()
    slow(bridged, 4096)
    bridged.controller.start(BIG, 512 * SECTORS)
    assert bridged.remote.under_way() == 1
    bridged.write(register, bit)
    bridged.write(register, 0)
    slow(bridged, 0)
    eventually(lambda: bridged.remote.under_way() == 0, "it has been cancelled")
    bridged.read(SIST0), bridged.read(SIST0 + 1), bridged.read(DSTAT)
    bridged.controller.open()
    assert sectors(bridged.controller.read(5, 2)) == [5, 6]
    bridged.go("STOP")


def test_a_qemu_that_has_stopped_by_itself_is_named_as_that(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "IDLE_SECONDS", 0.2)
    bridged = make()
    bridged.power_on()
    slow(bridged, 4096)
    bridged.controller.start(BIG, 512 * SECTORS)
    bridged.remote.stop()  # as it does where its storage is full
    with pytest.raises(DeviceRefused, match="its QEMU is paused"):
        bridged.go("STOP")
    slow(bridged, 0)


# -- memory ----------------------------------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_given_to_it_is_refused_and_what_it_had_stays(make: Make) -> None:
    bridged = make()
    vmm, page = bridged.vmm, 4096
    sealed = create_memfd("more", page)
    plain = os.memfd_create("plain")
    os.ftruncate(plain, page)
    with pytest.raises(RequestRefused, match="EINVAL"):
        vmm.dma_map(SIZE, page, plain)
    with pytest.raises(RequestRefused, match="ENOTSUP"):
        vmm.dma_map(SIZE, page, sealed, writable=False)
    with pytest.raises(RequestRefused, match="EINVAL"):
        vmm.dma_map(0xE000_0000, page, sealed)  # the function's own place
    for number in range(6):
        vmm.dma_map(SIZE + number * page, page, sealed)
    with pytest.raises(RequestRefused, match="EINVAL"):
        vmm.dma_map(SIZE + 6 * page, page, sealed)  # the eighth
    for number in range(6):
        vmm.dma_unmap(SIZE + number * page, page)
    for fd in (sealed, plain):
        os.close(fd)
    bridged.power_on()
    assert sectors(bridged.controller.read(3, 1)) == [3]


def test_memory_that_was_taken_back_is_not_written_any_more(make: Make) -> None:
    bridged = make()
    bridged.power_on()
    bridged.vmm.dma_unmap(0, SIZE)
    os.pwrite(bridged.memory, bytes(512), DATA)
    bridged.controller.start(read(5, 1), 512)  # its program is out of reach, too
    time.sleep(0.1)
    assert os.pread(bridged.memory, 512, DATA) == bytes(512)


def test_a_vmm_that_vanishes_takes_its_memory_along_and_another_one_goes_on(make: Make) -> None:
    bridged = make()
    bridged.power_on()
    bridged.vmm.region_write(RAM, 0, 4, 0x1234_5678)
    slow(bridged, 1 << 20)
    os.pwrite(bridged.memory, bytes(512 * SECTORS), DATA)
    bridged.controller.start(BIG, 512 * SECTORS)
    bridged.vmm.close()
    eventually(lambda: not bridged.bridge.memory.windows, "what it gave is taken back")
    slow(bridged, 0)
    time.sleep(0.1)
    assert (
        sectors(os.pread(bridged.memory, 512 * SECTORS, DATA))[-1] == 0
    )  # where the request would have ended
    bridged.connect()
    assert bridged.vmm.region_read(RAM, 0, 4) == 0x1234_5678
    bridged.write(ISTAT, 0x40)
    bridged.write(ISTAT, 0)
    bridged.controller.open()
    assert sectors(bridged.controller.read(5, 2)) == [5, 6]


def test_the_only_tracker_is_compare_and_others_are_refused_with_that_remedy(make: Make) -> None:
    bridge = make().bridge
    for wanted in ("scan", "log", None):
        with pytest.raises(TrackerError, match="no log of the pages") as refused:
            bridge.choose_tracker(wanted)
        assert 'tracker = "compare"' in (refused.value.remedy or "")


# -- what is under way -------------------------------------------------------------------------------------------------------------


def test_qemu_alone_lets_a_request_go_on_after_its_stop(make: Make) -> None:
    """Why there is a requests.py. Should this fail one day, QEMU has been mended."""
    bridged = make()
    bridged.power_on()
    seen = 0
    for _ in range(10):
        bridged.controller.start(BIG, 512 * SECTORS)
        bridged.remote.stop()
        seen += bridged.remote.under_way()
        eventually(lambda: not bridged.remote.under_way(), "QEMU ends it, though it was stopped")
        bridged.remote.run(Phase.RESUME)
        bridged.controller.finish()
    assert seen > 0


def test_qemu_alone_loses_a_request_that_is_under_way(make: Make) -> None:
    """It says `completed` on both sides, and the command never ends."""
    here, there = make(), make(incoming=True)
    here.power_on()
    slow(here, 65536)
    here.controller.start(BIG, 512 * SECTORS)
    here.remote.stop()
    assert here.remote.under_way() == 1
    stream = os.memfd_create("stream")
    here.remote.save(stream)
    for at in range(0, SIZE, 1 << 20):
        os.pwrite(there.memory, os.pread(here.memory, 1 << 20, at), at)
    os.lseek(stream, 0, os.SEEK_SET)
    there.remote.load(stream)
    os.close(stream)
    there.bridge.function.place()
    there.remote.run(Phase.RESUME)
    there.bridge.state = DeviceState.RUNNING
    with pytest.raises(AssertionError, match="no end of the command"):
        there.controller.finish(1.0)


def test_nothing_is_under_way_once_it_has_stopped_and_guest_memory_stands_still(make: Make) -> None:
    bridged = make()
    bridged.power_on()
    for _ in range(10):
        os.pwrite(bridged.memory, bytes(512 * SECTORS), DATA)
        bridged.controller.start(BIG, 512 * SECTORS)
        bridged.go("STOP")
        assert bridged.remote.under_way() == 0
        data = os.pread(bridged.memory, 512 * SECTORS, DATA)
        assert sectors(data) == list(range(SECTORS))
        time.sleep(0.02)
        assert os.pread(bridged.memory, 512 * SECTORS, DATA) == data
        bridged.go("RUNNING")
        assert bridged.controller.finish() == 0


def test_a_request_that_does_not_end_keeps_it_from_stopping_and_it_runs_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "IDLE_SECONDS", 0.3)
    bridged = make()
    bridged.power_on()
    slow(bridged, 4096)
    bridged.controller.start(BIG, 512 * SECTORS)
    with pytest.raises(
        DeviceRefused, match=r"1 SCSI request is under way for 0\.3 s after the vCPU's stop"
    ) as refused:
        bridged.go("STOP")
    assert refused.value.device == NAME
    assert bridged.bridge.state == "RUNNING"
    slow(bridged, 0)
    assert bridged.controller.finish() == 0
    bridged.go("STOP")


def test_a_controller_that_is_connected_to_a_target_is_not_at_rest(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU does not save which target an LSI controller has selected."""
    monkeypatch.setattr(bridge_module, "IDLE_SECONDS", 0.2)
    bridged = make()
    bridged.power_on()
    os.pwrite(
        bridged.memory, struct.pack("<IIII", 0x4100_0000, 0, 0x9808_0000, 7), 0x10000
    )  # select; interrupt
    for byte in range(4):
        bridged.write(0x2C + byte, 0x10000 >> 8 * byte & 0xFF)
    assert bridged.read(SCNTL1) & CONNECTED
    with pytest.raises(DeviceRefused, match=r"it is connected to a target for 0\.2 s"):
        bridged.go("STOP")
    assert bridged.read(SCNTL1) & CONNECTED
    bridged.read(DSTAT)


def test_a_qemu_that_does_not_tell_what_is_under_way_is_not_moved(make: Make) -> None:
    bridged = make()
    bridged.power_on()
    bridged.remote.traced = False
    assert "it has no trace" in bridged.bridge.obstacle()
    with pytest.raises(DeviceRefused, match="does not tell which SCSI requests are under way"):
        bridged.go("STOP")
    assert bridged.bridge.state == "RUNNING"


def test_storage_whose_requests_nobody_counts_is_not_moved(make: Make) -> None:
    bridged = make(model="ich9-ahci")
    assert "its requests are no SCSI requests" in bridged.bridge.obstacle()


def test_a_save_that_was_given_up_is_cancelled_and_the_next_one_is_whole(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU takes `cont` while it migrates, and would stop once it is done."""
    bridged = make()
    bridged.power_on()
    held = [{"capability": "pause-before-switchover", "state": True}]
    bridged.remote._execute("migrate-set-capabilities", {"capabilities": held}, Phase.SAVE)
    with monkeypatch.context() as patch:
        patch.setattr(remote_module, "SECONDS", 0.5)
        with pytest.raises(DeviceTimeout, match="has not done migrate within"):
            bridged.go("STOP_COPY")
    assert bridged.remote._execute("query-migrate", None, Phase.SAVE)["status"] == "cancelled"
    bridged.go("RUNNING")
    held[0]["state"] = False
    bridged.remote._execute("migrate-set-capabilities", {"capabilities": held}, Phase.SAVE)
    assert bridged.remote.state(Phase.RUNNING) == "running"
    bridged.go("STOP_COPY")
    assert bridged.bridge.save()["stream_size"] > 4096


def test_a_qemu_that_may_run_yet_keeps_its_image(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither `cont` nor `stop` was answered: who lets go now gives a disk away that is written to."""
    bridged = make()
    bridged.power_on()
    bridged.go("STOP")
    bridged.bridge.release_locks()
    process = bridged.remote._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    assert bridged.bridge._image is not None
    other = Image(bridged.bridge._image.path, read_only=False)
    with monkeypatch.context() as patch:
        patch.setattr(remote_module, "SECONDS", 0.3)
        with pytest.raises(DeviceTimeout):
            bridged.go("RUNNING")
    with pytest.raises(DeviceRefused, match="is locked by another process"):
        other.lock()
    os.kill(process.pid, signal.SIGCONT)
    eventually(lambda: bridged.remote.state(Phase.RUNNING) != "running", "both are obeyed, in order")
    bridged.go("RUNNING")
    other.close()


def test_a_start_that_was_taken_back_leaves_no_stream_from_before_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridged = make()
    bridged.power_on()
    bridged.go("STOP_COPY")
    assert bridged.bridge.save()["stream_size"]
    run = bridged.remote.run

    def late(phase: Phase) -> None:
        run(phase)
        raise DeviceTimeout("no answer", phase=phase, device=NAME, remedy="-")

    with monkeypatch.context() as patch:
        patch.setattr(bridged.remote, "run", late)
        with pytest.raises(DeviceTimeout):
            bridged.go("RUNNING")
    assert bridged.bridge.state == "STOP"
    assert bridged.bridge.save()["stream_size"] == 0
    bridged.go("STOP_COPY")  # QEMU writes another
    assert bridged.bridge.save()["stream_size"]
    bridged.go("RUNNING")
