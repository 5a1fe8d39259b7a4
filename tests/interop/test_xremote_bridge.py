"""A device in a real x-remote QEMU behind its bridge: an LSI SCSI controller with a disk, driven by a VMM's client, and moved."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from devices.bridges.xremote import bridge as bridge_module
from devices.bridges.xremote import command
from devices.protocols.vfio_user.client import RequestRefused
from migrate.errors import DeviceRefused, DeviceTimeout, Phase, TrackerError, UsageError
from migrate.memory.memfd import create_memfd
from migrate.state import blob, catalog, chunks
from migrate.state.lifecycle import DeviceState
from tests.faults.rig import eventually
from tests.interop.qemu_world import QEMU
from tests.interop.scripts import CONNECTED, DATA, DSTAT, ISTAT, SCNTL1, SIST0, read
from tests.interop.xremote_rig import CONFIG, MODELS, NAME, SIZE, Bridged, move

pytestmark = [
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
    pytest.mark.timeout(60),
]

_SECTORS = 8192
_BIG = read(0, _SECTORS)  # takes QEMU several steps
#: The controller's script RAM: a BAR whose every byte can be written and read back.
_RAM = 2

Make = Callable[..., Bridged]


@pytest.fixture
def make() -> Iterator[Make]:
    """Bridges over one image. No process and no descriptor of theirs is left."""
    directory = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    image = directory / "disk.img"
    image.write_bytes(b"".join(struct.pack("<I", sector) * 128 for sector in range(_SECTORS)))
    before = len(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        made: list[Bridged] = []

        def one(**fields: object) -> Bridged:
            made.append(Bridged(directory / str(len(made)), image, **fields))  # type: ignore[arg-type]
            stack.callback(made[-1].close)
            return made[-1]

        yield one
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, "no descriptor is left")
    shutil.rmtree(directory)


def sectors(data: bytes) -> list[int]:
    return [struct.unpack_from("<I", data, at)[0] for at in range(0, len(data), 512)]


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
    vmm.region_write(_RAM, 0x100, 8, 0x1122_3344_5566_7788)
    assert vmm.region_read(_RAM, 0x104, 4) == 0x1122_3344
    assert vmm.read_bytes(_RAM, 0x101, 5) == bytes.fromhex("7766554433")


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
    bridged.controller.start(_BIG, 512 * _SECTORS)
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
    bridged.controller.start(_BIG, 512 * _SECTORS)
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
    bridged.controller.start(_BIG, 512 * _SECTORS)
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
    bridged.vmm.region_write(_RAM, 0, 4, 0x1234_5678)
    slow(bridged, 1 << 20)
    os.pwrite(bridged.memory, bytes(512 * _SECTORS), DATA)
    bridged.controller.start(_BIG, 512 * _SECTORS)
    bridged.vmm.close()
    eventually(lambda: not bridged.bridge.memory.windows, "what it gave is taken back")
    slow(bridged, 0)
    time.sleep(0.1)
    assert (
        sectors(os.pread(bridged.memory, 512 * _SECTORS, DATA))[-1] == 0
    )  # where the request would have ended
    bridged.connect()
    assert bridged.vmm.region_read(_RAM, 0, 4) == 0x1234_5678
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
        bridged.controller.start(_BIG, 512 * _SECTORS)
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
    here.controller.start(_BIG, 512 * _SECTORS)
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
        os.pwrite(bridged.memory, bytes(512 * _SECTORS), DATA)
        bridged.controller.start(_BIG, 512 * _SECTORS)
        bridged.go("STOP")
        assert bridged.remote.under_way() == 0
        data = os.pread(bridged.memory, 512 * _SECTORS, DATA)
        assert sectors(data) == list(range(_SECTORS))
        time.sleep(0.02)
        assert os.pread(bridged.memory, 512 * _SECTORS, DATA) == data
        bridged.go("RUNNING")
        assert bridged.controller.finish() == 0


def slow(bridged: Bridged, bytes_a_second: int) -> None:
    limits = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    assert bridged.remote._monitor is not None
    bridged.remote._monitor.execute(
        "block_set_io_throttle", {"device": f"{NAME}-disk", "bps": bytes_a_second, **limits}
    )


def test_a_request_that_does_not_end_keeps_it_from_stopping_and_it_runs_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "IDLE_SECONDS", 0.3)
    bridged = make()
    bridged.power_on()
    slow(bridged, 4096)
    bridged.controller.start(_BIG, 512 * _SECTORS)
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


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"lsi53c895a", "nvme"}))
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
    for chunk in _chunks(here):
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
    here.vmm.region_write(_RAM, 0x10, 4, 0xFEED_F00D)
    for turn in range(3):
        there = make(incoming=True)
        here.controller.start(_BIG, 512 * _SECTORS)
        size = move(here, there)
        assert 10_000 < size < 100_000  # guest memory is not in it
        here.runtime.release_locks()
        there.go("RUNNING")
        here.runtime.finish("completed")
        assert there.controller.finish() == 0
        assert sectors(os.pread(there.memory, 512 * _SECTORS, DATA))[10:] == list(range(10, _SECTORS))
        assert there.vmm.region_read(CONFIG, 0x14, 4) == 0x9000_0000
        assert there.vmm.region_read(CONFIG, 0x04, 2) == 0x0007
        assert there.vmm.region_read(_RAM, 0x10, 4) == 0xFEED_F00D
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
    here.vmm.region_write(_RAM, 0, 4, 1)
    move(here, there)
    here.go("STOP")
    here.go("STOP_COPY")  # QEMU itself would refuse a second time
    assert here.bridge.streamed is not None
    chunk, left = here.bridge.streamed.read_chunk(1 << 20)
    assert (len(chunk) > 10_000, left) == (True, 0)
    here.go("RUNNING")  # the abort
    assert sectors(here.controller.read(9, 1)) == [9]
    here.vmm.region_write(_RAM, 0, 4, 2)
    there.go("RESUMING")  # which needs a QEMU that waits: a new one
    move(here, there)
    here.runtime.release_locks()
    there.go("RUNNING")
    assert there.vmm.region_read(_RAM, 0, 4) == 2
    assert sectors(there.controller.read(9, 1)) == [9]


def test_one_that_is_reset_in_pre_copy_is_moved_as_it_is_after_the_reset(make: Make) -> None:
    here, there = make(), make(incoming=True)
    here.power_on()
    here.vmm.region_write(CONFIG, 0x14, 4, 0x9000_0000)
    here.go("PRE_COPY")
    here.controller.start(_BIG, 512 * _SECTORS)
    here.vmm.reset()
    here.go("STOP_COPY")
    for chunk in _chunks(here):
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


def _chunks(here: Bridged) -> list[bytes]:
    assert here.bridge.streamed is not None
    sent, left = [], 1
    while left:
        chunk, left = here.bridge.streamed.read_chunk(4096)
        sent.append(chunk)
    return sent


def _sent(here: Bridged) -> tuple[list[bytes], bytes]:
    here.go("PRE_COPY")
    here.go("STOP_COPY")
    return _chunks(here), here.runtime.save_as(1)


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
