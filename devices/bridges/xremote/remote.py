"""QEMU's process of the type `x-remote`: run, stopped, saved, loaded, ended; and made anew where a state is awaited.

QEMU 7.2, tried: one that has been told `migrate` is in `postmigrate`, from where `cont` leads on and a second `migrate` does not.
One that waits for a stream (`-incoming`) and gets what is none ends.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from devices.bridges.qemu.monitor import Monitor
from devices.bridges.qemu.process import Process
from devices.bridges.xremote import command
from devices.bridges.xremote.requests import EVENTS, Requests
from devices.protocols.mpqemu.client import Client
from migrate.errors import DeviceError, DeviceGone, DeviceRefused, DeviceTimeout, Phase

log = logging.getLogger(__name__)

#: Seconds for one call, and for QEMU to write or to read its state: less than whoever waits for us does.
SECONDS: Final = 3.5
_POLL: Final = 0.001
_STREAM: Final = "ferry-stream"
#: What `query-migrate` says of a save that has not come to an end (qapi/migration.json, MigrationStatus).
_GOES_ON: Final = ("setup", "active", "device", "pre-switchover", "cancelling")


class Remote:
    """One QEMU at a time. Its methods are called with the participant's lock held."""

    def __init__(
        self, device: str, words: Sequence[str], monitor: str, log_path: Path, on_end: Callable[[str], None]
    ) -> None:
        """:param words: of its model. :param monitor: where its monitor listens.
        :param on_end: it ended, how, and nobody asked it to; on a thread of its own."""
        self.device = device
        self._words = words
        self._path = monitor
        self._log_path = log_path
        self._on_end = on_end
        self._process: Process | None = None
        self._monitor: Monitor | None = None
        self._client: Client | None = None
        self._requests: Requests | None = None
        #: It waits for a state, and has not got any yet.
        self.waiting = False
        self._loading = threading.Event()
        #: Whether it tells what is under way.
        self.traced = False

    # -- its life -----------------------------------------------------------------------------------------------------------

    def start(self, *, incoming: bool) -> None:
        """In place of one that is there. It stands still, or waits for a state.

        :raise DeviceGone, DeviceTimeout, DeviceRefused: it does not come up.
        """
        self.end()
        Path(self._path).unlink(missing_ok=True)
        self._loading.clear()
        ours, theirs = socket.socketpair()
        self._client = Client(ours, self.device, SECONDS)
        self._requests = requests = Requests()
        try:
            words = command.build(
                self._words, self.device, self._path, theirs.fileno(), requests.pipe, incoming=incoming
            )
            self._process = process = Process(
                self.device,
                words,
                self._log_path,
                [theirs.fileno(), requests.pipe],
                self._ended,
                remedy="see --serve in host.toml",
            )
        finally:
            theirs.close()
            requests.inherited()
        self._monitor = Monitor(self.device, lambda *_: None, lambda: None)
        try:
            self._monitor.connect(self._path, alive=lambda: process.alive)
        except DeviceGone as error:
            raise self._told(error) from None
        # An answer, besides, means that its main loop runs: a message to the device before that is undone by QEMU's first reset.
        states = self._monitor.execute("trace-event-get-state", {"name": "scsi_req_*"}, phase=Phase.SETUP)
        enabled = {one["name"] for one in states if one["state"] == "enabled"}
        self.traced = enabled.issuperset(EVENTS)
        if incoming:
            # Or QEMU would take the image over while the other side may still go on with it.
            late = [{"capability": "late-block-activate", "state": True}]
            self._execute("migrate-set-capabilities", {"capabilities": late}, Phase.SETUP)
        self.waiting = incoming

    def end(self) -> None:
        if self._process is not None:
            self._process.end()
        if self._monitor is not None:
            self._monitor.close()
        if self._client is not None:
            self._client.close()
        if self._requests is not None:
            self._requests.close()
        self._process = self._monitor = self._client = self._requests = None

    def _ended(self) -> None:
        if not self._loading.is_set():
            self._on_end(self.obituary())

    def obituary(self) -> str:
        """How it ended, and its last words; "" while it lives."""
        process = self._process
        if process is None or (status := process.status) is None:
            return ""
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        return f"QEMU {how}: {process.last_words() or 'it said nothing'}"

    @property
    def client(self) -> Client:
        if self._client is None:
            raise self._refused("there is no QEMU", "start the machine again", Phase.RUNNING)
        return self._client

    # -- what it does -------------------------------------------------------------------------------------------------------

    def version(self) -> str:
        return "{major}.{minor}.{micro}".format(**self._execute("query-version", None, Phase.SETUP)["qemu"])

    def under_way(self) -> int:
        """SCSI requests, as of its last answer. :raise DeviceRefused: nobody knows."""
        if self._requests is None or not self.traced:
            raise self._refused(
                "its QEMU does not tell which SCSI requests are under way: it was built without a trace",
                "use a QEMU with the trace backend log",
                Phase.STOP,
            )
        return self._requests.under_way()

    def run(self, phase: Phase) -> None:
        """It has its image from here on."""
        self._execute("cont", None, phase)
        if (state := self.state(phase)) != "running":
            raise self._refused(f"its QEMU was told to run and is {state}", "see its log", phase)

    def stop(self) -> None:
        self._execute("stop", None, Phase.STOP)
        if (state := self.state(Phase.STOP)) == "running":
            raise self._refused(f"its QEMU was told to stop and is {state}", "see its log", Phase.STOP)

    def save(self, fd: int) -> None:
        """Its whole state to a file. It stands still, has let go of its image, and cannot do this again before it has run."""
        try:
            self._migrate("migrate", fd, Phase.SAVE)
        except DeviceError:
            self._cancel()
            raise

    def _cancel(self) -> None:
        """Or what goes on would end by stopping a QEMU that has been told to run by then, and take its image from it."""
        try:
            self._execute("migrate_cancel", None, Phase.SAVE)
            deadline = time.monotonic() + SECONDS
            while self._execute("query-migrate", None, Phase.SAVE).get("status") in _GOES_ON:
                if time.monotonic() > deadline:
                    log.error("event=save-goes-on")
                    return
                time.sleep(_POLL)
        except DeviceError as error:
            log.warning("event=not-cancelled reason=%r", error.reason)

    def load(self, fd: int) -> None:
        """A state from a file that is at its beginning; it stands still then.

        :raise DeviceRefused: with QEMU's words: it is none, or another device's. That QEMU has ended.
        """
        self._loading.set()
        self.waiting = False
        try:
            self._migrate("migrate-incoming", fd, Phase.LOAD)
        except DeviceError as error:
            if self._process is not None:
                self._process.wait(1.0)
            raise self._refused(
                f"its QEMU does not take the state sent: {self.obituary() or error.reason}",
                "start the same QEMU with the same device on both hosts",
                Phase.LOAD,
            ) from None
        self._loading.clear()

    def _migrate(self, word: str, fd: int, phase: Phase) -> None:
        assert self._monitor is not None
        self._monitor.give(_STREAM, fd, seconds=SECONDS, phase=phase)
        self._execute(word, {"uri": f"fd:{_STREAM}"}, phase)
        deadline = time.monotonic() + SECONDS
        while (found := self._execute("query-migrate", None, phase)).get("status") != "completed":
            if found.get("status") in ("failed", "cancelled"):
                why = found.get("error-desc", "it gives no reason")
                raise self._refused(f"its QEMU failed at {word}: {why}", "see its log", phase)
            if time.monotonic() > deadline:
                raise DeviceTimeout(
                    f"its QEMU has not done {word} within {SECONDS:g} s",
                    device=self.device,
                    phase=phase,
                    remedy="see its log",
                )
            time.sleep(_POLL)

    def state(self, phase: Phase) -> str:
        """Its runstate, in its own words."""
        return str(self._execute("query-status", None, phase)["status"])

    def _execute(self, word: str, arguments: dict[str, Any] | None, phase: Phase) -> dict[str, Any]:
        if self._monitor is None:
            raise self._refused("there is no QEMU", "start the machine again", phase)
        try:
            found: dict[str, Any] = self._monitor.execute(word, arguments, seconds=SECONDS, phase=phase)
        except DeviceGone as error:
            raise self._told(error) from None
        return found

    def _told(self, error: DeviceGone) -> DeviceGone:
        """With how it ended, where it has."""
        if self._process is not None:
            self._process.wait(0.2)
        return DeviceGone(
            self.obituary() or error.reason,
            device=self.device,
            phase=error.phase,
            remedy=f"see {self._log_path}",
        )

    def _refused(self, reason: str, remedy: str, phase: Phase) -> DeviceRefused:
        return DeviceRefused(reason, remedy=remedy, phase=phase, device=self.device)
