"""rtc: a clock that goes on evenly when the machine moves between hosts whose clocks differ, with an alarm.

Registers are in docs/devices.md, state in schemas/rtc.toml. Guest time is a number that moves, never a host's clock:

    guest time = base + (this host's CLOCK_MONOTONIC now − what it was when the clock was started here)

STOP adds the elapsed time to the base and freezes it; a start adds how long the machine stood still: by this host's clock
if it was stopped here, else as the supervisor measured it. So two hosts' clocks are never compared, and the guest sees
neither a jump nor a step back, only the true length of its standstill. A host's wall clock is read once, at the first
start of the machine's life.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from devices.kit import Device, PciIdentity, RegionInfo, main
from devices.kit.timers import Timer


class Word:
    """Offsets; each is 8 bytes."""

    TIME, MONO, ALARM, CONTROL_AND_STATUS, SCRATCH = 0x00, 0x08, 0x10, 0x18, 0x20


CONTROL_ALARM = 1
STATUS_FIRED = 1 << 32  # STATUS is the high half of the word

LOW, ALL = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
LAST_NS = ALL  # ns: in the year 2554 the clock stops rather than begin again
SHORTEST_WAIT = 0.0005  # seconds; closer than this the timer's thread would only take the lock from the guest
LONGEST_WAIT = 3600.0  # a far alarm is looked at again and again: no timer takes a wait of centuries


class Rtc(Device):
    type = "rtc"
    regions = (RegionInfo(0x28, name="registers"),)
    #: An id that QEMU's list leaves to experiments (docs/specs/pci-ids: 1af4:10f0 to 10ff); a real-time clock.
    identity = PciIdentity(0x1AF4, 0x10F0, 0x080300)

    def monotonic_ns(self) -> int:
        """This host's CLOCK_MONOTONIC. A test puts another host's here, and so below."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.time_ns()

    def setup(self, options: Mapping[str, str]) -> None:
        self.time = 0  #: guest wall time at `_started`, or while stopped; 0 in a machine that never ran
        self.mono = 0  #: guest monotonic time, likewise
        self._started: int | None = None  #: CLOCK_MONOTONIC of the start; None while stopped
        #: CLOCK_MONOTONIC of the stop; None if what stands here was not stopped here.
        self._stopped: int | None = None
        self._running = False
        self._timer: Timer | None = None

    def reset(self) -> None:
        # The time goes on, as with a battery.
        self.alarm = 0
        self.alarm_on = False
        self.fired = False
        self.scratch = 0
        #: By clock: the high half of the instant whose low half was read last; None: none was read.
        self.latched: dict[int, int | None] = {Word.TIME: None, Word.MONO: None}
        #: The halves stand there because of a load; nobody knows yet whether the guest is between two reads.
        self._assumed = False

    # -- time -------------------------------------------------------------------------------------------------------------

    def _since_start(self) -> int:
        return 0 if self._started is None else self.monotonic_ns() - self._started

    def now(self) -> int:
        return min(self.time + self._since_start(), LAST_NS)

    def mono_now(self) -> int:
        return min(self.mono + self._since_start(), LAST_NS)

    def start(self, stopped_ns: int) -> None:
        now = self.monotonic_ns()
        if self.time == 0:
            self.time = self.wall_ns()
        else:
            self._advance(stopped_ns if self._stopped is None else now - self._stopped)
        self._started, self._stopped = now, None

    def stop(self) -> None:
        now = self.monotonic_ns()
        if self._started is not None:
            self._advance(now - self._started)
        self._started, self._stopped = None, now

    def _advance(self, ns: int) -> None:
        self.time += ns
        self.mono += ns

    # -- the alarm --------------------------------------------------------------------------------------------------------

    def _fire_if_due(self) -> None:
        """Not before RUNNING: an alarm that came due in a standstill goes off after it."""
        if self._running and self.alarm_on and self.now() >= self.alarm:
            self.alarm_on = False
            self.fired = True
            self.irq().raise_()

    def _watch_alarm(self) -> None:
        """Fire the alarm if it is due; else come back when it will be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fire_if_due()
        if self._running and self.alarm_on:
            wait = (self.alarm - self.now()) / 1e9
            self._timer = self.every(min(max(wait, SHORTEST_WAIT), LONGEST_WAIT), self._watch_alarm)

    def leave_p2p(self) -> None:
        self._running = True
        self._watch_alarm()

    def enter_p2p(self) -> None:
        self._running = False

    # -- registers --------------------------------------------------------------------------------------------------------

    def _word(self, word: int) -> int:
        match word:
            case Word.TIME:
                return self.now()
            case Word.MONO:
                return self.mono_now()
            case Word.ALARM:
                return self.alarm
            case Word.CONTROL_AND_STATUS:
                self._fire_if_due()  # who has read a time past the alarm finds that it went off
                return (CONTROL_ALARM if self.alarm_on else 0) | (STATUS_FIRED if self.fired else 0)
            case Word.SCRATCH:
                return self.scratch
        return 0

    def read(self, region: int, offset: int, size: int) -> int:
        if size < 4:
            return 0
        word, high = offset & ~7, bool(offset & 4)
        self._settle(word if high and size == 4 else None)
        if high and (latched := self.latched.get(word)) is not None:
            return latched
        value = self._word(word)
        if size == 8:
            return value
        if high:
            return value >> 32
        if word in self.latched:
            self.latched[word] = value >> 32
        return value & LOW

    def _settle(self, word: int | None) -> None:
        """The first access after a load says whether the guest was stopped between the two reads of a word: then it is the other.

        :param word: whose high half is read; None for any other access.
        """
        if self._assumed:
            self._assumed = False
            self.latched = {one: half if one == word else None for one, half in self.latched.items()}

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if size < 4:
            return
        self._settle(None)
        shift = 32 if offset & 4 else 0
        value <<= shift
        written = ALL if size == 8 else LOW << shift
        match offset & ~7:
            case Word.ALARM:
                self.alarm = self.alarm & ~written | value
                self._watch_alarm()
            case Word.CONTROL_AND_STATUS:
                if value & STATUS_FIRED:
                    self.fired = False
                if written & CONTROL_ALARM:
                    self.alarm_on = bool(value & CONTROL_ALARM)
                    self._watch_alarm()
            case Word.SCRATCH:
                self.scratch = self.scratch & ~written | value

    # -- state ------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        elapsed = self._since_start()  # both clocks at one instant
        return {
            "guest_ns": min(self.time + elapsed, LAST_NS),
            "mono_ns": min(self.mono + elapsed, LAST_NS),
            "alarm_ns": self.alarm,
            "alarm_enabled": self.alarm_on,
            "alarm_fired": self.fired,
            "scratch": self.scratch,
            "half_read": self._half_read(elapsed),
        }

    def _half_read(self, elapsed: int) -> dict[str, int] | None:
        """Only where a guest would find another high half than that of the time."""
        found, needed = {}, False
        for name, word, since in (("time_high", Word.TIME, self.time), ("mono_high", Word.MONO, self.mono)):
            high, latched = min(since + elapsed, LAST_NS) >> 32, self.latched[word]
            found[name] = high if latched is None else latched
            needed |= found[name] != high
        return found if needed else None

    def load(self, state: Mapping[str, Any]) -> None:
        self._stopped = None
        self.time = state["guest_ns"]
        self.mono = state["mono_ns"]
        self.alarm = state["alarm_ns"]
        self.alarm_on = state["alarm_enabled"]
        self.fired = state["alarm_fired"]
        self.scratch = state["scratch"]
        half = state.get("half_read")
        # What is not said is as it was at the stop, and not as it is at the read: the time has gone on until then.
        self._assumed = half is None
        self.latched = {
            Word.TIME: half["time_high"] if half else self.time >> 32,
            Word.MONO: half["mono_high"] if half else self.mono >> 32,
        }


if __name__ == "__main__":
    main(Rtc)
