"""One client's messages, and what each does to the device behind. No I/O.

QEMU's thread waits for the answer to every message but SYNC_SYSMEM and SET_IRQFD, and the whole guest with it: so there is one
to whatever is well formed, and what the device refuses is answered with all ones, as a bus does where nobody answers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from devices.protocols.mpqemu import messages as m
from devices.protocols.mpqemu.messages import Command

log = logging.getLogger(__name__)


class Backend(Protocol):
    """The device behind a server. Every method is called with `lock` held."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    def config_read(self, offset: int, size: int) -> int: ...
    def config_write(self, offset: int, size: int, value: int) -> None: ...

    def bar_read(self, address: int, size: int, *, memory: bool) -> int | None:
        """None: there is nothing at that address, or the device does not answer now."""

    def bar_write(self, address: int, size: int, value: int, *, memory: bool) -> bool:
        """Whether anybody took it."""

    def share_memory(self, regions: Sequence[m.Sysmem], fds: Sequence[int]) -> None:
        """This and nothing else is guest memory from now on. The descriptors stay the caller's.

        :raise BadMessage: a descriptor is not usable as guest memory.
        """

    def connect_irq(self, eventfd: int | None) -> None:
        """Owns the eventfd from here on."""

    def reset(self) -> None: ...


class Session:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def handle(self, command: Command, payload: memoryview, fds: list[int]) -> bytes | None:
        """The answer to a message, None where there is none. Descriptors that it takes are removed from `fds`.

        A device that fails is answered for too: QEMU would wait for ever, and its guest with it.

        :raise BadMessage: the connection cannot go on.
        """
        _, fewest, most = m.SHAPES[command]
        if not fewest <= len(fds) <= most:
            raise m.bad(f"{command.name} with {len(fds)} descriptors; it has {fewest} to {most}")
        try:
            with self._backend.lock:
                return self._handle(command, payload, fds)
        except m.BadMessage:
            raise
        except Exception:
            log.exception("event=failed command=%s", command.name)
            return None if command in m.UNANSWERED else m.encode_ret(m.REFUSED)

    def _handle(self, command: Command, payload: memoryview, fds: list[int]) -> bytes | None:
        backend = self._backend
        match command:
            case Command.SYNC_SYSMEM:
                backend.share_memory(m.decode_sysmem(payload, len(fds)), fds)
                return None
            case Command.SET_IRQFD:
                interrupt, resample = fds
                fds.clear()
                # Our devices signal edges, so nobody waits for the guest's end of interrupt.
                os.close(resample)
                backend.connect_irq(interrupt)
                return None
            case Command.DEVICE_RESET:
                backend.reset()
                return m.encode_ret(None)
            case Command.PCI_CFGREAD:
                config = m.decode_config(payload)
                return m.encode_ret(backend.config_read(config.offset, config.size))
            case Command.PCI_CFGWRITE:
                config = m.decode_config(payload)
                backend.config_write(config.offset, config.size, config.value)
                return m.encode_ret(0)
            case Command.BAR_READ:
                bar = m.decode_bar(payload)
                value = backend.bar_read(bar.address, bar.size, memory=bar.memory)
                return m.encode_ret(m.REFUSED if value is None else value)
            case Command.BAR_WRITE:
                bar = m.decode_bar(payload)
                taken = backend.bar_write(bar.address, bar.size, bar.value, memory=bar.memory)
                return m.encode_ret(0 if taken else m.REFUSED)
        raise m.bad(f"{command.name} is no message to a device")

    def close(self) -> None:
        """QEMU has gone, which is the machine's power-off: there is no way back to a proxy that lost its connection."""
        with self._backend.lock:
            try:
                self._backend.reset()
            except Exception:
                log.exception("event=failed command=reset")
            self._backend.share_memory([], [])
            self._backend.connect_irq(None)
