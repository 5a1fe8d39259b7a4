"""A participant's states and its state, for a VMM that migrates it over vfio-user. What devices.protocols.vfio_user.backend
calls Migration.

It stands on the same Runtime as the bus does, so a move asked for here walks the same arcs of migrate.state.lifecycle. One of the
two moves a device, never both: see Runtime.moved_by. vfio-user has no P2P states (vfio-user.rst, VFIO_DEVICE_FEATURE_
MIG_DEVICE_STATE), so a VMM passes through them without seeing them, unless a device gets stuck there.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from devices.kit.migration_stream import LoadingStream, SavingStream
from devices.kit.runtime import VFIO_USER, Runtime
from devices.protocols.vfio_user.feature_messages import Envelope, MigrationFlags, MigrationState, Remaining
from devices.protocols.vfio_user.messages import RequestError, invalid, refused
from migrate.errors import FerryError
from migrate.state.lifecycle import PATHS, RESPONDING, SAVING_GROUP, DeviceState

log = logging.getLogger(__name__)

_S = DeviceState
#: Where a VMM may send a device; PRE_COPY only one that streams.
_TARGETS: Final = frozenset({_S.STOP, _S.RUNNING, _S.STOP_COPY, _S.RESUMING, _S.PRE_COPY})


class VfioMigration:
    """Every method is called with the participant's lock held."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._saving: SavingStream | None = None
        self._loading: LoadingStream | None = None
        self._version: int | None = None
        #: When it stopped, by the monotonic clock: what keeps time is told how long it stood still.
        self._stopped_at: int | None = None

    @property
    def offered(self) -> bool:
        return self._runtime.moved_by == VFIO_USER

    @property
    def flags(self) -> int:
        return MigrationFlags.STOP_COPY | (MigrationFlags.PRE_COPY if self._runtime.streams else 0)

    @property
    def state(self) -> int:
        return MigrationState[self._now.name]

    @property
    def _now(self) -> DeviceState:
        return self._runtime.participant.state

    # -- states ---------------------------------------------------------------------------------------------------------

    def set_state(self, state: int) -> None:
        """EINVAL: there is no such way, or the state that was loaded is not whole. EIO: the device failed underway."""
        target = self._target(state)
        before = self._now
        if (before, target) not in PATHS:
            raise invalid(f"a device cannot go from {before} to {target}")
        try:
            with self._blame(errno.EIO):
                if before is _S.RESUMING and target is not _S.RESUMING:
                    self._judge()
                self._runtime.set_state(target, {"stopped_ns": self._stopped_ns()})
                if self._now in SAVING_GROUP and self._saving is None:
                    self._begin_saving()
        finally:
            self._settle(before)

    def _target(self, state: int) -> DeviceState:
        try:
            target = DeviceState[MigrationState(state).name]
        except ValueError:
            raise invalid(f"there is no device state {state}") from None
        if target not in _TARGETS or (target is _S.PRE_COPY and not self._runtime.streams):
            raise invalid(f"a VMM does not send this device to {target}")
        return target

    def _judge(self) -> None:
        """The end of the way in: is what came whole, and does the device take it? (<linux/vfio.h>, RESUMING -> STOP)"""
        if self._loading is None or not self._loading.complete:
            raise invalid("the migration data has not come to its end")
        self._runtime.apply()

    def _settle(self, before: DeviceState) -> None:
        """A stream lasts as long as the device is where it belongs; a standstill, as long as it does not answer."""
        if self._now not in SAVING_GROUP:
            self._saving = None
        if self._now is not _S.RESUMING:
            self._loading = None
        if self._now in RESPONDING or self._now is _S.RESUMING or before is _S.RESUMING:
            self._stopped_at = None
        elif self._stopped_at is None:
            self._stopped_at = time.monotonic_ns()

    def _stopped_ns(self) -> int:
        return 0 if self._stopped_at is None else time.monotonic_ns() - self._stopped_at

    def reset(self) -> None:
        """To RUNNING, from wherever it is (vfio-user.rst: a reset is what leads out of ERROR, and what ends a RESUMING)."""
        before = self._now
        try:
            with self._blame(errno.EIO):
                self._runtime.reset_to_running()
        finally:
            self._saving = self._loading = None
            self._settle(before)

    def client_gone(self) -> None:
        """The state stays; what was read or written in part is of no use to the next client, so a session begins anew."""
        self._saving = self._loading = None
        streamed = self._runtime.participant.streamed
        try:
            if streamed is not None and self._now in SAVING_GROUP:
                streamed.begin()
            elif self._now is _S.RESUMING:
                self._runtime.begin_anew()
        except FerryError as error:
            # There is nobody to tell. The next client's first state or data is refused for the same reason.
            log.warning("event=session-lost state=%s reason=%r", self._now, error.reason)

    # -- data -----------------------------------------------------------------------------------------------------------

    def _begin_saving(self) -> SavingStream:
        saving = SavingStream(self._runtime, stopped=self._now is _S.STOP_COPY)
        if self._version is not None:
            saving.version = self._version
        saving.begin()
        self._saving = saving
        return saving

    def _save(self) -> SavingStream:
        if self._now not in SAVING_GROUP:
            raise invalid(f"nothing is read in {self._now}")
        return self._saving or self._begin_saving()

    def read(self, size: int) -> bytes:
        with self._blame(errno.EIO):
            saving = self._save()
            had_ended = saving.ended
            data = saving.read(size, stopped=self._now is _S.STOP_COPY)
            if saving.ended and not had_ended:
                # All is told, and the device is stopped: whoever loads it takes the locks, or it itself when it starts again.
                self._runtime.release_locks()
            return data

    def write(self, data: memoryview) -> None:
        if self._now is not _S.RESUMING:
            raise invalid(f"nothing is written in {self._now}")
        if self._loading is None:
            self._loading = LoadingStream(self._runtime)
        with self._blame(errno.EINVAL):
            self._loading.feed(data)

    def remaining(self) -> Remaining:
        with self._blame(errno.EIO):
            return Remaining(*self._save().remaining())

    # -- what it is -------------------------------------------------------------------------------------------------------

    def envelope(self) -> Envelope:
        form = self._runtime.format
        number = self._version or form.version.version
        return Envelope(
            self._runtime.participant.type,
            self._runtime.participant.id,
            number,
            tuple(form.readable),
            tuple(form.writable),
            form.digest(number),
        )

    def choose_version(self, version: int) -> None:
        if version not in self._runtime.format.writable:
            raise invalid(f"schema version {version} is not written here")
        self._version = version
        if self._saving is not None:
            self._saving.version = version

    @contextmanager
    def _blame(self, number: int) -> Iterator[None]:
        """The runtime's errors as the errno of a reply; the reason stays in this process's log."""
        try:
            yield
        except RequestError:
            raise
        except FerryError as error:
            log.warning("event=migration-refused state=%s reason=%r", self._now, error.reason)
            raise refused(number, error.reason) from error
