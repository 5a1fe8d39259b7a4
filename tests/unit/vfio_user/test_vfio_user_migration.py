"""Real devices, moved by their VMM alone: the states, the data, the log, and what is left over when something ends early."""

from __future__ import annotations

import errno
import os
import random
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vfio_user_backend import open_descriptors

from devices.display import Display
from devices.kit.device import Device
from devices.kit.migration_stream import CHUNK, END, HEAD, STATE, SavingStream
from devices.kit.runtime import BUS, VFIO_USER, Runtime
from devices.kit.vfio_migration import VfioMigration
from devices.kit.vfio_user import VfioUserBackend
from devices.protocols.vfio_user.client import Client, RequestRefused
from devices.protocols.vfio_user.feature_messages import MigrationFlags, MigrationState
from devices.protocols.vfio_user.messages import RequestError
from devices.protocols.vfio_user.migration_client import Migration
from devices.protocols.vfio_user.server import Server
from devices.uart16550 import Uart16550
from migrate.memory.memfd import create_memfd
from migrate.state import blob, catalog
from migrate.state.lifecycle import PATHS, DeviceState

S = MigrationState
K, MIB = 1 << 10, 1 << 20
PAGE = 4 * K
RAM = 1 << 30


class Running:
    """A device with its server, in this process, and a VMM of its own."""

    def __init__(self, path: Path, device: Device, moved_by: str = VFIO_USER) -> None:
        self.device = device
        self.runtime = Runtime(device, tracker="log", moved_by=moved_by)
        self.runtime.start()
        self.path = str(path)
        self.server = Server(self.path, VfioUserBackend(device, self.runtime))
        self.server.start()
        self.connect()

    def connect(self) -> None:
        self.client = Client.connect(self.path, device=self.device.id)
        self.migration = Migration(self.client)

    def reconnect(self) -> None:
        self.client.close()
        self.connect()

    def refused(self, state: MigrationState) -> int:
        """The errno of a SET."""
        with pytest.raises(RequestRefused) as caught:
            self.migration.set_state(state)
        return caught.value.errno

    def fingerprint(self) -> bytes:
        return self.runtime.fingerprint()

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self.device.close()


class Many:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: list[Running] = []

    def device(self, device: Device, moved_by: str = VFIO_USER) -> Running:
        self.made.append(Running(self.directory / str(len(self.made)), device, moved_by))
        return self.made[-1]

    def uart(self) -> Running:
        return self.device(Uart16550("uart0", {}))

    def display(self, vram: str = "2M") -> Running:
        return self.device(Display("display0", {"vram": vram}))


@pytest.fixture
def running(short_dir: Path) -> Iterator[Many]:
    many = Many(short_dir)
    yield many
    for one in many.made:
        one.close()
        if one.device.streamed is not None:
            one.device.streamed.close()


def draw(vmm: Client, x: int, y: int, colour: int, w: int = 16, h: int = 16, *, fence: int = 0) -> None:
    for register, value in ((0x18, x), (0x1C, y), (0x20, w), (0x24, h), (0x30, colour)):
        vmm.region_write(0, register, 4, value)
    vmm.region_write(0, 0x48, 8, fence)
    vmm.region_write(0, 0x50, 8, 0x1122334455667788)
    vmm.region_write(0, 0x34, 4, 1)


def small(vmm: Client) -> None:
    """A frame buffer that fits into 2 MiB."""
    for register, value in ((0x08, 512), (0x0C, 512), (0x10, 2048)):
        vmm.region_write(0, register, 4, value)


# -- the machine of states -----------------------------------------------------------------------------------------------------

#: The direct arcs of vfio-user.rst, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, "Direct State Transitions", written down here again.
DIRECT = {
    S.RUNNING: {S.STOP, S.PRE_COPY},
    S.STOP: {S.RUNNING, S.STOP_COPY, S.RESUMING},
    S.STOP_COPY: {S.STOP},
    S.RESUMING: {S.STOP},
    S.PRE_COPY: {S.RUNNING, S.STOP_COPY},
}
SAVING = {S.PRE_COPY, S.STOP_COPY}


