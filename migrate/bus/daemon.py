"""The private message bus of one machine: a dbus-daemon of our own, on a socket whose path never changes.

It admits only the user that runs it, knows only the names of this project and of QEMU's helpers, and starts nothing. When
it dies, start() brings it back at the same path, and the participants reconnect.

It dies with the process that started it: PR_SET_PDEATHSIG, set by setpriv(1) on the way to exec. A `preexec_fn` would run
Python in a forked copy of a process that has threads, which may never return, and would fork all of its memory map.
The kernel sends that signal when the *thread* that started the daemon ends: start it from the main thread's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from html import escape
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from migrate.bus.addresses import address_of
from migrate.bus.link import Link, check_socket_path
from migrate.errors import BusError, UsageError

#: Seconds a daemon may take to be ready, and to end when it is asked to.
START_TIMEOUT: Final = 10.0
STOP_TIMEOUT: Final = 2.0
#: Where programs may be that a user's PATH does not list.
SYSTEM_PATH: Final = ":/usr/sbin:/sbin"

# Sizes are far above what we send (blobs: 1 MiB, refused above by the client with the size), because the bus answers a
# message over its limit by cutting the sender off, and then nobody learns what was too large. No reply_timeout: each of
# our calls has a deadline of its own. A custom <type> has no rules of its own, hence the receive rules.
_CONFIG: Final = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>vmferry</type>
  <listen>{listen}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <deny own="*"/>
    <allow own="org.qemu.VMState1"/>
    <allow own_prefix="org.vmferry"/>
    <allow send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
  </policy>
  <limit name="max_message_size">67108864</limit>
  <limit name="max_incoming_bytes">134217728</limit>
  <limit name="max_outgoing_bytes">134217728</limit>
  <limit name="max_message_unix_fds">16</limit>
  <limit name="max_incoming_unix_fds">256</limit>
  <limit name="max_outgoing_unix_fds">256</limit>
  <limit name="max_replies_per_connection">10000</limit>
  <limit name="auth_timeout">5000</limit>
</busconfig>
"""


class PrivateBus:
    """The bus of a machine at `socket`, in a directory that exists and only we can enter. Beside it: `.conf` and `.log`.

    :param socket: the socket's path, at most 107 bytes; UsageError for a longer one.
    """

    def __init__(self, socket: Path) -> None:
        self.socket = socket.absolute()
        check_socket_path(str(self.socket))
        #: For Bus.connect. Without the guid that dbus-daemon prints: it differs after a restart.
        self.address = "unix:path=" + quote(str(self.socket), safe="/-_.")
        self._config = self.socket.with_name(self.socket.name + ".conf")
        self._log = self.socket.with_name(self.socket.name + ".log")
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The running daemon's process id."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the daemon; when this returns it listens. Also after it died or was stopped, at the same path.

        Raises UsageError where dbus-daemon or setpriv is not installed, BusError where it does not come up or another
        bus answers at this path.
        """
        if self.pid is not None:
            raise BusError(f"the bus at {self.socket} is running (pid {self.pid})")
        command = [
            *(_program("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"),
            *(
                _program("dbus-daemon", "dbus-daemon"),
                f"--config-file={self._config}",
                "--nofork",
                "--nopidfile",
            ),
            "--print-address=1",
        ]
        await self._refuse_other()
        try:
            self._config.write_text(
                _CONFIG.format(listen=escape(self.address, quote=False)), encoding="utf-8"
            )
            with self._log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    process_group=0,  # Ctrl-C on our terminal is for us
                )
        except OSError as error:
            raise BusError(f"the bus at {self.socket} cannot be started: {error}") from error
        assert self._process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT):
                line = await self._process.stdout.readline()
        if not line.startswith(b"unix:"):
            await self.stop()
            raise BusError(f"dbus-daemon did not start: {self._last_words()}", remedy=f"see {self._log}")

    async def stop(self) -> None:
        """End the daemon and remove its socket. Nothing where it does not run."""
        process = self._process
        if process is None:
            return
        for number, patience in ((signal.SIGTERM, STOP_TIMEOUT), (signal.SIGKILL, None)):
            if process.returncode is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    process.pid, number
                )  # asyncio's send_signal() may reap the child and lose its exit status
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await process.wait()
        with contextlib.suppress(OSError):
            self.socket.unlink()

    async def restart(self) -> None:
        """A new daemon at the same path. Every connection ends; clients connect again."""
        await self.stop()
        await self.start()

    async def wait_died(self) -> int:
        """Wait until the daemon has ended, by stop() or by itself; its exit status, negative for a signal."""
        if self._process is None:
            raise BusError(f"the bus at {self.socket} was never started")
        return await self._process.wait()

    async def _refuse_other(self) -> None:
        """dbus-daemon takes over a socket that exists, even one that somebody serves."""
        if not self.socket.exists():
            return
        try:
            link = await Link.connect(self.address, timeout=1.0)
        except BusError:
            return  # left over by a daemon that was killed
        link.close()
        raise BusError(
            f"another bus answers at {self.socket}",
            remedy="is this machine running already? give it a directory of its own",
        )

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:500] if lines else "it said nothing"


def _program(name: str, package: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + SYSTEM_PATH)
    if path is None:
        raise UsageError(f"{name} is not installed", remedy=f"as root: apt-get install {package}")
    return path


class AdoptedBus:
    """A bus that others run, in the place of a machine's private one: found under the same path, by a link to its socket."""

    def __init__(self, path: Path, address: str) -> None:
        """:raises UsageError: for an address that is no path of a socket."""
        self.path, self.address = path, address_of(address)
        match = re.fullmatch(r"unix:path=([^,]+)(,.*)?", self.address)
        if match is None:
            raise UsageError(f"{address!r} is no bus at a path", remedy="give unix:path=/PATH")
        self._socket = unquote(match[1])

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(self._socket)

    async def restart(self) -> None:
        """Nothing that we could do: whoever runs it brings it back."""

    async def wait_died(self) -> int:
        await asyncio.Event().wait()
        raise AssertionError("nobody here runs it")

    async def stop(self) -> None:
        self.path.unlink(missing_ok=True)
