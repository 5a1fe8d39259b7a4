"""Which dirty tracker a participant has, and its life between StartTracking and StopTracking."""

from __future__ import annotations

import logging
from typing import Final

from devices.kit.participant import Participant
from migrate.errors import DeviceRefused, Phase, TrackerError
from migrate.memory.bitmap import DirtyBitmap

log = logging.getLogger(__name__)

#: For --tracker: this process does not track; the coordinator compares.
COMPARE: Final = "compare"
#: What the bus is told then, and where no tracker works.
UNTRACKED: Final = "untracked"


class Tracking:
    """All methods are called with the participant's lock held."""

    def __init__(self, participant: Participant, wanted: str | None) -> None:
        """:param wanted: "scan", "log", "compare", or None for the best that works here.
        :raise TrackerError: the tracker wanted does not work here.
        """
        self._participant = participant
        #: scan, log, none (writes no guest memory) or untracked.
        self.name = _choose(participant, wanted)

    def start(self) -> None:
        """:raise TrackerError: it has no tracker, or writes memory that the tracker does not see."""
        participant, memory = self._participant, self._participant.memory
        if self.name == UNTRACKED:
            raise self._error(
                "it writes guest memory and has no dirty tracker",
                'have the coordinator compare: tracker = "compare" in machine.toml',
            )
        if participant.writes_memory and memory.has_private_windows:
            raise self._error(
                "its VMM has mapped memory into it that is not the machine's, and writes there are not tracked",
                "attach all of the machine's memory to every participant",
            )
        if memory.tracker is None:
            tracker = participant.make_tracker(self.name)
            tracker.attach(memory.attached)
            memory.tracker = tracker
        memory.tracker.start()

    def collect(self) -> DirtyBitmap:
        """What was written since the last time, in the machine's page numbering. :raise DeviceRefused: not started."""
        memory = self._participant.memory
        if memory.tracker is None:
            raise DeviceRefused(
                "it does not track memory now",
                remedy="start tracking first",
                phase=Phase.PRECOPY,
                device=self._participant.id,
            )
        dirty = DirtyBitmap(memory.attached.page_count)
        memory.tracker.collect(dirty)
        return dirty

    def stop(self) -> None:
        memory = self._participant.memory
        tracker, memory.tracker = memory.tracker, None
        if tracker is not None:
            tracker.close()

    def _error(self, reason: str, remedy: str) -> TrackerError:
        return TrackerError(reason, remedy=remedy, phase=Phase.PRECOPY, device=self._participant.id)


def _choose(participant: Participant, wanted: str | None) -> str:
    if not participant.writes_memory:
        return "none"
    if wanted == COMPARE:
        return UNTRACKED
    try:
        return participant.choose_tracker(wanted)
    except TrackerError as error:
        if wanted is not None:
            error.device = participant.id
            raise
        log.warning("event=untracked reason=%r", error.reason)
        return UNTRACKED
