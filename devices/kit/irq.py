"""One interrupt of a device: an edge that is signalled through an eventfd, or remembered until somebody listens."""

from __future__ import annotations

import os


class Irq:
    """Raised under the device's lock; the eventfd comes and goes with the VMM (SET_IRQS)."""

    __slots__ = ("_eventfd", "_held", "_masked", "raised")

    def __init__(self) -> None:
        self._eventfd: int | None = None
        self._held = False
        self._masked = False
        #: An edge that nobody has been told of yet.
        self.raised = False

    def raise_(self) -> None:
        """Signal the interrupt. Without a listener, or while the device is stopped, it is remembered instead."""
        self.raised = True
        self._deliver()

    def connect(self, eventfd: int | None) -> None:
        """Signal through `eventfd` (owned from here on) or, with None, remember. Closes the one before."""
        if self._eventfd is not None:
            os.close(self._eventfd)
        self._eventfd = eventfd
        self._deliver()

    def hold(self, held: bool) -> None:
        """Stopped means that no interrupt is raised: hold(True) keeps edges back until hold(False)."""
        self._held = held
        self._deliver()

    def mask(self, masked: bool) -> None:
        """The VMM wants to hear nothing for now: an edge is kept until mask(False)."""
        self._masked = masked
        self._deliver()

    def forget(self) -> None:
        """Power-on: an edge that nobody was told of is gone."""
        self.raised = False

    @property
    def connected(self) -> bool:
        return self._eventfd is not None

    def _deliver(self) -> None:
        if self.raised and not self._held and not self._masked and self._eventfd is not None:
            os.eventfd_write(self._eventfd, 1)
            self.raised = False
