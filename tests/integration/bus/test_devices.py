"""Participants and their clients: every method of docs/dbus, and finding who takes part."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from dbus_next import Message, MessageType, Variant
from dbus_next.aio import MessageBus

from migrate.bus import Bus, DeviceClient, Disk, PrivateBus, device_interfaces, discover
from migrate.bus.client import DEADLINES
from migrate.bus.device import DEVICE, MAX_BLOB, PATH, VMSTATE
from migrate.errors import BlobError, DeviceRefused, DeviceTimeout, Phase

OnBus = Callable[[Callable[[PrivateBus], Awaitable[Any]]], Any]


def memfd(content: bytes = b"") -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


class Lamp:
    """A participant that notes what it was asked and answers with what it was told to."""

    type = "lamp"
    schema_version = 2
    readable_versions = (1, 2)
    writable_versions = (2,)
    schema_digest = bytes(range(32))
    state = "RUNNING"
    tracker = "scan"
    streams = True
    obstacle = "it is screwed in"
    disks = (Disk("image", 1 << 40, False), Disk("boot", 512, True))

    def __init__(self, name: str) -> None:
        self.id = name
        self.blob = b"blob of " + name.encode()
        self.asked: list[Any] = []
        self.chunk = 3

    async def save(self) -> bytes:
        return self.blob

    async def load(self, data: bytes) -> None:
        self.asked.append(("load", data))

    async def attach_memory(self, gpa: int, size: int, memory: int, offset: int) -> None:
        self.asked.append(("attach", gpa, size, os.pread(memory, 100, 0), offset))
        os.close(memory)

    async def set_state(self, state: str, options: Mapping[str, Any]) -> str:
        self.asked.append(("state", state, dict(options)))
        return state

    async def start_tracking(self) -> None:
        self.asked.append("start")

    async def collect_dirty(self) -> tuple[int, int]:
        return memfd(b"\x05"), 2

    async def stop_tracking(self) -> None:
        self.asked.append("stop")

    async def save_as(self, version: int) -> bytes:
        return self.blob + bytes([version])

    async def check_incoming(self, data: bytes) -> None:
        raise BlobError("its brightness is 11 of 10", remedy="turn it down")

    async def stage(self, data: bytes) -> None:
        self.asked.append(("stage", data))

    async def apply(self) -> None:
        self.asked.append("apply")

    async def stream_read(self, max_bytes: int) -> tuple[int, int, int]:
        return memfd(b"abc"), self.chunk, 1 << 33

    async def stream_write(self, chunk: int, size: int) -> None:
        self.asked.append(("write", os.pread(chunk, 100, 0), size))
        os.close(chunk)

    async def fingerprint(self, version: int) -> bytes:
        return self.schema_digest

    async def serving(self) -> None:
        self.asked.append("serving")

    async def release_locks(self) -> None:
        self.asked.append("release locks")

    async def finish(self, outcome: str) -> None:
        self.asked.append(outcome)


async def plug_in(private: PrivateBus, lamp: Lamp, *names: str) -> Bus:
    bus = await Bus.connect(private.address)
    bus.export(PATH, *device_interfaces(lamp))
    for name in names or (DEVICE, VMSTATE):
        await bus.request_name(name, queue=True)
    return bus


async def foreign_helper(private: PrivateBus, properties: dict[str, Variant], silent: bool = False) -> Any:
    """A helper as QEMU knows them, by another implementation: org.qemu.VMState1 and nothing else."""
    bus = await MessageBus(bus_address=private.address).connect()

    def answer(call: Message) -> Message | bool:
        if call.message_type is not MessageType.METHOD_CALL:
            return False
        if silent:
            return True
        if call.member == "GetAll":
            return Message.new_method_return(call, "a{sv}", [properties])
        if call.member == "Save":
            return Message.new_method_return(call, "ay", [b"x" * 5])
        if call.member == "Load":
            return Message.new_error(
                call, "org.freedesktop.DBus.Error.Failed", f"cannot load {len(call.body[0])}"
            )
        return False

    bus.add_message_handler(answer)
    await bus.request_name(VMSTATE)
    return bus


async def unplug(*buses: Any) -> None:
    for bus in buses:
        if isinstance(bus, Bus):
            await bus.close()
        else:
            bus.disconnect()
            await bus.wait_for_disconnect()
            bus._sock.close()
            bus._stream.close()


def test_every_method_reaches_the_device_and_its_answer_comes_back(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        lamp = Lamp("lamp0")
        device, bus = await plug_in(private, lamp), await Bus.connect(private.address)
        client = (await discover(bus))["lamp0"]
        assert not client.opaque
        info = await client.info()
        assert (info.id, info.type, info.version, info.readable, info.writable) == (
            "lamp0",
            "lamp",
            2,
            (1, 2),
            (2,),
        )
        assert info.obstacle == "it is screwed in"
        assert (info.digest, info.state, info.tracker, info.streams) == (
            bytes(range(32)),
            "RUNNING",
            "scan",
            True,
        )
        assert info.disks == lamp.disks
        assert (info.pid, info.unique_name, info.opaque) == (os.getpid(), device.unique_name, False)
        await client.ping()
        assert await client.save() == b"blob of lamp0"
        assert await client.save_as(1) == b"blob of lamp0\x01"
        assert await client.fingerprint() == bytes(range(32))
        ours = memfd(b"memory")
        await client.attach_memory(1 << 40, 4096, ours, 8192)
        assert await client.set_state("STOP") == "STOP"
        assert await client.set_state("RUNNING", stopped_ns=1 << 40) == "RUNNING"
        await client.start_tracking()
        bitmap, pages = await client.collect_dirty()
        assert (os.pread(bitmap, 10, 0), pages) == (b"\x05", 2)
        await client.stop_tracking()
        await client.load(b"loaded")
        await client.stage(b"staged")
        await client.apply()
        chunk, size, remaining = await client.stream_read(4096)
        assert (os.pread(chunk, 10, 0), size, remaining) == (b"abc", 3, 1 << 33)
        await client.stream_write(ours, 6)
        await client.serving()
        await client.release_locks()
        await client.finish("aborted")
        assert lamp.asked == [
            ("attach", 1 << 40, 4096, b"memory", 8192),
            ("state", "STOP", {}),
            ("state", "RUNNING", {"stopped_ns": 1 << 40}),
            "start",
            "stop",
            ("load", b"loaded"),
            ("stage", b"staged"),
            "apply",
            ("write", b"memory", 6),
            "serving",
            "release locks",
            "aborted",
        ]
        with pytest.raises(BlobError, match=r"lamp0: its brightness is 11 of 10 \(turn it down\)") as caught:
            await client.check_incoming(b"x", phase=Phase.PREFLIGHT)
        assert (caught.value.device, caught.value.phase) == ("lamp0", "preflight")
        for fd in (ours, bitmap, chunk):
            os.close(fd)
        await unplug(device, bus)

    on_bus(scenario)


def test_every_method_has_a_deadline() -> None:
    lamp = Lamp("x")
    methods = {method.name for interface in device_interfaces(lamp) for method in interface.methods}
    assert methods <= set(DEADLINES)


def test_a_blob_over_one_mebibyte_is_refused_with_its_size_and_the_connection_lives(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        lamp = Lamp("lamp0")
        device, bus = await plug_in(private, lamp), await Bus.connect(private.address)
        client = DeviceClient(bus, device.unique_name, "lamp0")
        lamp.blob = bytes(MAX_BLOB + 1)
        for attempt in (
            client.save(),
            client.save_as(1),
            client.load(lamp.blob),
            client.stage(lamp.blob),
            client.check_incoming(lamp.blob),
        ):
            with pytest.raises(DeviceRefused, match=r"lamp0: a state of 1048\d\d\d bytes"):
                await attempt
        lamp.blob = bytes(MAX_BLOB)
        assert await client.save() == lamp.blob
        await client.stage(lamp.blob)
        await unplug(device, bus)

    on_bus(scenario)


def test_an_answer_that_breaks_a_promise_is_refused(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        lamp: Any = Lamp("lamp0")
        device, bus = await plug_in(private, lamp), await Bus.connect(private.address)
        client = DeviceClient(bus, device.unique_name, "lamp0")
        lamp.schema_digest = bytes(31)
        with pytest.raises(DeviceRefused, match="31 bytes"):
            await client.fingerprint()
        lamp.chunk = 5000
        with pytest.raises(DeviceRefused, match="5000 bytes where at most 4096"):
            await client.stream_read(4096)
        lamp.type = "x" * 300
        with pytest.raises(DeviceRefused, match="property Type"):
            await client.info()
        await unplug(device, bus)

    on_bus(scenario)


def test_all_participants_are_found_typed_opaque_and_those_qemu_must_not_see(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus = await Bus.connect(private.address)
        assert await discover(bus) == {}
        typed = await plug_in(private, Lamp("typed"))
        large = await plug_in(private, Lamp("large"), DEVICE)
        helper = await foreign_helper(private, {"Id": Variant("s", "helper")})
        found = await discover(bus)
        assert {name: client.opaque for name, client in found.items()} == {
            "typed": False,
            "large": False,
            "helper": True,
        }
        assert await found["helper"].save() == b"xxxxx"
        info = await found["helper"].info()
        assert (info.opaque, info.pid, info.type) == (True, os.getpid(), "")
        with pytest.raises(
            DeviceRefused, match=r"helper: cannot load 3 \(org.freedesktop.DBus.Error.Failed\)"
        ):
            await found["helper"].load(b"abc", phase=Phase.LOAD)
        with pytest.raises(DeviceRefused, match="cannot be asked to SetState"):
            await found["helper"].set_state("STOP")
        await unplug(large, helper)
        assert set(await discover(bus)) == {"typed"}
        await unplug(typed, bus)

    on_bus(scenario)


def test_a_process_that_ends_while_it_is_asked_is_left_out(
    on_bus: OnBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus, lamp = await Bus.connect(private.address), await plug_in(private, Lamp("stays"))
        owners = bus.queued_owners

        async def owners_of_a_moment_ago(name: str) -> list[str]:
            return [":1.999", *await owners(name)]

        monkeypatch.setattr(bus, "queued_owners", owners_of_a_moment_ago)
        assert set(await discover(bus)) == {"stays"}
        await unplug(lamp, bus)

    on_bus(scenario)


def test_two_processes_with_one_id_are_refused_and_both_named(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus = await Bus.connect(private.address)
        first, second = await plug_in(private, Lamp("same")), await plug_in(private, Lamp("same"))
        with pytest.raises(DeviceRefused) as caught:
            await discover(bus)
        for name in (first.unique_name, second.unique_name):
            assert f"process {os.getpid()} ({name})" in str(caught.value)
        await unplug(first, second, bus)

    on_bus(scenario)


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"Id": Variant("u", 7)},
        {"Id": Variant("s", "")},
        {"Id": Variant("s", "x" * 256)},
        {"Id": Variant("s", "é" * 128)},
        {"Id": Variant("s", "a\nb")},
    ],
)
def test_an_id_that_is_none_is_refused_and_its_process_named(
    on_bus: OnBus, properties: dict[str, Variant]
) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus = await Bus.connect(private.address)
        helper = await foreign_helper(private, properties)
        with pytest.raises(DeviceRefused, match=f"process {os.getpid()} .*an Id that is none"):
            await discover(bus)
        await unplug(helper, bus)

    on_bus(scenario)


def test_the_longest_id_is_one(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus = await Bus.connect(private.address)
        helper = await foreign_helper(private, {"Id": Variant("s", "é" * 127 + "x")})
        assert list(await discover(bus)) == ["é" * 127 + "x"]
        await unplug(helper, bus)

    on_bus(scenario)


def test_a_process_that_does_not_tell_its_id_is_named_by_its_pid_and_the_rest_does_not_wait(
    on_bus: OnBus,
) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus = await Bus.connect(private.address)
        lamps = [await plug_in(private, Lamp(f"lamp{number}")) for number in range(3)]
        hung = [await foreign_helper(private, {}, silent=True) for _ in range(3)]
        started = asyncio.get_running_loop().time()
        with pytest.raises(
            DeviceTimeout, match=rf"process {os.getpid()} \(:1\.\d+\) did not tell its Id within 0\.3 s"
        ):
            await discover(bus, timeout=0.3)
        assert asyncio.get_running_loop().time() - started < 0.8  # all at once, not one after another
        await unplug(*lamps, *hung, bus)

    on_bus(scenario)


def test_a_process_that_owns_the_name_but_offers_nothing_is_refused_by_pid(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus, stray = await Bus.connect(private.address), await Bus.connect(private.address)
        await stray.request_name(VMSTATE, queue=True)
        with pytest.raises(DeviceRefused, match=f"process {os.getpid()} .* did not tell its Id"):
            await discover(bus)
        await unplug(stray, bus)

    on_bus(scenario)
