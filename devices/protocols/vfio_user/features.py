"""What a server answers to DEVICE_FEATURE, MIG_DATA_READ and MIG_DATA_WRITE. No I/O.

`_FEATURES` is the one list of features and of what can be done with each. Where the specification names no errno for what is
wrong, it is libvfio-user's: EINVAL. Only EBUSY is ours: the device can be migrated, and somebody else does it (docs/vfio-user.md).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from devices.protocols.vfio_user.backend import Backend, Migration
from devices.protocols.vfio_user.dma_log import DmaLog, choose_page_size
from devices.protocols.vfio_user.feature_messages import (
    FEATURE,
    GET,
    MIGRATION,
    PROBE,
    SET,
    Feature,
    FeatureRequest,
    LoggingReport,
    LoggingStart,
    decode_mig_data,
    decode_mig_read,
    decode_state,
    decode_version,
    encode_mig_data,
    encode_state,
)
from devices.protocols.vfio_user.framing import Message
from devices.protocols.vfio_user.messages import Buffer, Command, invalid, refused
from devices.protocols.vfio_user.peer import Peer

_FEATURES: Final[Mapping[int, int]] = {
    Feature.MIGRATION: GET,
    Feature.MIG_DEVICE_STATE: GET | SET,
    Feature.DMA_LOGGING_START: SET,
    Feature.DMA_LOGGING_STOP: SET,
    Feature.DMA_LOGGING_REPORT: GET,
    Feature.REMAINING: GET,
    Feature.ENVELOPE: GET | SET,
}
_LOGGING: Final = frozenset({Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT})
#: What may be read of a device that somebody else migrates.
_READABLE: Final = frozenset({Feature.MIG_DEVICE_STATE, Feature.ENVELOPE})


class Features:
    def __init__(
        self, backend: Backend, peer: Peer, windows: Callable[[], Iterable[tuple[int, int]]]
    ) -> None:
        """:param windows: address and size of every DMA window of this session."""
        self._backend = backend
        self._peer = peer
        self._windows = windows
        self._log: DmaLog | None = None
        self.handlers: Mapping[int, Callable[[Message], bytes]] = {
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._mig_read,
            Command.MIG_DATA_WRITE: self._mig_write,
        }

    def unmapped(self, address: int, size: int) -> None:
        if self._log is not None:
            self._log.forget(address, size)

    def release(self) -> None:
        """The client is gone: its log goes with it, the device's state stays."""
        self._stop_log()
        if self._backend.migration is not None and self._backend.migration.offered:
            self._backend.migration.client_gone()

    # -- DEVICE_FEATURE -----------------------------------------------------------------------------------------------------

    def _feature(self, message: Message) -> bytes:
        request = FeatureRequest.decode(message.payload)
        index, operations, data, room = request
        known = _FEATURES.get(index, 0)
        if not known or operations & ~PROBE & ~known:
            raise invalid(f"feature {index:#x} does not do {operations >> 16:#x} here")
        if index not in _LOGGING:
            self._require(index, operations)
        if room < len(message.payload):
            raise invalid(f"a DEVICE_FEATURE of {len(message.payload)} bytes with argsz {room}")
        if operations & PROBE:
            return bytes(message.payload)
        if operations == SET:
            return self._answer(request, self._set(index, data), echo=message.payload)
        return self._answer(request, self._get(index, data, room))

    def _require(self, index: int, operations: int) -> None:
        migration = self._backend.migration
        if migration is None:
            raise invalid(f"feature {index:#x}: this device cannot be migrated")
        if not migration.offered and not (index in _READABLE and operations == GET):
            raise refused(errno.EBUSY, "this device is migrated by its machine's supervisor, not by its VMM")

    @property
    def _migration(self) -> Migration:
        if self._backend.migration is None:
            raise invalid("this device cannot be migrated")
        return self._backend.migration

    @staticmethod
    def _answer(request: FeatureRequest, data: Buffer | None, *, echo: Buffer = b"") -> bytes:
        if data is None:
            return bytes(echo)
        size = FEATURE.size + len(data)
        if request.room < size:
            raise invalid(
                f"feature {request.feature:#x} has {size} bytes, and the client takes {request.room}"
            )
        return FEATURE.pack(size, request.feature | request.operations) + data

    def _get(self, index: int, data: Buffer, room: int) -> bytes:
        if index == Feature.DMA_LOGGING_REPORT:
            return self._report(LoggingReport.decode(data), room)
        if len(data):
            raise invalid(f"a GET of feature {index:#x} with {len(data)} bytes of data")
        if index == Feature.MIGRATION:
            return MIGRATION.pack(self._migration.flags)
        if index == Feature.MIG_DEVICE_STATE:
            return encode_state(self._migration.state)
        if index == Feature.REMAINING:
            return self._migration.remaining().encode()
        return self._migration.envelope().encode()

    def _set(self, index: int, data: Buffer) -> bytes | None:
        """None: the reply is the request."""
        if index == Feature.DMA_LOGGING_START:
            return self._start_log(LoggingStart.decode(data))
        if index == Feature.MIG_DEVICE_STATE:
            self._migration.set_state(decode_state(data))
        elif index == Feature.ENVELOPE:
            self._migration.choose_version(decode_version(data))
        else:
            if len(data):
                raise invalid(f"a DMA_LOGGING_STOP with {len(data)} bytes of data")
            self._stop_log()
        return None

    # -- the log of DMA -----------------------------------------------------------------------------------------------------

    def _start_log(self, start: LoggingStart) -> bytes:
        """All windows are logged whatever the ranges, as libvfio-user does: a report says which of it is wanted."""
        page_size = choose_page_size(start.page_size)
        if self._log is None:
            self._log = DmaLog(page_size)
            self._backend.log_dma(self._log)
        elif self._log.page_size != page_size:
            raise invalid(f"DMA is logged by pages of {self._log.page_size} bytes already")
        return start._replace(page_size=page_size).encode()

    def _stop_log(self) -> None:
        if self._log is not None:
            self._backend.log_dma(None)
            self._log = None

    def _report(self, report: LoggingReport, room: int) -> bytes:
        if self._log is None:
            raise invalid("DMA is not logged")
        # Before anything is forgotten: a report that does not arrive would be pages lost.
        if room < FEATURE.size + len(report.encode()) + report.bitmap_size:
            raise invalid(f"a bitmap of {report.bitmap_size} bytes, and the client takes {room} in all")
        at = report.iova
        for address, size in sorted(self._windows()):
            if address <= at < address + size:
                at = address + size
        if at < report.iova + report.length:
            raise refused(errno.ENOENT, f"nothing is mapped at {at:#x}")
        return report.encode() + self._log.report(report)

    # -- migration data -------------------------------------------------------------------------------------------------------

    def _mig_read(self, message: Message) -> bytes:
        size = decode_mig_read(message.payload)
        self._check_size(size)
        return encode_mig_data(self._migration.read(size))

    def _mig_write(self, message: Message) -> bytes:
        data = decode_mig_data(message.payload)
        self._check_size(len(data))
        self._migration.write(data)
        return b""

    def _check_size(self, size: int) -> None:
        if not self._migration.offered:
            raise refused(errno.EBUSY, "this device is migrated by its machine's supervisor, not by its VMM")
        if size > self._peer.most_data:
            raise invalid(f"{size} bytes of migration data, and {self._peer.most_data} were agreed on")
