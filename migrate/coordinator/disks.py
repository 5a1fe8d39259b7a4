"""Disks are shared storage, and that is proved: the source writes a random token beside each image, the destination reads it back.

A file of the same name on another storage has no such token beside it, and is refused before anything is stopped.

The token is locked as images are (F_OFD_SETLK, as devices/virtio/backing.py does). Where the destination sees that lock, it would
see the source's on the image as well, and no third party can have one beside that. Where it does not, locks do not cross between
these hosts, and a lock that is seen on the image is somebody else's here.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import struct
from pathlib import Path
from typing import Final

from migrate.coordinator.participants import Participants
from migrate.errors import FerryError, IncompatibleError, Phase, Reason, UsageError
from migrate.machine.hostconfig import HostConfig
from migrate.protocol.messages import DeviceEntry, DiskEntry

SUFFIX = ".vmferry"
MAX_TOKEN = 64
#: struct flock: type, whence, start, length (0: to the end), pid (0, as OFD locks demand).
_FLOCK: Final = struct.Struct("hhqqi4x")


class Tokens:
    """The tokens of one job, by device and option; `remove` takes them away again."""

    def __init__(self) -> None:
        self.by_disk: dict[tuple[str, str], str] = {}
        self._written: list[tuple[Path, int]] = []  # with the descriptor that has its lock

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
                    fd = _write(path, token)
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
                    self._written.append((path, fd))
                    self.by_disk[member.id, option] = token
        if reasons:
            raise IncompatibleError(reasons)

    def remove(self) -> None:
        """Best effort: a token that stays is overwritten by the next job."""
        for path, fd in self._written:
            path.unlink(missing_ok=True)
            os.close(fd)
        self._written.clear()


def _write(path: Path, token: str) -> int:
    """Answers with the descriptor that keeps it locked, where this storage has locks."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, token.encode() + b"\n")
        os.fsync(fd)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError:
            pass  # then the destination asks more than it would have to
        os.rename(draft, path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        os.close(fd)
        raise
    return fd


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
    token, locks_cross = _read(Path(str(path) + SUFFIX))
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
    try:
        fd = os.open(path, (os.O_RDONLY if disk.read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"the image {path} may not be {'read' if disk.read_only else 'written'} here: {error.strerror}",
            remedy="mend its mode, or how its storage is mounted",
        ) from None
    try:
        if not locks_cross and _locked(fd, fcntl.F_RDLCK if disk.read_only else fcntl.F_WRLCK):
            raise UsageError(
                f"the image {path} is locked by another process of this host, or of one that shares locks with it",
                remedy="end what uses it: `lslocks` names it where it runs here",
            )
    finally:
        os.close(fd)
    return path


def _locked(fd: int, kind: int) -> bool:
    """Does somebody have a lock that would keep us from this one? False where the storage has no locks."""
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return False
    return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK


def _read(path: Path) -> tuple[str, bool]:
    """The token, and whether the lock that the source has on it is seen here."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return "", False
    try:
        token = os.read(fd, MAX_TOKEN + 1).decode("ascii", errors="replace").strip()
        return token, _locked(fd, fcntl.F_RDLCK)
    finally:
        os.close(fd)
