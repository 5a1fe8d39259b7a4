"""The process of a server, where the bridge starts it: its command by model, its end told. It dies with us.

Which servers there are on a host, and how each is started, is said by whoever keeps that host (`--serve MODEL=COMMAND`, in
host.toml); a machine that arrives names a model, and its options fill the command's braces, one word at most each.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from migrate.errors import DeviceGone, Phase, UsageError

_BRACES: Final = re.compile(r"\{([A-Za-z0-9_.-]*)\}")
_END_SECONDS: Final = 2.0


def parse_models(pairs: Sequence[str]) -> dict[str, list[str]]:
    """`MODEL=COMMAND`, the command in words as a shell parts them. :raise UsageError: it is no such thing, or twice there."""
    models: dict[str, list[str]] = {}
    for pair in pairs:
        model, equals, command = pair.partition("=")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"--serve {pair}: {error}", remedy="mend its quotes") from None
        if not model or not equals or not words or model in models:
            raise UsageError(
                f"--serve {pair}: {'a model twice' if model in models else 'no MODEL=COMMAND'}",
                remedy="write --serve 'MODEL=program word {socket}', once for each model",
            )
        models[model] = words
    return models


def command_of(
    models: Mapping[str, Sequence[str]], options: Mapping[str, str], ours: Mapping[str, str]
) -> list[str]:
    """The command of the model that the options name, filled in.

    :param ours: what a command may have besides the options: socket, id, directory, start.
    :raise UsageError: this host has no such model, or the command and the options do not fit together.
    """
    model = options.get("model", "")
    if model not in models:
        near = difflib.get_close_matches(model, models, 1, 0.5)
        raise UsageError(
            f"this host has no vfio-user server for model {model!r}"
            + (f" (did you mean {near[0]!r}?)" if near else f": it has {', '.join(models) or 'none'}"),
            remedy="add --serve MODEL=COMMAND to command under [device.vfio-user] in its host.toml, or name `server`",
            phase=Phase.SETUP,
        )
    known = {**options, **ours}
    used = {name for word in models[model] for name in _BRACES.findall(word)}
    wrong = sorted(used - known.keys()) or sorted(options.keys() - used - {"model"})
    if wrong:
        raise UsageError(
            f"the command of model {model!r} {'has' if wrong[0] in used else 'does not have'} {{{wrong[0]}}}, "
            f"and the machine gives {', '.join(sorted(options))}",
            remedy=f"besides options a command may have {', '.join(f'{{{name}}}' for name in ours)}",
            phase=Phase.SETUP,
        )
    return [_BRACES.sub(lambda found: known[found[1]], word) for word in models[model]]


class ServerProcess:
    """Its words go where ours go: into the device's log."""

    def __init__(self, device: str, command: Sequence[str], socket: str) -> None:
        """:raise DeviceGone: it cannot be started."""
        self.socket = socket
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket)
        try:
            # The kernel ends it with us, however we end: a device that outlives its bridge is one that nobody controls.
            self._child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command], stdin=subprocess.DEVNULL, stdout=2
            )
        except OSError as error:
            raise DeviceGone(
                f"its vfio-user server cannot be started: {error}",
                device=device,
                phase=Phase.SETUP,
                remedy="see --serve in host.toml",
            ) from None

    @property
    def pid(self) -> int:
        return self._child.pid

    def obituary(self, patience: float = 0.0) -> str:
        """How it ended; "" while it lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(patience)
        status = self._child.poll()
        if status is None:
            return ""
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"

    def end(self) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        self._child.terminate()
        try:
            self._child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        with contextlib.suppress(OSError):
            os.unlink(self.socket)
