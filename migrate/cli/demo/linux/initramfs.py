"""The guest's kernel, found on this host, and its initramfs, made here: our program and the modules that it loads, in order.

Debian's cloud kernel has its virtio drivers as modules. The archive is cpio's "newc" format (Linux, Documentation/driver-api/
early-userspace/buffer-format.rst): a header of 110 ASCII bytes, the name, the content, each padded to four bytes.
"""

from __future__ import annotations

import lzma
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrate.errors import UsageError

#: In the order in which they need each other.
MODULES: Final = (
    "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk",
)  # fmt: skip
#: For a guest with a network function, after those.
NET_MODULES: Final = ("failover", "net_failover", "virtio_net")
#: Words of the kernel's command line; the guest's own follow.
APPEND: Final = "console=ttyS0 quiet panic=1 --"
INIT: Final = Path(__file__).parent / "init"
_KERNEL: Final = re.compile(r"vmlinuz-(\d[\w.+~-]*-cloud-amd64)")
_REMEDY: Final = (
    "name a directory with FERRY_KERNEL, into which Debian's package was unpacked: "
    "apt-get download the newest linux-image-…-cloud-amd64, then dpkg -x it there"
)
_FILE, _DIRECTORY, _DEVICE = 0o100000, 0o040000, 0o020000


@dataclass(frozen=True, slots=True)
class Kernel:
    """`image` is bootable, `modules` is its directory below /lib/modules."""

    image: Path
    modules: Path


def find_kernel(explicit: Path | None = None) -> Kernel:
    """The newest of Debian's cloud kernels in that directory, in $FERRY_KERNEL, or of this host.

    :raises UsageError: there is none, or it has no modules.
    """
    named = explicit or (Path(os.environ["FERRY_KERNEL"]) if os.environ.get("FERRY_KERNEL") else None)
    root = named or Path("/")
    found = [
        (_version(match[1]), path, match[1])
        for path in (root / "boot").glob("vmlinuz-*")
        if (match := _KERNEL.fullmatch(path.name))
    ]
    for _, image, version in sorted(found, reverse=True):
        for modules in (root / "lib" / "modules" / version, root / "usr" / "lib" / "modules" / version):
            if modules.is_dir():
                return Kernel(image, modules)
    raise UsageError(f"there is no Linux cloud kernel with its modules in {root}", remedy=_REMEDY)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def build(kernel: Kernel, program: bytes = b"", modules: Sequence[str] = MODULES) -> bytes:
    """The archive. :param program: what runs in place of the demo's guest. :param modules: what it loads, ten at most.

    :raises UsageError: the kernel lacks a module, or has it in a form that cannot be read.
    """
    entries = [("dev", _DIRECTORY | 0o755, b""), ("modules", _DIRECTORY | 0o755, b"")]
    entries += [
        (f"modules/{number}", _FILE | 0o644, _module(kernel, name)) for number, name in enumerate(modules)
    ]
    entries += [("init", _FILE | 0o755, program or INIT.read_bytes())]
    numbered = [_entry(number, *entry) for number, entry in enumerate(entries, 1)]
    # The console that the kernel opens for its first process: a character device, 5:1.
    numbered.append(_entry(len(numbered) + 1, "dev/console", _DEVICE | 0o600, b"", (5, 1)))
    return b"".join([*numbered, _entry(0, "TRAILER!!!", 0, b"")])


def _entry(number: int, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    # inode, mode, uid, gid, links, mtime, size, device of the file system (2), of the node (2), length of the name, checksum
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _module(kernel: Kernel, name: str) -> bytes:
    for path in _candidates(kernel, name):
        if path.suffix == ".ko":
            return path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes())
        raise UsageError(f"{path} cannot be read: Python has nothing for {path.suffix}", remedy=_REMEDY)
    raise UsageError(f"the kernel {kernel.image} has no module {name}", remedy=_REMEDY)


def _candidates(kernel: Kernel, name: str) -> Iterator[Path]:
    for spelling in (name, name.replace("_", "-")):
        for directory in ("drivers", "net/core"):
            yield from (kernel.modules / "kernel" / directory).rglob(f"{spelling}.ko*")