def way(start: MigrationState, target: MigrationState, *, pre_copy: bool) -> list[MigrationState] | None:
    """ "Select the shortest path. The path cannot have saving group states as interior arcs, only start/end states." """
    if (start, target) == (S.STOP_COPY, S.PRE_COPY) or (not pre_copy and S.PRE_COPY in (start, target)):
        return None
    queue: deque[list[MigrationState]] = deque([[start]])
    while queue:
        path = queue.popleft()
        if path[-1] is target:
            return path[1:]
        if len(path) > 1 and path[-1] in SAVING:
            continue
        queue += [[*path, step] for step in sorted(DIRECT[path[-1]]) if step not in path]
    return None


@pytest.mark.parametrize("start", DIRECT)
@pytest.mark.parametrize("target", DIRECT)
def test_the_lifecycle_without_p2p_is_vfio_users_for_every_pair(
    start: MigrationState, target: MigrationState
) -> None:
    ours = PATHS.get((DeviceState[start.name], DeviceState[target.name]))
    theirs = way(start, target, pre_copy=True)
    if theirs is None:
        assert ours is None
    else:
        assert ours is not None
        assert [S[state.name] for state in ours if "P2P" not in state] == theirs


class Recorder(Device):
    """A uart as far as its state goes, and remembers the arcs that it was led along."""

    type = "uart16550"
    lasting = Uart16550("uart0", {})

    def setup(self, options: Any) -> None:
        self.hooks: list[str] = []
        self.fail = ""

    def _hook(self, name: str) -> None:
        self.hooks.append(name)
        if self.fail == name:
            raise RuntimeError("told to fail")

    def enter_p2p(self) -> None:
        self._hook("enter_p2p")

    def stop(self) -> None:
        self._hook("stop")

    def start(self, stopped_ns: int) -> None:
        self.stopped_ns = stopped_ns
        self._hook("start")

    def leave_p2p(self) -> None:
        self._hook("leave_p2p")

    def reset(self) -> None:
        self._hook("reset")

    def save(self) -> dict[str, object]:
        return self.lasting.save()

    def load(self, state: Any) -> None:
        self._hook("load")


class StreamingRecorder(Recorder):
    streams = True

    def setup(self, options: Any) -> None:
        super().setup(options)
        self.stream(4 * PAGE)


#: What the device is told on each direct arc.
HOOKS = {
    (S.RUNNING, S.STOP): ["enter_p2p", "stop"],
    (S.STOP, S.RUNNING): ["start", "leave_p2p"],
    (S.PRE_COPY, S.STOP_COPY): ["enter_p2p", "stop"],
    (S.STOP, S.RESUMING): ["reset"],
}


@pytest.mark.parametrize("streams", [False, True])
@settings(max_examples=150)
@given(data=st.data())
def test_whatever_a_vmm_asks_for_in_whatever_order_walks_the_arcs_of_the_table_or_is_einval(
    streams: bool, data: st.DataObject
) -> None:
    device: Recorder = StreamingRecorder("uart0", {}) if streams else Recorder("uart0", {})
    runtime = Runtime(device, tracker="log", moved_by=VFIO_USER)
    runtime.start()
    migration = VfioMigration(runtime)
    source = Runtime(Uart16550("uart0", {}), tracker="log")
    stream = SavingStream(source, stopped=True)
    stream.begin()
    complete = stream.read(1 << 20, stopped=True)
    try:
        ask_at_random(migration, device, data, complete, streams)
    finally:
        if device.streamed is not None:
            device.streamed.close()


