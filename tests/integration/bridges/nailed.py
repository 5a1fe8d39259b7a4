"""A vfio-user server that cannot be moved, as most of them: a UART without the feature MIGRATION."""

from __future__ import annotations

import signal
import sys

from devices.kit.runtime import VFIO_USER, Runtime
from devices.kit.vfio_user import VfioUserBackend
from devices.protocols.vfio_user.server import Server
from devices.uart16550 import Uart16550

if __name__ == "__main__":
    device = Uart16550("nailed0")
    runtime = Runtime(device, moved_by=VFIO_USER)
    runtime.start()
    backend = VfioUserBackend(device, runtime)
    backend.migration = None  # type: ignore[assignment]
    Server(sys.argv[1], backend).start()
    signal.pause()
