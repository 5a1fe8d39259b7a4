"""What a participant does when the bus says so: move between states, track memory, hand its state out and take one in.

Plain calls, one at a time, from one thread; no D-Bus and no asyncio (service.py has those). Every call holds the
participant's lock, the one that a VMM's accesses and the timers take, except while the pages of a chunk are copied.

The states are VFIO's migration v2, the ways between them `migrate.state.lifecycle`; what each arc does here is the table
`_ARCS`. An arc that fails leaves the participant where it was before that arc.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from devices.kit.participant import Participant
from devices.kit.state_format import StateFormat
from devices.kit.stream import MAX_CHUNK, Streamed, fingerprint
from devices.kit.tracking import Tracking
from migrate.errors import DeviceRefused, FerryError, Phase
from migrate.memory.memfd import read_sealed, sealed_bytes
from migrate.state.lifecycle import RESPONDING, SAVING_GROUP, DeviceState, parse, path

log = logging.getLogger(__name__)

_S = DeviceState
_STOPPED: Final = frozenset({_S.STOP, _S.STOP_COPY})
#: Who moves a participant between states and carries its state: its machine's supervisor, or a VMM (docs/vfio-user.md).
BUS: Final = "bus"
VFIO_USER: Final = "vfio-user"


class Runtime:
    """One participant, from start to end of its process."""

    def __init__(
        self,
        participant: Participant,
        *,
        tracker: str | None = None,
        max_version: int | None = None,
        moved_by: str = BUS,
    ) -> None:
        """
        :param tracker: "scan", "log", "compare" (by the coordinator: none here), or None for the best that works.
        :param max_version: behave as the release that had this version of the schema and knew no later one.
        :raise SchemaError: the type has no schema. TrackerError: the tracker wanted does not work here. UsageError: there
            is no such version.
        :param moved_by: BUS or VFIO_USER; the other one may look, and is refused what would change something.
        """
        self.participant = participant
        self.moved_by = moved_by
        self.format = StateFormat(participant.type, participant.id, max_version)
        self.tracking = Tracking(participant, tracker)
        self._staged: dict[str, Any] | None = None
        self._applied = False
        participant.state = _S.STOP
        participant._set_silent(True)

    @property
    def streams(self) -> bool:
        return self.participant.streamed is not None

    # -- states ---------------------------------------------------------------------------------------------------------

    def set_state(self, target: str, options: Mapping[str, Any] | None = None) -> str:
        """Walk to `target`, arc by arc; answers with the state reached. Options: stopped_ns, read where STOP is left.

        :raise DeviceRefused: there is no way, or a hook failed: it then stands at the last state that it reached.
        """
        wanted = parse(target)
        stopped_ns = _stopped_ns(options or {})
        participant = self.participant
        with participant.lock:
            if participant.state is _S.ERROR and participant.why_in_error:
                raise self._refused(
                    f"it is in ERROR: {participant.why_in_error}",
                    "mend that, then start the machine again",
                    Phase.RUNNING,
                )
            for following in path(participant.state, wanted):
                arc = (participant.state, following)
                with self._blame(
                    f"{arc[0]} to {arc[1]}", Phase.RESUME if following in RESPONDING else Phase.STOP
                ):
                    _ARCS[arc](self, stopped_ns)
                participant.state = following
            return participant.state

    def _enter_p2p(self, _: int) -> None:
        self.participant._set_active(False)
        try:
            self.participant.enter_p2p()
        except BaseException:
            self.participant._set_active(True)
            raise

    def _leave_p2p(self, _: int) -> None:
        self.participant.leave_p2p()
        self.participant._set_active(True)

    def _stop(self, _: int) -> None:
        self.participant.stop()
        self.participant._set_silent(True)

    def _start(self, stopped_ns: int) -> None:
        self.participant.start(stopped_ns)
        self.participant._set_silent(False)

    def _begin_saving(self, _: int) -> None:
        if self.participant.streamed is not None:
            self.participant.streamed.begin()

    def _end_saving(self, _: int) -> None:
        if self.participant.streamed is not None:
            self.participant.streamed.end()

    def _begin_resuming(self, _: int) -> None:
        self.participant.reset()
        self.participant._forget_edges()
        if self.participant.streamed is not None:
            self.participant.streamed.clear()
        self._staged, self._applied = None, False

    def _end_resuming(self, _: int) -> None:
        if not self._applied:
            raise self._refused("no state was applied", "stage and apply one, or end the process", Phase.LOAD)
        self._staged = None

    def reset_by_vmm(self) -> bool:
        """The guest resets the device. False where it may not be touched now. In ERROR it is what leads out, to STOP."""
        participant = self.participant
        with participant.lock:
            if participant.state not in RESPONDING and participant.state is not _S.ERROR:
                return False
            with self._blame("reset", Phase.RUNNING):
                participant.reset()
            participant._forget_edges()
            if participant.state is _S.ERROR:
                participant.why_in_error = ""
                participant.state = _S.STOP
            elif participant.streamed is not None and participant.state in SAVING_GROUP:
                participant.streamed.begin()
            return True

    def reset_to_running(self) -> None:
        """For a VMM that moves the device: power-on state and RUNNING, from every state (vfio-user.rst, ERROR).

        :raise DeviceRefused: a hook failed: it then stands where that left it.
        """
        participant = self.participant
        with participant.lock:
            with self._blame("reset", Phase.RUNNING):
                participant.reset()
            participant._forget_edges()
            if participant.state in SAVING_GROUP:
                self._end_saving(0)
            self._staged, self._applied, participant.why_in_error = None, False, ""
            participant.state = _AFTER_RESET.get(participant.state, participant.state)
            self.set_state(_S.RUNNING)

    def begin_anew(self) -> None:
        """In RESUMING: forget what came so far."""
        with self.participant.lock:
            self._require_resuming("a state is awaited")
            with self._blame("reset", Phase.LOAD):
                self._begin_resuming(0)

    # -- memory -----------------------------------------------------------------------------------------------------------

    def attach_memory(self, gpa: int, size: int, fd: int, offset: int) -> None:
        """Owns `fd`, also where it fails. :raise MemoryFault: see GuestMemory.attach."""
        participant = self.participant
        try:
            with participant.lock:
                if participant.memory.tracker is not None:
                    raise self._refused(
                        "memory cannot be added while it is tracked", "migrate again", Phase.PRECOPY
                    )
                region = participant.memory.attach(gpa, size, fd, offset)
                with self._blame("memory_attached", Phase.SETUP):
                    participant.memory_attached(region)
        finally:
            os.close(fd)

    def start_tracking(self) -> None:
        with self.participant.lock:
            self.tracking.start()

    def collect_dirty(self) -> tuple[int, int]:
        """A sealed memfd with a bit a page of attached memory, and how many are set. Get and clear."""
        with self.participant.lock:
            dirty = self.tracking.collect()
        return sealed_bytes(dirty.to_bytes(), "dirty"), dirty.count()

    def stop_tracking(self) -> None:
        with self.participant.lock:
            self.tracking.stop()

    # -- state out ---------------------------------------------------------------------------------------------------------

    def save_as(self, version: int) -> bytes:
        """The state as a blob. Changes nothing.

        :raise DeviceRefused: it does not write that version, or has no state to give now.
        """
        with self.participant.lock:
            return self.format.write(self._values(), version)

    def save(self) -> bytes:
        """For QEMU, which carries one blob and nothing beside it."""
        self._refuse_if_streamed(Phase.SAVE)
        return self.save_as(self.format.version.version)

    def fingerprint(self, version: int = 0) -> bytes:
        """SHA-256 over the canonical state and what is streamed.

        :param version: that the state is written in; 0: the newest.
        :raise DeviceRefused: not stopped.
        """
        participant = self.participant
        with participant.lock:
            if participant.state not in _STOPPED:
                raise self._refused(
                    f"a fingerprint in {participant.state} would be of a moving target",
                    "stop it first",
                    Phase.SAVE,
                )
            written = self.format.payload(self._values(), version or self.format.version.version)
            return fingerprint(written, participant.streamed)

    def _values(self) -> Mapping[str, Any]:
        if self.participant.state in (_S.ERROR, _S.RESUMING):
            raise self._refused(
                f"it has no state to give in {self.participant.state}", "see its log", Phase.SAVE
            )
        with self._blame("save", Phase.SAVE):
            return self.participant.save()

    # -- state in -----------------------------------------------------------------------------------------------------------

    def check_incoming(self, data: bytes) -> None:
        """Would this blob load here? Touches no state. :raise BlobError, DeviceRefused: why not."""
        with self.participant.lock:
            self._decode(data)

    def stage(self, data: bytes) -> None:
        """Validate and keep. A blob that is refused leaves what was kept before."""
        with self.participant.lock:
            self._require_resuming("a state can be staged")
            self._staged = self._decode(data)

    def apply(self) -> None:
        """Load what is kept. What goes wrong here puts the participant into ERROR.

        :raise DeviceRefused: nothing is kept, or it could not be loaded.
        """
        with self.participant.lock:
            self._require_resuming("a state can be applied")
            if self._staged is None:
                raise self._refused("there is no staged state to apply", "stage one first", Phase.LOAD)
            self._load(self._staged)
            self._applied = True

    def load(self, data: bytes) -> None:
        """For QEMU, which says neither before nor after that it loads: the state is taken over in one step.

        Where the device runs, it is stopped and started around that.
        """
        self._refuse_if_streamed(Phase.LOAD)
        participant = self.participant
        with participant.lock:
            before = participant.state
            if before in SAVING_GROUP or before is _S.ERROR:
                raise self._refused(
                    f"it takes no state in {before}", "end the migration that goes on first", Phase.LOAD
                )
            values = self._decode(data)
            if before is not _S.RESUMING:
                self.set_state(_S.STOP)
            self._load(values)
            if before is not _S.RESUMING:
                self.set_state(before)
            self._applied = True

    def _refuse_if_streamed(self, phase: Phase) -> None:
        if self.streams:
            raise self._refused(
                "it has state beside its blob, which QEMU's dbus-vmstate cannot carry",
                "migrate it by `ferry migrate`",
                phase,
            )

    def _decode(self, data: bytes) -> dict[str, Any]:
        values = self.format.read(data)
        with self._blame("check", Phase.LOAD):
            self.participant.check(values)
        return values

    def _load(self, values: dict[str, Any]) -> None:
        try:
            with self._blame("Apply", Phase.LOAD):
                self.participant.load(values)
        except FerryError as error:
            self.participant.why_in_error = error.reason
            self.participant.state = _S.ERROR
            raise

    def _require_resuming(self, what: str) -> None:
        if self.participant.state is not _S.RESUMING:
            raise self._refused(
                f"{what} in RESUMING only, not in {self.participant.state}",
                "see the supervisor's log",
                Phase.LOAD,
            )

    # -- streamed state -------------------------------------------------------------------------------------------------------

    def stream_read(self, max_bytes: int) -> tuple[int, int, int]:
        """A sealed memfd with some of the streamed state, its size, and the bytes left. Empty: nothing right now."""
        chunk, remaining = self._streamed(Phase.SAVE).read_chunk(max_bytes)
        return sealed_bytes(chunk, "chunk"), len(chunk), remaining

    def stream_write(self, fd: int, size: int) -> None:
        """Owns `fd`, also where it fails. :raise MemoryFault, DeviceRefused: not a whole, sealed chunk that fits."""
        try:
            with self.participant.lock:
                self._require_resuming("streamed state is taken")
                self.take_chunk(read_sealed(fd, size, limit=MAX_CHUNK))
        finally:
            os.close(fd)

    def take_chunk(self, chunk: bytes) -> None:
        """:raise DeviceRefused: it has no streamed state, does not wait for any, or this is no chunk that fits."""
        with self.participant.lock:
            self._require_resuming("streamed state is taken")
            self._streamed(Phase.LOAD).write_chunk(chunk)

    def _streamed(self, phase: Phase) -> Streamed:
        if self.participant.streamed is None:
            raise self._refused(
                f"a {self.participant.type} has no streamed state", "see its property Streams", phase
            )
        return self.participant.streamed

    def release_locks(self) -> None:
        """:raise DeviceRefused: it is not stopped."""
        with self.participant.lock:
            if self.participant.state not in (_S.STOP, _S.STOP_COPY):
                raise self._refused(
                    f"locks are released when stopped, not in {self.participant.state}",
                    "see the supervisor's log",
                    Phase.COMMIT,
                )
            with self._blame("release_locks", Phase.COMMIT):
                self.participant.release_locks()

    def serving(self) -> None:
        """:raise DeviceRefused: it does not do yet what its VMM has asked for."""
        with self.participant.lock:
            why = self.participant.not_serving()
        if why:
            raise self._refused(why, "see its log", Phase.RESUME)

    # -- the end --------------------------------------------------------------------------------------------------------------

    def finish(self, outcome: str) -> None:
        """The migration is over: "completed" or "aborted"."""
        if outcome not in ("completed", "aborted"):
            raise self._refused(
                f"a migration does not end as {outcome[:40]!r}", "completed or aborted", Phase.RUNNING
            )
        with self.participant.lock:
            self.stop_tracking()
            self._staged = None
            with self._blame("finish", Phase.RUNNING):
                self.participant.finish(outcome)

    def start(self) -> None:
        """RUNNING from a cold start: for a process that nobody will tell to run."""
        self.set_state(_S.RUNNING, {"stopped_ns": 0})

    # -- errors -----------------------------------------------------------------------------------------------------------------

    def _refused(self, reason: str, remedy: str, phase: Phase) -> DeviceRefused:
        return DeviceRefused(reason, remedy=remedy, phase=phase, device=self.participant.id)

    @contextmanager
    def _blame(self, what: str, phase: Phase) -> Iterator[None]:
        """Whatever the participant's own code raises becomes an error that names it; the traceback stays in its log."""
        try:
            yield
        except FerryError as error:
            error.device = error.device or self.participant.id
            raise
        except Exception as error:
            log.exception("event=failed what=%r", what)
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise self._refused(f"{what}: {text}", "see the log of its process", phase) from error


