"""A device behind a bridge: its states, its data and its dirty pages by vfio-user, and what is said where that cannot be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bridge_rig import Bridged, Foreign, Make, carry, foreign, move, serve

from devices.bridges.vfio_user.upstream import Upstream
from devices.display import COMMAND, FILL, Display
from devices.kit.runtime import BUS, Runtime
from devices.protocols.vfio_user.client import RequestRefused
from devices.protocols.vfio_user.feature_messages import MigrationState
from devices.rtc import Rtc
from devices.uart16550 import Uart16550
from devices.virtio.backing import Image
from migrate.coordinator.preflight import check_source
from migrate.errors import DeviceGone, DeviceRefused, DeviceTimeout, IncompatibleError, TrackerError
from migrate.memory.memfd import create_memfd

S = MigrationState
MIB, PAGE = 1 << 20, 4096


# -- states ------------------------------------------------------------------------------------------------------------------


def test_a_server_walks_the_states_of_the_bus_and_never_hears_of_p2p(make: Make) -> None:
    server = Foreign()
    bridged = make(foreign(server))
    assert (
        server.seen == []
    )  # it has nothing to do, and libvfio-user's refuse memory and interrupts while they stand still
    started = False
    for state in ("RUNNING", "PRE_COPY", "STOP_COPY", "STOP", "RUNNING", "STOP", "RESUMING"):
        server.seen.clear()
        bridged.go(state)
        assert (state, server.seen) in (
            ("RUNNING", ["RUNNING"] if started else []),
            ("PRE_COPY", []),  # it has no such state
            ("STOP_COPY", ["STOP", "STOP_COPY"]),
            ("STOP", ["STOP"]),
            ("RESUMING", ["RESUMING"]),
        ), (state, server.seen)
        started = True


def test_a_refused_step_names_the_device_both_states_and_where_the_server_is(make: Make) -> None:
    server = Foreign()
    bridged = make(foreign(server), name="nic0")
    bridged.go("RUNNING")
    server.refuse = {int(S.STOP)}
    with pytest.raises(
        DeviceRefused, match=r"refused to go from RUNNING to STOP .EINVAL., and is in RUNNING"
    ) as told:
        bridged.go("STOP")
    assert told.value.device == "nic0"
    assert bridged.bridge.state == "RUNNING_P2P"
    bridged.go("RUNNING")


def test_the_vmm_is_answered_while_the_machine_runs_and_told_ebusy_while_it_stands(make: Make) -> None:
    bridged = make(serve(Uart16550("dev0")))
    with pytest.raises(RequestRefused, match="EBUSY"):
        bridged.vmm.region_read(0, 7, 1)
    bridged.go("RUNNING")
    bridged.vmm.region_write(0, 7, 1, 0x5A)
    bridged.go("RUNNING_P2P")
    assert bridged.vmm.region_read(0, 7, 1) == 0x5A
    bridged.go("STOP")
    with pytest.raises(RequestRefused, match="EBUSY"):
        bridged.vmm.region_write(0, 7, 1, 0)


def test_a_stopped_device_is_not_touched_whatever_its_server_would_answer(make: Make) -> None:
    bridged = make(foreign(Foreign()))
    for access in (
        lambda: bridged.vmm.region_read(0, 0, 1),
        lambda: bridged.vmm.region_write(0, 0, 1, 1),
        lambda: bridged.vmm.trigger_irq(0),
        bridged.vmm.reset,
    ):
        with pytest.raises(RequestRefused, match="EBUSY"):
            access()
    bridged.go("RUNNING")
    bridged.vmm.region_write(0, 0, 1, 7)
    assert bridged.vmm.region_read(0, 0, 1) == 7


def test_what_a_server_gives_to_map_and_to_signal_passes_through(make: Make) -> None:
    from devices.protocols.vfio_user.region_messages import IoEventfd, RegionMemory

    backend = foreign(Foreign())
    memory, bell = create_memfd("bar", 2 * PAGE), os.eventfd(0, os.EFD_CLOEXEC)
    backend.mappable[0] = RegionMemory(memory, PAGE, ((0, PAGE),))  # type: ignore[attr-defined]
    backend.doorbells[0] = [IoEventfd(bell, 8, 4)]  # type: ignore[attr-defined]
    bridged = make(backend)
    for _ in range(2):  # a VMM that comes again gets them again
        found = bridged.vmm.region_memory(0)
        assert found is not None
        fd, offset, areas = found
        assert (os.fstat(fd).st_ino, offset, areas) == (os.fstat(memory).st_ino, PAGE, ((0, PAGE),))
        [one] = bridged.vmm.io_fds(0)
        os.eventfd_write(one.fd, 3)
        assert os.eventfd_read(bell) == 3
        for each in (fd, one.fd):
            os.close(each)
    assert bridged.vmm.region_memory(1) is None
    os.close(memory)
    os.close(bell)


def test_interrupts_come_without_the_bridge(make: Make) -> None:
    device = Rtc("dev0")
    bridged = make(serve(device))
    bridged.go("RUNNING")
    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    bridged.vmm.set_irq_eventfd(0, eventfd)
    with bridged.bridge.lock:  # nothing of the bridge's can run
        device.irq().raise_()
        assert os.eventfd_read(eventfd) == 1
    bridged.vmm.set_irq_eventfd(0, None)
    device.irq().raise_()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)
    os.close(eventfd)


# -- data --------------------------------------------------------------------------------------------------------------------


def draw(bridged: Bridged, rows: int, colour: int, fence: int = 0) -> None:
    for register, size, value in (
        (0x20, 4, 1024), (0x24, 4, rows), (0x30, 4, colour), (0x48, 8, fence), (0x50, 8, colour), (COMMAND, 4, FILL)
    ):  # fmt: skip
        bridged.vmm.region_write(0, register, size, value)


def test_state_of_many_mib_moves_while_the_device_draws(make: Make) -> None:
    here, there = (Display("dev0", {"vram": "4M"}) for _ in range(2))
    source, destination = make(serve(here)), make(serve(there))
    source.go("RUNNING")
    draw(source, 700, 0x112233)
    move(source, destination, lambda: draw(source, 7, 0x445566))
    assert here.streamed is not None
    assert there.streamed is not None
    assert here.streamed.digests() == there.streamed.digests()
    assert source.runtime.fingerprint() == destination.runtime.fingerprint()
    destination.go("RUNNING")
    assert destination.vmm.region_read(0, 0x40, 8) == 2
    source.go("RUNNING")  # given up after all: it goes on as if nothing had been


def test_short_reads_are_not_taken_for_the_end_of_what_another_server_gives(make: Make) -> None:
    data = bytes(range(200))
    there = Foreign()
    source, destination = make(foreign(Foreign(data, only=7))), make(foreign(there))
    source.go("RUNNING")
    move(source, destination)
    assert there.taken == data
    assert there.state == S.STOP


def test_data_that_did_not_come_to_its_end_is_not_applied(make: Make) -> None:
    there = Foreign()
    source, destination = make(foreign(Foreign(b"x" * 100))), make(foreign(there))
    destination.go("RESUMING")
    source.go("STOP_COPY")
    streamed = source.bridge.streamed
    assert streamed is not None
    first, left = streamed.read_chunk(16 + 64)
    assert left > 0
    destination.runtime.take_chunk(first)
    destination.runtime.stage(source.runtime.save_as(1))
    with pytest.raises(DeviceRefused, match="has not come to its end"):
        destination.runtime.apply()
    assert there.state == S.RESUMING  # the server was not asked to judge half of it


def test_a_chunk_that_is_missing_or_comes_after_the_end_is_refused(make: Make) -> None:
    source, destination = make(foreign(Foreign(b"x" * 100))), make(foreign(Foreign()))
    source.go("STOP_COPY")
    destination.go("RESUMING")
    streamed = source.bridge.streamed
    assert streamed is not None
    chunks = [streamed.read_chunk(16 + 40)[0] for _ in range(3)]
    for wrong in (chunks[1], b"", b"x" * 40):
        with pytest.raises(DeviceRefused, match="no chunk"):
            destination.runtime.take_chunk(wrong)
    for chunk in chunks:
        destination.runtime.take_chunk(chunk)
    with pytest.raises(DeviceRefused, match="no chunk"):
        destination.runtime.take_chunk(chunks[2])


def test_a_reset_by_the_guest_in_pre_copy_begins_the_data_anew(make: Make) -> None:
    here, there = (Display("dev0", {"vram": "4M"}) for _ in range(2))
    source, destination = make(serve(here)), make(serve(there))
    source.go("RUNNING")
    draw(source, 100, 0x112233)

    def reset() -> None:
        source.vmm.reset()
        draw(source, 3, 0x998877)

    move(source, destination, reset)
    assert here.streamed is not None
    assert there.streamed is not None
    assert here.streamed.digests() == there.streamed.digests()
    destination.go("RUNNING")
    assert destination.vmm.region_read(0, 0x40, 8) == 1


def test_what_a_server_does_not_take_is_told_with_its_errno(make: Make) -> None:
    source, destination = make(foreign(Foreign(b"no state of a uart"))), make(serve(Uart16550("dev0")))
    source.go("STOP_COPY")
    destination.go("RESUMING")
    with pytest.raises(DeviceRefused, match=r"does not take the state sent.*EINVAL") as told:
        carry(source, destination)
    assert told.value.device == "dev0"


# -- what it is --------------------------------------------------------------------------------------------------------------


def test_another_server_than_the_sources_is_refused_before_anything_stops(make: Make) -> None:
    uart, rtc = make(serve(Uart16550("dev0"))), make(serve(Rtc("dev0")))
    other = make(serve(Uart16550("dev0")), model="another")
    blob = uart.runtime.save_as(1)
    rtc.go("RESUMING")
    with pytest.raises(DeviceRefused, match="server_type 'uart16550', and here it is 'rtc'"):
        rtc.runtime.check_incoming(blob)
    with pytest.raises(DeviceRefused, match="model 'some', and here it is 'another'"):
        other.runtime.check_incoming(blob)


def test_a_schema_version_that_the_server_does_not_read_is_refused_before_anything_stops(make: Make) -> None:
    newer = make(serve(Uart16550("dev0")))
    device = Uart16550("dev0")
    from devices.kit.vfio_user import VfioUserBackend

    runtime = Runtime(device, max_version=1, moved_by="vfio-user")
    runtime.start()
    older = make(VfioUserBackend(device, runtime))
    with pytest.raises(DeviceRefused, match=r"writes uart16550 version \d, and the one here reads 1"):
        older.runtime.check_incoming(newer.runtime.save_as(1))
    newer.runtime.check_incoming(older.runtime.save_as(1))


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (lambda: foreign(None), "does not offer migration: MIGRATION is answered EINVAL"),
        (lambda: serve(Uart16550("dev0"), BUS), "lets somebody else move it: MIGRATION is answered EBUSY"),
    ],
)
def test_a_server_that_cannot_be_moved_runs_and_says_why_it_stays(
    make: Make, server: Callable[[], object], why: str
) -> None:
    bridged = make(server())
    bridged.go("RUNNING")
    bridged.vmm.region_write(0, 8 if bridged.upstream.info.irqs > 1 else 7, 1, 0x5A)
    assert why in bridged.bridge.obstacle()
    with pytest.raises(DeviceRefused, match=why):
        bridged.go("STOP")
    with pytest.raises(DeviceRefused, match=why):
        bridged.upstream.settle(incoming=True)


def test_the_preflight_gives_the_reason_of_every_participant_that_cannot_be_moved() -> None:
    from types import SimpleNamespace as Some

    members = [
        Some(id=name, entry={"tracker": ""}, info=Some(obstacle=why, opaque=False, tracker="none", disks=()))
        for name, why in (("a", ""), ("b", "its server is old"), ("c", "it is nailed down"))
    ]
    with pytest.raises(IncompatibleError) as told:
        check_source(Some(members=members, qemu=None))  # type: ignore[arg-type]
    assert [(reason.device, reason.reason) for reason in told.value.reasons()] == [
        ("b", "it cannot be moved: its server is old"),
        ("c", "it cannot be moved: it is nailed down"),
    ]


# -- dirty pages -------------------------------------------------------------------------------------------------------------

RAM = 1 << 20


def test_what_the_server_writes_is_collected_once_by_the_machines_pages(make: Make) -> None:
    bridged = make(serve(Display("dev0", {"vram": "4M"})))
    memory = create_memfd("ram", MIB)
    bridged.attach(memory, RAM, MIB)
    bridged.go("RUNNING")
    assert bridged.runtime.tracking.name == "log"
    draw(bridged, 1, 1, RAM + 3 * PAGE)
    bridged.runtime.start_tracking()
    assert bridged.dirty() == []
    draw(bridged, 1, 1, RAM + 5 * PAGE)
    draw(bridged, 1, 1, RAM + 9 * PAGE - 8)
    assert bridged.dirty() == [5, 8]
    assert bridged.dirty() == []
    bridged.go("PRE_COPY")
    draw(bridged, 1, 1, RAM + 7 * PAGE)
    bridged.go("STOP_COPY")
    assert bridged.dirty() == [7]
    os.close(memory)


def test_what_was_written_to_a_window_is_not_lost_with_it(make: Make) -> None:
    bridged = make(serve(Display("dev0", {"vram": "4M"})))
    memory = create_memfd("ram", MIB)
    bridged.attach(memory, RAM, MIB)
    bridged.go("RUNNING")
    bridged.runtime.start_tracking()
    draw(bridged, 1, 1, RAM + 5 * PAGE)
    bridged.vmm.dma_unmap(RAM, MIB)
    assert bridged.dirty() == [*range(MIB // PAGE)]  # up to the very end, of which no log can tell
    bridged.vmm.dma_map(RAM << 1, 8 * PAGE, memory, 16 * PAGE)  # another address, and a part of the memory
    draw(bridged, 1, 1, (RAM << 1) + 2 * PAGE)
    assert bridged.dirty() == [18]
    os.close(memory)


def test_a_log_by_larger_pages_marks_all_that_they_cover_within_the_window(make: Make) -> None:
    from devices.bridges.vfio_user import dma_log

    bridged = make(serve(Display("dev0", {"vram": "4M"})))
    memory = create_memfd("ram", MIB)
    bridged.attach(memory, RAM, 18 * PAGE)
    bridged.go("RUNNING")
    granted = bridged.upstream.migration.start_logging
    bridged.upstream.migration.start_logging = lambda _, ranges=(): granted(16 * PAGE, ranges)  # type: ignore[method-assign]
    bridged.runtime.start_tracking()
    assert isinstance(bridged.bridge.memory.tracker, dma_log.DmaLogTracker)
    draw(bridged, 1, 1, RAM + 17 * PAGE)
    assert bridged.dirty() == [16, 17]
    os.close(memory)


def test_only_the_servers_own_log_is_a_tracker_of_what_it_writes(make: Make) -> None:
    bridged = make(serve(Display("dev0", {"vram": "4M"})))
    with pytest.raises(TrackerError, match="its server is another"):
        Runtime(bridged.bridge, tracker="scan")
    assert Runtime(bridged.bridge, tracker="compare").tracking.name == "untracked"
    bridged.upstream.logs = False
    assert Runtime(bridged.bridge).tracking.name == "untracked"


# -- a server that hangs or dies -----------------------------------------------------------------------------------------------


def test_a_server_that_hangs_is_named_and_its_vmm_is_answered(make: Make) -> None:
    device = Uart16550("dev0")
    bridged = make(serve(device), name="uart7")
    bridged.go("RUNNING")
    bridged.upstream.client.timeout = 0.2
    bridged.upstream.client._set_timeout(0.2)
    with device.lock:
        with pytest.raises(
            DeviceTimeout, match=r"no answer to vfio-user DEVICE_FEATURE within 0.2 s"
        ) as told:
            bridged.go("STOP")
        assert told.value.device == "uart7"
        with pytest.raises(RequestRefused, match="EIO"):
            bridged.vmm.region_read(0, 7, 1)


def test_a_server_that_is_not_there_or_ends_at_once_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DeviceGone, match="its vfio-user server exited with 3") as told:
        Upstream.connect("nic0", str(tmp_path / "s"), lambda: "exited with 3")
    assert told.value.device == "nic0"


def test_a_server_that_stops_too_late_goes_on_when_its_machine_does(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop was given up, and has taken effect all the same."""
    monkeypatch.setattr("devices.bridges.vfio_user.upstream.SECONDS", 0.3)

    class Late(Foreign):
        late = True

        def set_state(self, state: int) -> None:
            if state == S.STOP and self.late:
                self.late = False
                time.sleep(0.5)
            super().set_state(state)

    server = Late()
    bridged = make(foreign(server))
    bridged.go("RUNNING")
    with pytest.raises(DeviceTimeout):
        bridged.go("STOP")
    assert bridged.bridge.state == "RUNNING_P2P"
    time.sleep(0.4)
    assert server.state == S.STOP
    bridged.go("RUNNING")
    assert server.state == S.RUNNING
    bridged.go("STOP")
    assert server.state == S.STOP


