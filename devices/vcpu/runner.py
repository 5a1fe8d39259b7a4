"""The thread that executes the guest, and the only way to make it not execute.

Slices run one after the other while the machine is to run and nobody holds the processor. Whoever wants it to rest sets
`engine.stop_requested` and waits until the slice in progress has ended: at most its instructions, or one access to a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from devices.vcpu.engine import Engine
from migrate.errors import DeviceTimeout, Phase

#: Seconds. An access to a device that hangs ends by its own deadline (vfio_user.client.TIMEOUT), which is shorter.
DEADLINE = 8.0


class Runner:
    """All methods may be called by any thread but its own. `failed` is called by its own thread, at most once a run."""

    def __init__(self, engine: Engine, wake: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        self._engine = engine
        self._wake = wake
        self._failed = failed
        self._changed = threading.Condition()
        self._running = False
        self._holds = 0
        self._executing = False
        self._closing = False
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        engine.stop_requested = True

    def run(self) -> None:
        """Execute, from now until `rest`."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="vcpu", daemon=True)
                self._thread.start()
            self._running, self._failure = True, None
            self._changed.notify_all()

    def rest(self) -> None:
        """Execute nothing.

        :raise DeviceTimeout: the slice in progress does not end; it still will. What ended the run, if anything did.
        """
        with self._changed:
            self._running = False
            self._await_rest()
            if self._failure is not None:
                raise self._failure

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within, nothing is executed, so registers and TLB may be touched: by one holder at a time.

        :raise DeviceTimeout: as `rest`.
        """
        with self._changed:
            self._holds += 1
            try:
                self._await_rest()
                yield
            finally:
                self._holds -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """For good. Its thread may still be telling somebody of a failure; it touches the engine no more."""
        with self._changed:
            self._closing = True
            self._running = False
            self._await_rest()
            self._changed.notify_all()

    def _await_rest(self) -> None:
        self._engine.stop_requested = True
        if self._executing:
            self._wake()
            if not self._changed.wait_for(lambda: not self._executing, DEADLINE):
                raise DeviceTimeout(
                    f"the vCPU did not come to rest within {DEADLINE:g} s",
                    remedy="see which device does not answer it",
                    phase=Phase.STOP,
                )

    # -- its own thread ---------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._begin():
            failure = self._execute()
            with self._changed:
                self._executing = False
                if failure is not None:
                    self._running, self._failure = False, failure
                self._changed.notify_all()
            if failure is not None:
                self._failed(failure)

    def _begin(self) -> bool:
        """Wait for leave to execute; False: never again."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (self._running and not self._holds))
            if self._closing:
                return False
            self._executing = True
            self._engine.stop_requested = False
            return True

    def _execute(self) -> Exception | None:
        try:
            while not self._engine.stop_requested:
                self._engine.run_slice()
        except Exception as error:
            return error
        return None
