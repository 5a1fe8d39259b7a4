"""A command whose stdin and stdout are a channel, such as `ssh hostb ferry accept`: its start, its complaints, its end."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import subprocess
import threading

from migrate.errors import TransportError

log = logging.getLogger(__name__)

#: Bytes that a pipe may hold; the default of 64 KiB costs a switch of context for every 64 KiB.
PIPE_SIZE = 1 << 20

#: Seconds that a command gets to end by itself once its stdin is closed, and again after SIGTERM.
_PATIENCE = 2.0
#: Seconds that an error text waits for the exit status and the last words of a command that closed its pipes.
_LAST_WORDS = 0.5
_LONGEST_LINE = 400


def enlarge_pipe(fd: int) -> None:
    """Best effort: more than fs.pipe-user-pages-soft allows, or a socket in place of a pipe, stays as it is."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)


class Command:
    """`sh -c TEXT` in a session of its own. Whoever takes `read_fd` and `write_fd` closes them, then calls `end`.

    :raise TransportError: the shell could not be started.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._last_line = ""
        self._lock = threading.Lock()
        self._ended = False
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                their_in, self.write_fd = self._pipe(theirs, ours)
                self.read_fd, their_out = self._pipe(ours, theirs)
                stderr, their_err = self._pipe(ours, theirs)
                self._stop = os.eventfd(0, os.EFD_CLOEXEC)
                ours.callback(os.close, self._stop)
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", text],
                    stdin=their_in,
                    stdout=their_out,
                    stderr=their_err,
                    start_new_session=True,
                )
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError as error:
                raise TransportError(
                    f"the command '{text}' cannot be started: {error.strerror}",
                    remedy="try it by hand in a shell",
                ) from error
            ours.pop_all()
        enlarge_pipe(self.read_fd)
        enlarge_pipe(self.write_fd)
        self._listener = threading.Thread(
            target=self._listen, args=(stderr,), name="command-stderr", daemon=True
        )
        self._listener.start()

    @staticmethod
    def _pipe(read_side: contextlib.ExitStack, write_side: contextlib.ExitStack) -> tuple[int, int]:
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        read_side.callback(os.close, read_fd)
        write_side.callback(os.close, write_fd)
        return read_fd, write_fd

    def complaint(self) -> str:
        """What there is to say about a command that closed its pipes. Waits up to half a second for its last words."""
        ended = self._wait(_LAST_WORDS)
        if ended:
            self._listener.join(_LAST_WORDS)
        how = "closed its output"
        if ended and (result := os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            exited = result.si_code == os.CLD_EXITED
            how = (
                f"ended with status {result.si_status}"
                if exited
                else f"was killed by signal {result.si_status}"
            )
        said = f", saying: {self._last_line}" if self._last_line else ""
        return f"the command '{self.text}' {how}{said}"

    def kill(self) -> None:
        """SIGKILL to the whole session, from any thread."""
        with self._lock:
            if not self._ended:
                self._signal(signal.SIGKILL)

    def end(self) -> None:
        """Wait for the end that closing its stdin brings, else bring it; reap. Takes up to about 4 s. Idempotent."""
        with self._lock:
            if self._ended:
                return
            if not self._wait(_PATIENCE):
                self._signal(signal.SIGTERM)
                self._wait(_PATIENCE)
            # Not reaped yet, so its group's number is still its own: what the shell left behind goes too.
            self._signal(signal.SIGKILL)
            self._process.wait()
            os.close(self._pidfd)
            self._ended = True
        # A process that left the session (ssh's ControlPersist) may hold stderr open for ever: do not wait for it.
        os.eventfd_write(self._stop, 1)
        self._listener.join()
        os.close(self._stop)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _wait(self, seconds: float) -> bool:
        """Whether it has ended. Does not reap."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(seconds * 1000))

    def _listen(self, stderr: int) -> None:
        poller = select.poll()
        poller.register(stderr, select.POLLIN)
        poller.register(self._stop, select.POLLIN)
        line = b""
        try:
            while self._stop not in dict(poller.poll()) and (chunk := os.read(stderr, 4096)):
                *whole, line = (line + chunk).split(b"\n")
                for item in whole:
                    self._heard(item)
                line = line[-_LONGEST_LINE:]
            self._heard(line)
        finally:
            os.close(stderr)

    def _heard(self, line: bytes) -> None:
        text = line[:_LONGEST_LINE].decode("utf-8", "replace").strip()
        text = "".join(letter if letter.isprintable() else "?" for letter in text)
        if text:
            self._last_line = text
            log.info("%s: %s", self.text, text)