def ask_at_random(
    migration: VfioMigration, device: Recorder, data: st.DataObject, complete: bytes, streams: bool
) -> None:
    whole = False
    for _ in range(data.draw(st.integers(1, 12))):
        number = data.draw(st.sampled_from([*DIRECT, *DIRECT, *range(8), 8, 0xABCD, 2**32 - 1]))
        before, device.hooks = S(migration.state), []
        whole = before is S.RESUMING and (whole or data.draw(st.booleans()))
        if whole and not (migration._loading and migration._loading.complete):
            migration.write(memoryview(complete))
        target = S(number) if number < 8 else None
        path = None
        if target in DIRECT and target is not None:
            path = way(before, target, pre_copy=streams)
        incomplete = before is S.RESUMING and bool(path) and not whole
        try:
            migration.set_state(number)
        except RequestError as error:
            assert error.errno == errno.EINVAL
            assert path is None or incomplete
            assert migration.state == before
            assert device.hooks == []
        else:
            assert path is not None
            assert not incomplete
            assert migration.state == number
            arcs = zip([before, *path], path, strict=False)
            expected = ["load"] if before is S.RESUMING and path else []
            for arc in arcs:
                expected += HOOKS.get(arc, [])
            assert device.hooks == expected


def test_the_flags_say_pre_copy_only_where_the_device_streams(running: Many) -> None:
    uart, display = running.uart(), running.display()
    assert uart.migration.flags() == MigrationFlags.STOP_COPY
    assert display.migration.flags() == MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    assert uart.refused(S.PRE_COPY) == errno.EINVAL
    display.migration.set_state(S.PRE_COPY)
    assert display.migration.state() is S.PRE_COPY


def test_a_hook_that_fails_is_eio_and_the_device_stands_where_it_got(running: Many) -> None:
    recorder = Recorder("uart0", {})
    one = running.device(recorder)
    recorder.fail = "stop"
    assert one.refused(S.STOP_COPY) == errno.EIO
    assert one.migration.state() is S.RUNNING_P2P
    recorder.fail = ""
    one.migration.set_state(S.RUNNING)
    assert one.migration.state() is S.RUNNING


def test_what_keeps_time_is_told_how_long_it_stood(running: Many) -> None:
    recorder = Recorder("uart0", {})
    one = running.device(recorder)
    one.migration.set_state(S.STOP)
    time.sleep(0.05)
    one.migration.set_state(S.STOP_COPY)
    one.migration.set_state(S.RUNNING)
    assert 50_000_000 <= recorder.stopped_ns < 5_000_000_000
    one.migration.set_state(S.STOP)
    one.migration.set_state(S.RESUMING)
    one.client.reset()
    assert recorder.stopped_ns == 0


# -- who moves it ---------------------------------------------------------------------------------------------------------------


def test_a_device_of_a_supervisor_is_not_moved_by_its_vmm(running: Many) -> None:
    one = running.device(Uart16550("uart0", {}), BUS)
    assert one.refused(S.STOP) == errno.EBUSY
    with pytest.raises(RequestRefused, match="EBUSY"):
        one.migration.flags()
    with pytest.raises(RequestRefused, match="EBUSY"):
        one.migration.read()
    with pytest.raises(RequestRefused, match="EBUSY"):
        one.migration.write(b"x")
    with pytest.raises(RequestRefused, match="EBUSY"):
        one.migration.remaining()
    assert one.migration.state() is S.RUNNING
    assert one.migration.envelope().type == "uart16550"
    one.runtime.set_state("STOP")
    with pytest.raises(RequestRefused, match="EBUSY"):
        one.client.reset()


# -- state out and in -----------------------------------------------------------------------------------------------------------


