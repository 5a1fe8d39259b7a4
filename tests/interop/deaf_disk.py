"""A vhost-user-blk that writes guest memory and not the dirty log: the negative control of every test that compares memories."""

from __future__ import annotations

from devices.kit import main
from devices.protocols.vhost_user.log import DirtyLog
from devices.vhost_blk import VhostUserBlk


class DeafDisk(VhostUserBlk):
    """Otherwise like any."""


def _nothing(self: DirtyLog, gpa: int, length: int) -> None:
    """Not marked."""


if __name__ == "__main__":
    DirtyLog.mark = _nothing  # type: ignore[method-assign]
    main(DeafDisk)
