"""Disks are shared storage, and that is proved: the source writes a random token beside each image, the destination reads it back.

A file of the same name on another storage has no such token beside it, and is refused before anything is stopped.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from migrate.coordinator.participants import Participants
from migrate.errors import FerryError, IncompatibleError, Phase, Reason, UsageError
from migrate.machine.hostconfig import HostConfig
from migrate.protocol.messages import DeviceEntry, DiskEntry

SUFFIX = ".vmferry"
MAX_TOKEN = 64


class Tokens:
    """The tokens of one job, by device and option; `remove` takes them away again."""

    def __init__(self) -> None:
        self.by_disk: dict[tuple[str, str], str] = {}
        self._written: list[Path] = []

    def write(self, parts: Participants) -> None:
        """Beside every image of the machine.

        :raises IncompatibleError: naming each image beside which nothing can be written.
        """
        reasons = []
        for member in parts.members:
            for option, image in member.entry["images"].items():
                path = Path(image + SUFFIX)
                token = secrets.token_hex(16)
                try:
                    _write(path, token)
                except OSError as error:
                    reasons.append(
                        Reason(
                            member.id,
                            str(Phase.PREFLIGHT),
                            f"no token can be written to {path}: {error.strerror}",
                            "the directory of the image must be writable: the token proves that both hosts see one storage",
                        )
                    )
                else:
                    self._written.append(path)
                    self.by_disk[member.id, option] = token
        if reasons:
            raise IncompatibleError(reasons)

    def remove(self) -> None:
        """Best effort: a token that stays is overwritten by the next job."""
        for path in self._written:
            path.unlink(missing_ok=True)


def _write(path: Path, token: str) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, token.encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(draft, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def find(host: HostConfig, entry: DeviceEntry) -> tuple[dict[str, str], list[Reason]]:
    """Where this host has the images of a device that arrives, by option; and every reason against them."""
    found: dict[str, str] = {}
    reasons = []
    for disk in entry.disks:
        try:
            found[disk.option] = str(_image(host, disk))
        except FerryError as error:
            reasons.append(Reason(entry.id, str(Phase.PREFLIGHT), error.reason, error.remedy))
    return found, reasons


def _image(host: HostConfig, disk: DiskEntry) -> Path:
    path = host.image(disk.name)
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise UsageError(f"the image {path} is not a regular file", remedy="give the path of a raw image")
    token = _read(Path(str(path) + SUFFIX))
    if not disk.token or not secrets.compare_digest(token.encode(), disk.token.encode()):
        raise UsageError(
            f"{path} is a different file under the same name: the source's token is not beside it",
            remedy="mount the storage that the source uses; images are not copied",
        )
    if info.st_size != disk.size:
        raise UsageError(
            f"the image {path} has {info.st_size} bytes here and {disk.size} on the source",
            remedy="is the storage's cache stale? see that both hosts see one file",
        )
    if not os.access(path, os.R_OK if disk.read_only else os.R_OK | os.W_OK):
        raise UsageError(
            f"the image {path} may not be {'read' if disk.read_only else 'written'} here",
            remedy="mend its mode",
        )
    return path


def _read(path: Path) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return os.read(fd, MAX_TOKEN + 1).decode("ascii", errors="replace").strip()
    finally:
        os.close(fd)
