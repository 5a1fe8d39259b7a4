"""The connection to a server that speaks vfio-user only: what it offers, its states, and its end.

vfio-user has no P2P states, so a way between two states here is that of migrate.state.lifecycle without them, one SET for each
that remains: what any server of VFIO's migration v2 understands.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

from devices.protocols.vfio_user.client import Client, RequestRefused
from devices.protocols.vfio_user.feature_messages import (
    GET,
    SET,
    Envelope,
    Feature,
    MigrationFlags,
    MigrationState,
    Remaining,
)
from devices.protocols.vfio_user.messages import DeviceFlags
from devices.protocols.vfio_user.migration_client import Migration
from migrate.errors import DeviceGone, DeviceRefused, FerryError, Phase
from migrate.state.lifecycle import DeviceState, path

log = logging.getLogger(__name__)

_S = DeviceState
#: Seconds for one call: less than the 5 that the VMM and the supervisor wait for us, so that the server is named and not we.
SECONDS: Final = 3.5
#: Seconds until a server listens that was started just now.
START_SECONDS: Final = 20.0
_RETRY: Final = 0.02
_P2P: Final = frozenset({_S.RUNNING_P2P, _S.PRE_COPY_P2P})
_STILL: Final = frozenset({_S.STOP, _S.STOP_COPY})
_SAVING: Final = frozenset({_S.PRE_COPY, _S.PRE_COPY_P2P, _S.STOP_COPY})
#: Where a session of reading or writing was left open by whoever had the server before.
_HALFWAY: Final = frozenset({_S.ERROR, _S.RESUMING})


class Upstream:
    """One server. Used from two threads (the VMM's accesses, the bus's calls), which take turns at the connection."""

    def __init__(self, device: str, client: Client) -> None:
        """Use `connect`."""
        self.device = device
        self.client = client
        self.migration = Migration(client)
        self.info = client.info()
        #: How it can be migrated; none where it cannot, and `obstacle` says why.
        self.flags = MigrationFlags(0)
        self.obstacle = ""
        try:
            self.flags = self.migration.flags()
        except RequestRefused as error:
            self.obstacle = (
                "its vfio-user server lets somebody else move it: MIGRATION is answered EBUSY"
                if error.errno == errno.EBUSY
                else f"its vfio-user server does not offer migration: MIGRATION is answered {_name(error.errno)}"
            )
        else:
            if not self.flags & MigrationFlags.STOP_COPY:
                self.obstacle = (
                    f"its vfio-user server offers migration without STOP_COPY (flags {self.flags:#x})"
                )
        self.envelope = self._ask_envelope()
        self.counts = not self.obstacle and self.migration.probe(Feature.REMAINING, GET)
        self.logs = all(
            self.migration.probe(feature, operation)
            for feature, operation in (
                (Feature.DMA_LOGGING_START, SET),
                (Feature.DMA_LOGGING_STOP, SET),
                (Feature.DMA_LOGGING_REPORT, GET),
            )
        )
        self._ending = threading.Event()

    @classmethod
    def connect(cls, device: str, socket: str, alive: Callable[[], str]) -> Upstream:
        """:param alive: how the process that should listen there ended; "" as long as it may yet.

        :raise DeviceGone, DeviceTimeout, DeviceRefused: nobody is there, it does not answer, or it speaks something else.
        """
        deadline = time.monotonic() + START_SECONDS
        while not os.path.exists(socket):
            why = alive()
            if why or time.monotonic() > deadline:
                raise DeviceGone(
                    f"its vfio-user server {why or f'does not listen at {socket}'}",
                    remedy="see its log, and how it is started",
                    phase=Phase.SETUP,
                    device=device,
                )
            time.sleep(_RETRY)
        client = Client.connect(socket, device=device, timeout=SECONDS, twin=True)
        try:
            return cls(device, client)
        except BaseException:
            client.close()
            raise

    def _ask_envelope(self) -> Envelope | None:
        try:
            return self.migration.envelope()
        except RequestRefused:
            return None

    @property
    def copies_ahead(self) -> bool:
        """Whether data is read of it while it runs. libvfio-user says PRE_COPY of every device, of some of which the data of then
        means nothing; and who is not told what is left cannot tell when there is enough of it."""
        return self.counts and bool(self.flags & MigrationFlags.PRE_COPY)

    @property
    def remaining(self) -> Remaining | None:
        """Bytes left of what is being read, where the server can tell."""
        if not self.counts:
            return None
        try:
            return self.migration.remaining()
        except RequestRefused:
            return None

    # -- states ---------------------------------------------------------------------------------------------------------------

    def state(self) -> DeviceState:
        return DeviceState[self.migration.state().name]

    def go(self, target: DeviceState, phase: Phase) -> None:
        """Step by step to `target`.

        :raise DeviceRefused: the server refused a step, and what it says of itself now. DeviceTimeout, DeviceGone.
        """
        if self.obstacle:
            raise self.refused(
                self.obstacle, "give this machine another server, or leave it where it is", phase
            )
        before = self.state()
        for step in path(before, target):
            if step in _P2P:
                continue
            try:
                self.migration.set_state(MigrationState[step.name])
            except RequestRefused as error:
                raise self.refused(
                    f"its vfio-user server refused to go from {before} to {step} ({_name(error.errno)}), "
                    f"and is in {self.state()}",
                    "see the server's log",
                    phase,
                ) from error
            before = step

    def take_back(self) -> None:
        """It was told to run, and nobody knows whether it does: it stops, at once or when it gets to it."""
        try:
            self.migration.set_state(MigrationState.STOP)
        except FerryError as error:
            log.warning("event=not-taken-back reason=%r", error.reason)

    def power_on(self) -> None:
        """Its state after power-on, wherever it was; a server that has no reset must have just been started."""
        if self.info.flags & DeviceFlags.RESET:
            if not self.obstacle and self.state() in _STILL:
                self.go(_S.RUNNING, Phase.SETUP)  # libvfio-user refuses a reset, and more, in these
            self.client.reset()
        elif not self.obstacle and self.state() in _HALFWAY:
            raise self.refused(
                f"its vfio-user server is in {self.state()} and has no reset", "start it again", Phase.SETUP
            )

    def settle(self, *, incoming: bool) -> None:
        """Out of whatever an earlier client left. One that runs is not stopped before its machine has begun: it has nothing to do,
        and libvfio-user refuses memory and interrupts to one that is in STOP.

        :param incoming: it waits for a state. One that was started for that is not made to run first: it would want its disk.
        """
        if self.obstacle:
            if incoming:
                raise self.refused(self.obstacle, "see which servers this host has", Phase.SETUP)
            return  # it cannot be stopped
        state = self.state()
        if state in _HALFWAY and not (incoming and state is _S.RESUMING):
            self.power_on()
        elif state in _SAVING or (state is _S.STOP and self.envelope is None and not incoming):
            # Of one that a machine has left, which comes back now: it still runs elsewhere.
            self.go(_S.STOP if incoming else _S.RUNNING, Phase.SETUP)

    # -- errors ---------------------------------------------------------------------------------------------------------------

    def refused(self, reason: str, remedy: str, phase: Phase) -> DeviceRefused:
        return DeviceRefused(reason, remedy=remedy, phase=phase, device=self.device)

    # -- the end --------------------------------------------------------------------------------------------------------------

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone`, on a thread of its own, when the server closes its end and nobody has closed ours."""
        fd = os.dup(self.client.fileno())
        # What comes is whoever's that calls; but a server without a twin socket may ask for memory here at any time.
        asks = 0 if self.client.server.twin_socket else select.POLLIN

        def wait() -> None:
            poll = select.poll()
            poll.register(fd, asks)
            try:
                # ValueError: whoever calls has given the connection up, and there is no descriptor any more.
                with contextlib.suppress(FerryError, OSError, ValueError):
                    while not any(event & ~select.POLLIN for _, event in poll.poll()):
                        self.client.serve()
            finally:
                os.close(fd)
                if not self._ending.is_set():
                    gone()

        threading.Thread(target=wait, name="watch", daemon=True).start()

    def close(self) -> None:
        self._ending.set()
        try:
            self.client.close()
        except (OSError, FerryError) as error:
            log.debug("event=close error=%s", error)


def _name(number: int) -> str:
    return errno.errorcode.get(number, str(number))