def records(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(data):
        magic, kind, size = HEAD.unpack_from(data, at)
        assert magic == b"VMFR"
        found.append((kind, data[at + HEAD.size : at + HEAD.size + size]))
        at += HEAD.size + size
    assert at == len(data)
    return found


def move(source: Running, destination: Running, size: int = 1 << 20) -> bytes:
    """From wherever the source is to RUNNING at the destination. All that was carried."""
    carried = b""
    source.migration.set_state(S.STOP_COPY)
    destination.migration.set_state(S.RESUMING)
    while True:
        data = source.migration.read(size)
        destination.migration.write(data)
        carried += data
        if len(data) < size:
            break
    destination.migration.set_state(S.STOP)
    return carried


def test_a_uart_is_moved_and_its_data_is_a_blob_that_can_be_read(running: Many) -> None:
    source, destination = running.uart(), running.uart()
    source.client.region_write(0, 7, 1, 0x5A)
    carried = move(source, destination)
    assert destination.fingerprint() == source.fingerprint()
    (first, content), (last, _) = records(carried)
    assert (first, last) == (STATE, END)
    header = blob.header_of(content)
    assert (header.type, header.instance) == ("uart16550", "uart0")
    _, values = blob.read(content, catalog.load("uart16550"))
    assert values["scr"] == 0x5A if "scr" in values else True
    destination.migration.set_state(S.RUNNING)
    assert destination.client.region_read(0, 7, 1) == 0x5A


@pytest.mark.parametrize("size", [1, 7, 16, 17, 4096])
def test_the_size_of_a_read_means_nothing_to_the_data(running: Many, size: int) -> None:
    source, destination = running.uart(), running.uart()
    source.client.region_write(0, 7, 1, 0x5A)
    move(source, destination, size)
    assert destination.fingerprint() == source.fingerprint()


def test_a_display_is_moved_while_it_draws(running: Many) -> None:
    source, destination = running.display(), running.display()
    small(source.client)
    draw(source.client, 0, 0, 0xABCDEF, 512, 300)
    source.migration.set_state(S.PRE_COPY)
    destination.migration.set_state(S.RESUMING)
    at_first = source.migration.remaining()
    assert at_first.initial >= 300 * 2048
    assert at_first.dirty == 0
    carried = bytearray()
    for turn in range(4):
        for data in source.migration.read_all():
            carried += data
            destination.migration.write(data)
        assert source.migration.remaining()[:2] == (0, 0)
        draw(source.client, 16 * turn, 16 * turn, turn + 1)
        # The register of a copy changes what is in the blob after the first one was sent.
        source.client.region_write(0, 0x28, 4, turn)
    left = source.migration.remaining()
    assert left.initial == 0
    assert left.dirty >= 16 * PAGE // 2
    source.migration.set_state(S.STOP_COPY)
    last = b"".join(source.migration.read_all())
    assert abs(len(last) - left.stop_copy) < 4 * K
    carried += last
    destination.migration.write(last)
    destination.migration.set_state(S.STOP)
    assert destination.fingerprint() == source.fingerprint()
    kinds = [kind for kind, _ in records(bytes(carried))]
    assert kinds[0] == STATE
    assert kinds[-2:] == [STATE, END]
    assert set(kinds[1:-2]) == {CHUNK}
    assert source.migration.read() == b""
    assert source.migration.remaining() == (0, 0, 0)
    destination.migration.set_state(S.RUNNING)
    assert destination.client.region_read(0, 0x40, 8) == 5


def test_negative_control_a_source_that_draws_after_the_last_read_differs(running: Many) -> None:
    source, destination = running.display(), running.display()
    small(source.client)
    draw(source.client, 0, 0, 1)
    move(source, destination)
    source.migration.set_state(S.RUNNING)
    draw(source.client, 0, 0, 2)
    source.migration.set_state(S.STOP)
    assert destination.fingerprint() != source.fingerprint()


def test_a_source_that_gives_up_runs_on_and_can_begin_again(running: Many) -> None:
    source, destination = running.display(), running.display()
    small(source.client)
    draw(source.client, 0, 0, 1, 100, 100)
    source.migration.set_state(S.PRE_COPY)
    source.migration.read(100_000)
    source.migration.set_state(S.RUNNING)
    with pytest.raises(RequestRefused, match="EINVAL"):
        source.migration.read()
    with pytest.raises(RequestRefused, match="EINVAL"):
        source.migration.remaining()
    source.migration.set_state(S.PRE_COPY)
    move(source, destination)
    assert destination.fingerprint() == source.fingerprint()


def test_the_last_data_read_lets_go_of_locks_and_the_source_can_take_them_again(running: Many) -> None:
    class Locking(Recorder):
        released = 0

        def release_locks(self) -> None:
            self.released += 1

    device = Locking("uart0", {})
    one = running.device(device)
    one.migration.set_state(S.STOP_COPY)
    one.migration.read(10)
    assert device.released == 0
    list(one.migration.read_all())
    list(one.migration.read_all())
    assert device.released == 1
    one.migration.set_state(S.RUNNING)
    assert device.hooks[-2:] == ["start", "leave_p2p"]


def test_the_envelope_says_what_will_be_written_and_an_older_version_can_be_had(running: Many) -> None:
    one = running.uart()
    envelope = one.migration.envelope()
    schema = catalog.load("uart16550")
    assert envelope.version == schema.version
    assert envelope.digest == schema.at(schema.version).digest
    assert envelope.readable == tuple(schema.versions)
    oldest = min(envelope.writable)
    one.migration.write_version(oldest)
    assert one.migration.envelope().version == oldest
    assert one.migration.envelope().digest == schema.at(oldest).digest
    one.migration.set_state(S.STOP_COPY)
    (_, content), _ = records(b"".join(one.migration.read_all()))
    assert blob.header_of(content).version == oldest
    with pytest.raises(RequestRefused, match="EINVAL"):
        one.migration.write_version(999)


def test_data_is_read_and_written_only_where_it_belongs(running: Many) -> None:
    one = running.display()
    for state in (S.RUNNING, S.STOP, S.RESUMING):
        one.migration.set_state(state)
        with pytest.raises(RequestRefused, match="EINVAL"):
            one.migration.read(4)
        if state is not S.RESUMING:
            with pytest.raises(RequestRefused, match="EINVAL"):
                one.migration.write(b"VMFR")
    one.client.reset()
    for state in (S.PRE_COPY, S.STOP_COPY):
        one.migration.set_state(state)
        with pytest.raises(RequestRefused, match="EINVAL"):
            one.migration.write(b"VMFR")


def whole_state(running: Many) -> bytes:
    source = running.uart()
    source.migration.set_state(S.STOP_COPY)
    return b"".join(source.migration.read_all())


def spoiled(data: bytes) -> dict[str, bytes]:
    (_, content), (_, end) = records(data)

    def record(kind: int, content: bytes, magic: bytes = b"VMFR") -> bytes:
        return HEAD.pack(magic, kind, len(content)) + content

    flipped = bytearray(content)
    flipped[-1] ^= 1
    return {
        "another magic": record(STATE, content, b"VMFS"),
        "an unknown kind": record(4, content),
        "a blob that was damaged": record(STATE, bytes(flipped)),
        "a blob of another instance": record(STATE, content.replace(b"uart0", b"uart1")),
        "a size of 2**63": HEAD.pack(b"VMFR", STATE, 1 << 63),
        "an end before a state": record(END, struct.pack("<QI4x", 0, 0)),
        "a chunk for who has none": record(STATE, content) + record(CHUNK, bytes(64)),
        "an end that counts wrongly": record(STATE, content) + record(END, struct.pack("<QI4x", 2, 0)),
        "an end with another checksum": record(STATE, content)
        + record(END, end[:8] + bytes([end[8] ^ 1]) + end[9:]),
        "bytes after the end": data + b"x",
    }


@pytest.mark.parametrize(
    "what", [*spoiled(HEAD.pack(b"VMFR", 1, 5) + b"uart0" + HEAD.pack(b"VMFR", 3, 16) + bytes(16))]
)
def test_a_stream_that_was_spoiled_is_einval_at_once_and_until_a_reset(running: Many, what: str) -> None:
    data = whole_state(running)
    one = running.uart()
    one.migration.set_state(S.RESUMING)
    with pytest.raises(RequestRefused, match="EINVAL"):
        one.migration.write(spoiled(data)[what])
    with pytest.raises(RequestRefused, match="EINVAL"):
        one.migration.write(data)
    if what != "bytes after the end":
        assert one.refused(S.STOP) == errno.EINVAL
        assert one.migration.state() is S.RESUMING
    one.client.reset()
    assert one.migration.state() is S.RUNNING
    one.migration.set_state(S.RESUMING)
    one.migration.write(data)
    one.migration.set_state(S.RUNNING)


def test_a_stream_that_is_cut_anywhere_is_not_taken(running: Many) -> None:
    data = whole_state(running)
    one = running.uart()
    for cut in (0, 5, 16, 40, len(data) - 40, len(data) - 1):
        one.migration.set_state(S.RESUMING)
        one.migration.write(data[:cut])
        for target in (S.STOP, S.RUNNING, S.STOP_COPY):
            assert one.refused(target) == errno.EINVAL
        assert one.migration.state() is S.RESUMING
        one.client.reset()


def test_a_load_that_fails_is_error_and_only_a_reset_leads_out(running: Many) -> None:
    data = whole_state(running)
    recorder = Recorder("uart0", {})
    one = running.device(recorder)
    recorder.fail = "load"
    one.migration.set_state(S.RESUMING)
    one.migration.write(data)
    assert one.refused(S.STOP) == errno.EIO
    assert one.migration.state() is S.ERROR
    for target in S:
        assert one.refused(target) == errno.EINVAL
    recorder.fail = ""
    one.client.reset()
    assert one.migration.state() is S.RUNNING


@pytest.mark.parametrize("state", [S.STOP, S.RUNNING, S.STOP_COPY, S.RESUMING, S.PRE_COPY])
def test_a_reset_leads_to_running_from_every_state(running: Many, state: MigrationState) -> None:
    one = running.display()
    small(one.client)
    draw(one.client, 0, 0, 1)
    one.migration.set_state(state)
    if state in SAVING:
        one.migration.read(PAGE)
    one.client.reset()
    assert one.migration.state() is S.RUNNING
    assert one.device.streamed is not None
    assert not one.device.streamed.open
    assert one.client.region_read(0, 0x40, 8) == 0
    with pytest.raises(RequestRefused, match="EINVAL"):
        one.migration.read(4)
    small(one.client)
    draw(one.client, 0, 0, 2)
    assert one.client.region_read(0, 0x40, 8) == 1


# -- clients that go ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [S.PRE_COPY, S.STOP_COPY])
def test_a_client_that_vanishes_in_the_midst_of_reading_is_followed_by_one_that_reads_all(
    running: Many, state: MigrationState
) -> None:
    source, destination = running.display(), running.display()
    small(source.client)
    draw(source.client, 0, 0, 1, 100, 100)
    source.migration.set_state(state)
    source.migration.read(100_003)
    source.reconnect()
    assert source.migration.state() is state
    move(source, destination)
    assert destination.fingerprint() == source.fingerprint()


def test_a_client_that_vanishes_in_the_midst_of_writing_is_followed_by_one_that_writes_all(
    running: Many,
) -> None:
    source, destination = running.display(), running.display()
    small(source.client)
    draw(source.client, 0, 0, 1, 100, 100)
    source.migration.set_state(S.STOP_COPY)
    data = b"".join(source.migration.read_all())
    destination.migration.set_state(S.RESUMING)
    destination.migration.write(data[: len(data) // 2])
    destination.reconnect()
    assert destination.migration.state() is S.RESUMING
    destination.migration.write(data)
    destination.migration.set_state(S.STOP)
    assert destination.fingerprint() == source.fingerprint()


def test_no_descriptor_is_left_whatever_ends_early(running: Many) -> None:
    one = running.display()
    small(one.client)
    before = open_descriptors()
    memory = create_memfd("ram", MIB)
    for turn in range(4):
        one.client.dma_map(RAM, MIB, memory)
        one.migration.start_logging(PAGE)
        draw(one.client, 0, 0, turn, fence=RAM)
        one.client.dma_unmap(RAM, MIB)  # while it is logged
        one.client.dma_map(RAM, MIB, memory)
        one.migration.set_state(S.PRE_COPY)
        one.migration.read(PAGE)
        if turn % 2:
            one.client.reset()  # in PRE_COPY
            small(one.client)
        unsealed = os.memfd_create("x")
        os.ftruncate(unsealed, MIB)
        with pytest.raises(RequestRefused, match="EINVAL"):
            one.client.dma_map(2 * RAM, MIB, unsealed)
        with pytest.raises(RequestRefused, match="EINVAL"):
            one.client.dma_map(2 * RAM, 2 * MIB, memory)
        os.close(unsealed)
        one.reconnect()  # with a window, a log and a session
        one.migration.set_state(S.RUNNING)
    os.close(memory)
    after = open_descriptors()
    assert len(after) == len(before)


# -- the log of DMA, on a real device ---------------------------------------------------------------------------------------------


def bits(bitmap: bytes) -> set[int]:
    return {at for at in range(8 * len(bitmap)) if bitmap[at >> 3] >> (at & 7) & 1}


@pytest.mark.parametrize("way_there", ["descriptor", "messages", "attached"])
def test_every_page_that_a_device_writes_is_logged_and_no_other(running: Many, way_there: str) -> None:
    one = running.display()
    small(one.client)
    memory = create_memfd("ram", 16 * MIB)
    if way_there == "messages":
        one.client.dma_share(RAM, bytearray(16 * MIB))
    else:
        if way_there == "attached":
            one.runtime.attach_memory(RAM, 16 * MIB, os.dup(memory), 0)
            one.runtime.start_tracking()
        one.client.dma_map(RAM, 16 * MIB, memory)
    draw(one.client, 0, 0, 0, fence=RAM + 77 * PAGE)  # before the log
    assert one.migration.start_logging(PAGE) == PAGE
    chosen = set(random.Random(1).sample(range(4096), 60))
    for page in chosen:
        draw(one.client, 0, 0, page, fence=RAM + page * PAGE + 8)
    assert bits(one.migration.dirty(RAM, 16 * MIB, PAGE)) == chosen
    assert bits(one.migration.dirty(RAM, 16 * MIB, PAGE)) == set()
    for page in chosen:
        draw(one.client, 0, 0, page, fence=RAM + page * PAGE + 8)
    doubled = one.migration.dirty(RAM, 16 * MIB, 2 * PAGE)
    assert bits(doubled) == {page // 2 for page in chosen}
    for page in chosen:
        draw(one.client, 0, 0, page, fence=RAM + page * PAGE + 8)
    halved = one.migration.dirty(RAM, 16 * MIB, PAGE // 2)
    assert bits(halved) == {2 * page + half for page in chosen for half in (0, 1)}
    one.migration.stop_logging()
    draw(one.client, 0, 0, 0, fence=RAM)
    one.migration.start_logging(PAGE)
    assert bits(one.migration.dirty(RAM, 16 * MIB, PAGE)) == set()
    if way_there == "attached":
        # The tracker behind the bus has seen the same, and a report takes nothing from it.
        fd, count = one.runtime.collect_dirty()
        os.close(fd)
        assert count == len(chosen | {77, 0})
        one.runtime.stop_tracking()
    for region in one.device.memory.attached.regions:
        region.close()
    os.close(memory)


def test_memory_by_messages_is_refused_while_the_bus_tracks_and_the_other_way_round(running: Many) -> None:
    one = running.display()
    one.runtime.start_tracking()
    with pytest.raises(RequestRefused, match="EBUSY"):
        one.client.dma_share(RAM, bytearray(PAGE))
    one.runtime.stop_tracking()
    one.client.dma_share(RAM, bytearray(PAGE))
    with pytest.raises(Exception, match="not the machine's"):
        one.runtime.start_tracking()


def test_an_interrupt_that_is_masked_is_kept_and_signalled_once(running: Many) -> None:
    one = running.display()
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    one.client.set_irq_eventfd(0, eventfd)
    one.client.mask_irq(0)
    draw(one.client, 0, 0, 1)
    draw(one.client, 0, 0, 2)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)
    one.client.mask_irq(0, masked=False)
    assert os.eventfd_read(eventfd) == 1
    os.close(eventfd)
