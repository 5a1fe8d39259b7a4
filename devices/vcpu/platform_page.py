"""The platform page: the registers that the vCPU process answers itself. No devices, no processor, no threads of its own.

Unicorn cannot take interrupts. A device signals its eventfd; the page latches it as one bit a line; the guest polls.
All registers are 32 bits wide; what is not listed reads as 0.

    0x00 PENDING  r  lines raised and not masked. Reading latches what has been signalled.   w  1 clears a line
    0x04 MASK     rw lines the guest does not want to see; they stay latched beneath
    0x08 IDLE     w  sleep until a line that is not masked is raised, or so many microseconds have passed (rounded up to
                     milliseconds), or earlier
    0x0c EXIT     w  power off; the value is kept as the reason
"""

from __future__ import annotations

import os
import select

from migrate.errors import DeviceRefused, Phase

GPA = 0xFEE0_0000
SIZE = 0x1000
LINES = 32

PENDING, MASK, IDLE, EXIT = 0x00, 0x04, 0x08, 0x0C

#: µs. A guest that asks for more is woken and asks again.
LONGEST_IDLE = 100_000


class PoweredOff(DeviceRefused):
    """The guest wrote EXIT: the way out of the slice, and the answer to who wants a vCPU that is off to do something."""

    def __init__(self, value: int) -> None:
        super().__init__(
            f"the guest has powered the machine off, with {value}",
            remedy="start it again",
            phase=Phase.RUNNING,
        )
        self.value = value


class PlatformPage:
    """`pending` and `mask` are state. `wake` may be called by any thread; all else belongs to who executes slices."""

    def __init__(self) -> None:
        self.pending = 0
        self.mask = 0
        self._lines: dict[int, int] = {}
        self._wake = _eventfd()
        self._awaited = select.poll()
        self._awaited.register(self._wake, select.POLLIN)

    def line(self, number: int) -> int:
        """The eventfd that raises line `number`; ours, to be passed to the device."""
        if number not in self._lines:
            self._lines[number] = _eventfd()
            if not self.mask >> number & 1:
                self._awaited.register(self._lines[number], select.POLLIN)
        return self._lines[number]

    def latch(self) -> None:
        """Turn what has been signalled into bits of `pending`."""
        for number, eventfd in self._lines.items():
            if _take(eventfd):
                self.pending |= 1 << number

    def set_mask(self, mask: int) -> None:
        changed, self.mask = self.mask ^ mask, mask
        for number, eventfd in self._lines.items():
            if changed >> number & 1:
                if mask >> number & 1:
                    self._awaited.unregister(eventfd)
                else:
                    self._awaited.register(eventfd, select.POLLIN)

    def wake(self) -> None:
        """End the guest's sleep, or else the next one before it begins."""
        os.eventfd_write(self._wake, 1)

    def read(self, offset: int, size: int) -> int:
        if size != 4:
            return 0
        match offset:
            case 0x00:
                self.latch()
                return self.pending & ~self.mask
            case 0x04:
                return self.mask
            case _:
                return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """:raise PoweredOff: the guest wrote EXIT."""
        if size != 4:
            return
        match offset:
            case 0x00:
                self.pending &= ~value
            case 0x04:
                self.set_mask(value)
            case 0x08:
                self._idle(value)
            case 0x0C:
                raise PoweredOff(value)

    def _idle(self, microseconds: int) -> None:
        if self.pending & ~self.mask:
            return
        self._awaited.poll(min(microseconds, LONGEST_IDLE) / 1000)
        _take(self._wake)

    def close(self) -> None:
        for eventfd in (self._wake, *self._lines.values()):
            os.close(eventfd)
        self._lines.clear()


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _take(eventfd: int) -> bool:
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return False
    return True