def test_a_server_that_starts_too_late_is_stopped_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start was given up, so the machine may run elsewhere by the time that it takes effect."""
    monkeypatch.setattr("devices.bridges.vfio_user.upstream.SECONDS", 0.3)

    class Late(Foreign):
        late = False

        def set_state(self, state: int) -> None:
            if state == S.RUNNING and self.late:
                time.sleep(0.5)
            super().set_state(state)

    server = Late()
    bridged = make(foreign(server))
    bridged.go("RUNNING")
    bridged.go("STOP")
    server.late = True
    with pytest.raises(DeviceTimeout):
        bridged.go("RUNNING")
    assert bridged.bridge.state == "STOP"
    time.sleep(0.4)
    assert server.state == S.STOP


def test_a_server_that_its_machine_has_left_does_not_run_when_it_comes_back_before_it_is_told_to(
    make: Make,
) -> None:
    server = Foreign()
    bridged = make(foreign(server))
    bridged.go("RUNNING")
    bridged.go("STOP_COPY")
    bridged.upstream.settle(incoming=True)
    assert server.state == S.STOP


def test_what_was_written_to_its_image_is_brought_to_its_storage_before_another_host_may_have_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache of this host would be written there later, over what the other host has written."""
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    bridged = make(foreign(Foreign()))
    bridged.bridge._image = image = Image(str(tmp_path / "disk.img"), read_only=False)
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    bridged.bridge.release_locks()
    assert flushed == [image._fd]

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(DeviceRefused, match="cannot be brought to its storage"):
        bridged.bridge.release_locks()
