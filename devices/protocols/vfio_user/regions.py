"""What a server answers about regions: what they are, access to them, and what a client may use in place of access. No I/O."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

from devices.protocols.vfio_user.backend import Backend, Window
from devices.protocols.vfio_user.framing import Message
from devices.protocols.vfio_user.messages import (
    ACCESS,
    Command,
    RegionFlags,
    RegionInfo,
    RequestError,
    decode_data,
    decode_read,
    invalid,
    refused,
)
from devices.protocols.vfio_user.peer import Peer
from devices.protocols.vfio_user.region_messages import (
    WRITES,
    decode_io_fds_request,
    decode_writes,
    encode_io_fds,
    encode_region,
    requested_room,
)


class Regions:
    def __init__(self, backend: Backend, peer: Peer) -> None:
        self._backend = backend
        self._peer = peer
        self.handlers: Mapping[int, Callable[[Message], bytes]] = {
            Command.DEVICE_GET_REGION_INFO: self._info,
            Command.DEVICE_GET_REGION_IO_FDS: self._io_fds,
            Command.REGION_READ: self._read,
            Command.REGION_WRITE: self._write,
            Command.REGION_WRITE_MULTI: self._write_many,
        }

    def _region(self, index: int) -> Window:
        if index >= len(self._backend.regions):
            raise invalid(f"there is no region {index}")
        return self._backend.regions[index]

    # -- access -----------------------------------------------------------------------------------------------------------

    def _read(self, message: Message) -> bytes:
        offset, index, count = decode_read(message.payload)
        region = self._region(index)
        if offset + count > region.size or not region.read:
            raise invalid(f"region {index} ({region.size} bytes) cannot be read at {offset:#x}+{count}")
        data = self._backend.region_read(index, offset, count) if count else b""
        return ACCESS.pack(offset, index, count) + data

    def _write(self, message: Message) -> bytes:
        offset, index, data = decode_data(message.payload)
        self._check_write(index, offset, len(data))
        if data:
            self._backend.region_write(index, offset, data)
        return ACCESS.pack(offset, index, len(data))

    def _check_write(self, index: int, offset: int, count: int) -> None:
        region = self._region(index)
        if offset + count > region.size or not region.write:
            raise invalid(f"region {index} ({region.size} bytes) cannot be written at {offset:#x}+{count}")

    def _write_many(self, message: Message) -> bytes:
        """All are checked before the first is done; where the device refuses one, those before it are done and counted."""
        if not self._peer.agreed.write_multiple:
            raise refused(errno.ENOTSUP, "REGION_WRITE_MULTI was not agreed on")
        writes = decode_writes(message.payload)
        for index, offset, data in writes:
            self._check_write(index, offset, len(data))
        done = 0
        for index, offset, data in writes:
            try:
                self._backend.region_write(index, offset, data)
            except RequestError:
                if done == 0:
                    raise
                break
            done += 1
        return WRITES.pack(done)

    # -- in place of access -------------------------------------------------------------------------------------------------

    def _info(self, message: Message) -> bytes:
        index = RegionInfo.decode(message.payload).index
        region = self._region(index)
        flags = (RegionFlags.READ if region.read else 0) | (RegionFlags.WRITE if region.write else 0)
        memory = self._backend.region_memory(index)
        reply, with_fd = encode_region(
            RegionInfo(index, flags, 0, region.size, 0), memory, requested_room(message.payload)
        )
        if with_fd and memory is not None:
            self._send([memory.fd])
        return reply

    def _io_fds(self, message: Message) -> bytes:
        index, room = decode_io_fds_request(message.payload)
        self._region(index)
        reply, fds = encode_io_fds(index, self._backend.io_fds(index), room)
        self._send(fds)
        return reply

    def _send(self, fds: list[int]) -> None:
        if len(fds) > self._peer.client.max_msg_fds:
            raise refused(
                errno.E2BIG, f"{len(fds)} descriptors for a client that takes {self._peer.client.max_msg_fds}"
            )
        for fd in fds:
            self._peer.out_fds.append(os.dup(fd))
