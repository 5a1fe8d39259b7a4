"""A VMM's side of vfio-user: what can be asked of a device. Used by the vCPU process and by tests.

Calls block, each with a deadline (connection.py), so a guest's accesses keep their order. Migration is migration_client.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from devices.protocols.vfio_user.connection import TIMEOUT, RequestRefused
from devices.protocols.vfio_user.framing import close_all
from devices.protocols.vfio_user.messages import (
    ACCESS,
    UNMAP_ALL,
    Buffer,
    Command,
    DeviceInfo,
    DmaFlags,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    IrqSet,
    RegionInfo,
    RequestError,
    SetIrqs,
    decode_data,
)
from devices.protocols.vfio_user.pipelining import Pipelining
from devices.protocols.vfio_user.region_messages import (
    REGION_INFO_ROOM,
    WRITES,
    IoEventfd,
    Write,
    decode_io_fds,
    decode_region,
    encode_io_fds_request,
    encode_writes,
)
from migrate.errors import DeviceRefused, FerryError

__all__ = ["TIMEOUT", "Client", "RequestRefused"]

_T = TypeVar("_T")


class Client(Pipelining):
    """One connection to one device. Calls may come from several threads; they take turns."""

    # -- calls ----------------------------------------------------------------------------------------------------------

    def info(self) -> DeviceInfo:
        """What the device has: numbers of regions and interrupts. Flags as DeviceFlags."""
        return DeviceInfo.decode(self._call(Command.DEVICE_GET_INFO, DeviceInfo().encode()))

    def region_info(self, index: int) -> RegionInfo:
        """Size in bytes and RegionFlags of one region."""
        return RegionInfo.decode(self._call(Command.DEVICE_GET_REGION_INFO, RegionInfo(index).encode()))

    def region_memory(self, index: int) -> tuple[int, int, tuple[tuple[int, int], ...]] | None:
        """What of a region can be mapped: descriptor (the caller's), offset in it, and the areas; no areas: all of it."""
        fds: list[int] = []
        request = RegionInfo(index).encode(argsz=REGION_INFO_ROOM)
        try:
            info, areas = self._decoded(
                decode_region, self._call(Command.DEVICE_GET_REGION_INFO, request, keep=fds)
            )
            return (fds.pop(0), info.offset, areas) if fds else None
        finally:
            close_all(fds)

    def io_fds(self, index: int) -> list[IoEventfd]:
        """Writes to a region that can be replaced by a signal; the descriptors are the caller's, one may stand in several."""
        size = self.region_info(index).size
        fds: list[int] = []
        reply = self._call(Command.DEVICE_GET_REGION_IO_FDS, encode_io_fds_request(index), keep=fds)
        try:
            found = self._decoded(lambda payload: decode_io_fds(payload, fds, size), reply)
        except DeviceRefused:
            close_all(fds)
            raise
        used = {one.fd for one in found}
        close_all([fd for fd in fds if fd not in used])
        return found

    def irq_info(self, index: int) -> IrqInfo:
        return IrqInfo.decode(self._call(Command.DEVICE_GET_IRQ_INFO, IrqInfo(index).encode()))

    def dma_map(
        self,
        address: int,
        size: int,
        fd: int,
        offset: int = 0,
        *,
        writable: bool = True,
        memory: Buffer | None = None,
    ) -> None:
        """Let the device reach `size` bytes of `fd` from `offset` on at guest physical `address`. `fd` stays the caller's.

        :param memory: the same bytes in this process, for a server that asks for them by messages all the same.
        """
        flags = DmaFlags.READ | DmaFlags.WRITE if writable else DmaFlags.READ
        if memory is None:
            self._call(Command.DMA_MAP, DmaMap(flags, offset, address, size).encode(), (fd,))
        else:
            self._map_shared(DmaMap(flags, offset, address, size), memoryview(memory).cast("B")[:size], (fd,))

    def dma_share(self, address: int, memory: Buffer, *, writable: bool = True) -> None:
        """The same for memory of this process that has no descriptor: the device asks for every access by a message.

        `memory` is whole pages and stays as it is until it is unmapped. Where the device may ask at any time, and not only
        within a call, connect with `twin`.
        """
        flags = DmaFlags.READ | DmaFlags.WRITE if writable else DmaFlags.READ
        view = memoryview(memory).cast("B")
        self._map_shared(DmaMap(flags, 0, address, len(view)), view, ())

    def _map_shared(self, window: DmaMap, view: memoryview, fds: Sequence[int]) -> None:
        # Before the device may ask for it; taken back if it does not want it, and not over what is there already.
        fresh = self.shared.add(window.address, view, writable=bool(window.flags & DmaFlags.WRITE))
        try:
            self._call(Command.DMA_MAP, window.encode(), fds)
        except FerryError:
            if fresh:
                self.shared.remove(window.address)
            raise

    def dma_unmap(self, address: int, size: int) -> None:
        """Take back a window, named exactly as it was given. The device holds no reference when this returns."""
        self._call(Command.DMA_UNMAP, DmaUnmap(0, address, size).encode())
        self.shared.remove(address)

    def dma_unmap_all(self) -> None:
        self._call(Command.DMA_UNMAP, DmaUnmap(UNMAP_ALL, 0, 0).encode())
        self.shared.clear()

    def region_read(self, region: int, offset: int, size: int) -> int:
        """A load of `size` bytes, little-endian."""
        return int.from_bytes(self.read_bytes(region, offset, size), "little")

    def region_write(self, region: int, offset: int, size: int, value: int) -> None:
        """A store of `size` bytes, little-endian; returns when the device has seen it."""
        self.write_bytes(region, offset, value.to_bytes(size, "little"))

    def read_bytes(self, region: int, offset: int, size: int) -> bytes:
        reply = self._call(Command.REGION_READ, ACCESS.pack(offset, region, size))
        data = decode_data(reply)[2]
        if len(data) != size:
            self._fail(f"a read of {size} bytes was answered with {len(data)}")
        return data

    def write_bytes(self, region: int, offset: int, data: Buffer) -> None:
        self._call(Command.REGION_WRITE, ACCESS.pack(offset, region, len(data)) + data)

    def read_many(self, accesses: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Loads of (region, offset, size), sent ahead of their replies and done in order.

        :raise RequestRefused: of the first that was refused; the others were done.
        """
        replies = self._calls(
            Command.REGION_READ, [ACCESS.pack(offset, region, size) for region, offset, size in accesses]
        )
        found = []
        for reply in replies:
            if isinstance(reply, RequestRefused):
                raise reply
            found.append(decode_data(reply)[2])
        return found

    def write_many(self, writes: Sequence[Write]) -> int:
        """Stores of up to 8 bytes in one message, done in order. How many were done: less than all if the device refused one.

        Where the device has not agreed to such messages, each goes in its own, sent ahead.
        """
        if self.server.write_multiple:
            reply = self._call(Command.REGION_WRITE_MULTI, encode_writes(writes))
            if len(reply) != WRITES.size:
                self._fail(f"a REGION_WRITE_MULTI was answered with {len(reply)} bytes")
            count: int = WRITES.unpack(reply)[0]
            return count
        replies = self._calls(
            Command.REGION_WRITE,
            [ACCESS.pack(offset, region, len(data)) + data for region, offset, data in writes],
        )
        return sum(not isinstance(reply, RequestRefused) for reply in replies)

    def post_bytes(self, region: int, offset: int, data: Buffer) -> None:
        """A store that is not waited for, and of which nobody learns that it failed. Later calls are done after it."""
        self._post(Command.REGION_WRITE, ACCESS.pack(offset, region, len(data)) + data)

    def set_irq_eventfd(self, index: int, eventfd: int | None, number: int = 0) -> None:
        """Have interrupt `number` of an index signalled through an eventfd (which stays the caller's), or with None no more."""
        irqs = IrqSet(SetIrqs.DATA_EVENTFD | SetIrqs.TRIGGER, index, number, 1)
        self._call(Command.DEVICE_SET_IRQS, irqs.encode(), () if eventfd is None else (eventfd,))

    def trigger_irq(self, index: int, number: int = 0) -> None:
        """Have the device raise an interrupt: a test of the way back."""
        irqs = IrqSet(SetIrqs.DATA_NONE | SetIrqs.TRIGGER, index, number, 1)
        self._call(Command.DEVICE_SET_IRQS, irqs.encode())

    def mask_irq(self, index: int, number: int = 0, *, masked: bool = True) -> None:
        """Hear nothing of an interrupt for a while: what is raised meanwhile is signalled once it is unmasked."""
        action = SetIrqs.MASK if masked else SetIrqs.UNMASK
        self._call(Command.DEVICE_SET_IRQS, IrqSet(SetIrqs.DATA_NONE | action, index, number, 1).encode())

    def disable_irqs(self, index: int) -> None:
        """All eventfds and masks of an index are taken away."""
        irqs = IrqSet(SetIrqs.DATA_NONE | SetIrqs.TRIGGER, index, 0, 0)
        self._call(Command.DEVICE_SET_IRQS, irqs.encode())

    def reset(self) -> None:
        self._call(Command.DEVICE_RESET)

    def _decoded(self, decode: Callable[[memoryview], _T], payload: memoryview) -> _T:
        """A reply that makes no sense ends the connection, and names the device."""
        try:
            return decode(payload)
        except RequestError as error:
            self._fail(error.reason)
