"""A driver for tests: the guest's side of one device process, by vfio-user. What migrate.testing takes by default."""

from __future__ import annotations

import os
from collections.abc import Sequence

from devices.protocols.vfio_user.client import Client
from migrate.errors import FerryError


class Driver:
    """Registers, memory and interrupts, as a VMM has them (migrate.testing.driver.Driver)."""

    def __init__(self, socket: str, memory: Sequence[tuple[int, int, int]]) -> None:
        """:param memory: guest address, size and descriptor of each region."""
        self._client = Client.connect(socket)
        self._eventfds: list[tuple[int, int, int]] = []
        try:
            for gpa, size, fd in memory:
                self._client.dma_map(gpa, size, fd)
            for index in range(self._client.info().irqs):
                for number in range(self._client.irq_info(index).count):
                    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                    self._eventfds.append((index, number, eventfd))
                    self._client.set_irq_eventfd(index, eventfd, number)
        except FerryError:
            self.close()
            raise

    def read(self, region: int, offset: int, size: int) -> int:
        return self._client.region_read(region, offset, size)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        self._client.region_write(region, offset, size, value)

    def interrupts(self) -> dict[tuple[int, int], int]:
        """By index and number: how often it was raised since the last time this was asked; only what was."""
        found = {}
        for index, number, eventfd in self._eventfds:
            try:
                found[index, number] = os.eventfd_read(eventfd)
            except BlockingIOError:
                continue
        return found

    def close(self) -> None:
        self._client.close()
        for _, _, eventfd in self._eventfds:
            os.close(eventfd)
        self._eventfds.clear()