_ARCS: Final[Mapping[tuple[DeviceState, DeviceState], Callable[[Runtime, int], None]]] = {
    (_S.RUNNING, _S.RUNNING_P2P): Runtime._enter_p2p,
    (_S.RUNNING_P2P, _S.RUNNING): Runtime._leave_p2p,
    (_S.PRE_COPY, _S.PRE_COPY_P2P): Runtime._enter_p2p,
    (_S.PRE_COPY_P2P, _S.PRE_COPY): Runtime._leave_p2p,
    (_S.RUNNING_P2P, _S.STOP): Runtime._stop,
    (_S.PRE_COPY_P2P, _S.STOP_COPY): Runtime._stop,
    (_S.STOP, _S.RUNNING_P2P): Runtime._start,
    (_S.RUNNING, _S.PRE_COPY): Runtime._begin_saving,
    (_S.RUNNING_P2P, _S.PRE_COPY_P2P): Runtime._begin_saving,
    (_S.STOP, _S.STOP_COPY): Runtime._begin_saving,
    (_S.PRE_COPY, _S.RUNNING): Runtime._end_saving,
    (_S.PRE_COPY_P2P, _S.RUNNING_P2P): Runtime._end_saving,
    (_S.STOP_COPY, _S.STOP): Runtime._end_saving,
    (_S.STOP, _S.RESUMING): Runtime._begin_resuming,
    (_S.RESUMING, _S.STOP): Runtime._end_resuming,
}

#: Where a participant is by its hooks, once its state has been thrown away.
_AFTER_RESET: Final[Mapping[DeviceState, DeviceState]] = {
    _S.PRE_COPY: _S.RUNNING,
    _S.PRE_COPY_P2P: _S.RUNNING_P2P,
    _S.STOP_COPY: _S.STOP,
    _S.RESUMING: _S.STOP,
    _S.ERROR: _S.STOP,
}


def _stopped_ns(options: Mapping[str, Any]) -> int:
    unknown = options.keys() - {"stopped_ns"}
    value = options.get("stopped_ns", 0)
    if unknown or not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DeviceRefused(
            f"SetState takes the option stopped_ns, a number of nanoseconds; not {dict(options)!r:.80}",
            remedy="see docs/dbus/org.vmferry.Device1.xml",
        )
    return value
