"""A bridge before servers with the habits of libvfio-user's: what they refuse standing still, and what is not in their data."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from bridge_rig import Foreign, Make, carry, foreign, move
from vfio_user_backend import Area

from devices.protocols.vfio_user.feature_messages import MigrationFlags, MigrationState
from migrate.errors import DeviceRefused, MemoryFault
from migrate.memory.memfd import create_memfd

S = MigrationState
MIB, PAGE = 1 << 20, 4096
RAM = 1 << 20


class Strict(Foreign):
    """Takes neither memory nor interrupts while it stands still, has its state read once it does, and says that it has PRE_COPY."""

    flags = int(MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY)


def strict(migration: Strict, command: int = 0) -> object:
    """A PCI function whose configuration space is none of its migration data."""
    backend = foreign(migration)
    sizes = (8, 64, 0, 0, 0, 0, 0, 256, 0)
    backend.pci, backend.irqs = True, (1, 0, 0, 0, 0)
    backend.regions = tuple(Area(size, size > 0, size > 0) for size in sizes)
    backend.bytes = [bytearray(size) for size in sizes]
    backend.bytes[7][0:6] = b"\x34\x12\x78\x56" + bytes((command, 0))
    mapped, connected = backend.dma_map, backend.connect_irq

    def unless_still(call: Callable[..., None]) -> Callable[..., None]:
        def refuse(*arguments: object) -> None:
            from devices.protocols.vfio_user.messages import invalid

            if (
                migration.state in (S.STOP, S.STOP_COPY) and arguments[-1] is not None
            ):  # the end of a client is not refused
                raise invalid("not while it stands still")
            call(*arguments)

        return refuse

    backend.dma_map, backend.connect_irq = unless_still(mapped), unless_still(connected)
    return backend


def test_a_server_that_takes_nothing_while_it_stands_still_is_set_up_before_its_machine_runs(
    make: Make,
) -> None:
    bridged = make(strict(Strict()))
    memory = create_memfd("ram", MIB)
    bridged.attach(memory, RAM, MIB)
    eventfd = os.eventfd(0)
    bridged.vmm.set_irq_eventfd(0, eventfd, 0)
    for state in ("RUNNING", "STOP", "RUNNING"):
        bridged.go(state)
    os.close(memory)
    os.close(eventfd)


def test_nothing_is_read_while_it_runs_of_a_server_that_does_not_tell_what_is_left(make: Make) -> None:
    server = Strict(b"whole state")
    source, destination = make(strict(server)), make(strict(taken := Strict()))
    source.upstream.counts = False  # the server here is ours, and can
    source.go("RUNNING")
    move(source, destination)
    assert "PRE_COPY" not in server.seen
    assert taken.taken == b"whole state"


def test_a_machine_that_has_never_run_has_its_server_stopped_to_be_read(make: Make) -> None:
    server = Strict(b"whole state")
    source, destination = make(strict(server)), make(strict(taken := Strict()))
    destination.go("RESUMING")
    source.go("STOP_COPY")
    assert server.seen == ["STOP", "STOP_COPY"]
    carry(source, destination)
    assert taken.taken == b"whole state"


def test_what_a_guest_wrote_into_the_configuration_space_is_put_back(make: Make) -> None:
    source, destination = make(strict(Strict())), make(strict(Strict()))
    source.go("RUNNING")
    for offset, size, value in ((0x10, 4, 0xD000_0000), (0x3C, 1, 11), (0x04, 2, 0x0006)):
        source.vmm.region_write(7, offset, size, value)
    move(source, destination)
    destination.go("RUNNING")
    assert destination.vmm.read_bytes(7, 0, 256) == source.bridge.save()["config"]
    assert destination.vmm.region_read(7, 0x04, 2) == 0x0006
    assert destination.vmm.region_read(7, 0x10, 4) == 0xD000_0000


def test_another_pci_function_is_refused_before_anything_stops(make: Make) -> None:
    source, destination = make(strict(Strict())), make(other := strict(Strict()))
    blob = source.runtime.save_as(2)
    destination.runtime.check_incoming(blob)
    source._backend.bytes[7][0] = 0x99
    source.go("RUNNING")
    destination.go("RESUMING")
    with pytest.raises(
        DeviceRefused, match="of another PCI function: vendor 0x1299 where this one has 0x1234"
    ):
        destination.runtime.check_incoming(source.runtime.save_as(2))
    plain = make(foreign(Foreign()))
    with pytest.raises(DeviceRefused, match="has 256 bytes of configuration space, and here there are 0"):
        plain.runtime.check_incoming(blob)
    assert other is destination._backend


def test_what_a_server_has_written_by_messages_is_in_the_log_and_what_it_reads_is_the_guests(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has descriptors: vfu_sgl_write does so, and leaves the log to whoever writes."""
    from devices.protocols.vfio_user import client_link

    links: list[client_link.ClientLink] = []
    made = client_link.ClientLink.__init__

    def keep(self: client_link.ClientLink, *arguments: object) -> None:
        made(self, *arguments)  # type: ignore[arg-type]
        links.append(self)

    monkeypatch.setattr(client_link.ClientLink, "__init__", keep)
    bridged = make(strict(Strict()))
    memory = create_memfd("ram", MIB)
    bridged.attach(memory, RAM, MIB)
    bridged.go("RUNNING")
    server = client_link.ClientMemory(links[0], 1 << 20)
    server.write(RAM + PAGE, b"before")
    bridged.runtime.start_tracking()
    server.write(RAM + 3 * PAGE - 2, b"both")
    assert server.read(RAM + PAGE, 6) == b"before"
    assert os.pread(memory, 4, 3 * PAGE - 2) == b"both"
    assert bridged.dirty() == [2, 3]
    assert bridged.dirty() == []
    with pytest.raises(MemoryFault, match="refused"):
        server.write(RAM + MIB - 2, b"over")
    bridged.go("STOP")  # from here on memory is collected a last time
    with pytest.raises(MemoryFault, match="refused"):
        server.write(RAM + PAGE, b"late")
    assert os.pread(memory, 6, PAGE) == b"before"
    bridged.go("RUNNING")
    server.write(RAM + PAGE, b"late")
    assert os.pread(memory, 6, PAGE) == b"latere"
    bridged.vmm.dma_unmap(RAM, MIB)
    with pytest.raises(MemoryFault, match="refused"):
        server.read(RAM, 4)
    os.close(memory)
