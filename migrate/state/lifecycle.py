"""The states of a device and the ways between them: VFIO migration v2 with both optional features, P2P and PRE_COPY.

Everything about legal moves is in this file, as one table and one rule. It does not know what a device does in a state;
that is `devices/kit`. The words are those of `include/uapi/linux/vfio.h` (enum vfio_device_mig_state); the paths are those
of the kernel's vfio_mig_get_next_state().

    RUNNING  <-->  RUNNING_P2P  <-->  STOP  <-->  RESUMING
       ^                ^              ^
       v                v              v
    PRE_COPY <--> PRE_COPY_P2P --> STOP_COPY            ERROR: entered by failing, left by a reset
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from migrate.errors import DeviceRefused


class DeviceState(StrEnum):
    """Where a device is. The values are what `State` and `SetState` of org.vmferry.Device1 say."""

    ERROR = "ERROR"  #: it failed and could not go back; only a reset leads out
    STOP = "STOP"  #: writes no guest memory, raises no interrupt, touches no back end, changes nothing
    RUNNING = "RUNNING"  #: fully at work
    STOP_COPY = "STOP_COPY"  #: as STOP, and its state is being read
    RESUMING = "RESUMING"  #: takes in state; leaving towards STOP is where that state is judged
    RUNNING_P2P = "RUNNING_P2P"  #: answers others, starts nothing by itself
    PRE_COPY = "PRE_COPY"  #: as RUNNING, and its state is being read
    PRE_COPY_P2P = "PRE_COPY_P2P"  #: as RUNNING_P2P, and its state is being read


_S = DeviceState

#: The direct arcs: what a device implements. Everything else is made of these.
ARCS: Mapping[DeviceState, tuple[DeviceState, ...]] = MappingProxyType(
    {
        _S.STOP: (_S.RUNNING_P2P, _S.STOP_COPY, _S.RESUMING),
        _S.RUNNING_P2P: (_S.STOP, _S.RUNNING, _S.PRE_COPY_P2P),
        _S.RUNNING: (_S.RUNNING_P2P, _S.PRE_COPY),
        _S.PRE_COPY: (_S.RUNNING, _S.PRE_COPY_P2P),
        _S.PRE_COPY_P2P: (_S.RUNNING_P2P, _S.PRE_COPY, _S.STOP_COPY),
        _S.STOP_COPY: (_S.STOP,),
        _S.RESUMING: (_S.STOP,),
        _S.ERROR: (),
    }
)

#: The states that share one session of reading state.
SAVING_GROUP = frozenset({_S.PRE_COPY, _S.PRE_COPY_P2P, _S.STOP_COPY})

#: States in which a device starts work by itself (timers, polling, DMA of its own accord).
ACTIVE = frozenset({_S.RUNNING, _S.PRE_COPY})

#: States in which a device answers register accesses of the guest: ACTIVE and both P2P states.
RESPONDING = ACTIVE | {_S.RUNNING_P2P, _S.PRE_COPY_P2P}

#: The uAPI reserves these for a later meaning: a saving session cannot be turned back into an earlier part of itself.
FORBIDDEN = frozenset({(_S.STOP_COPY, _S.PRE_COPY), (_S.STOP_COPY, _S.PRE_COPY_P2P)})


def _shortest(current: DeviceState, target: DeviceState) -> tuple[DeviceState, ...] | None:
    """The rule for combined moves: the shortest path with no saving state inside it.

    A saving state inside the path would start and end a session that nobody reads. Between two states of the saving group the
    session is one, so there (PRE_COPY to STOP_COPY) passing through PRE_COPY_P2P is right, and is what the kernel does.
    """
    one_session = current in SAVING_GROUP and target in SAVING_GROUP
    queue: deque[tuple[DeviceState, ...]] = deque([(current,)])
    while queue:
        way = queue.popleft()
        if len(way) > 1 and way[-1] in SAVING_GROUP and not one_session:
            continue
        for step in ARCS[way[-1]]:
            if step is target:
                return (*way[1:], step)
            if step not in way:
                queue.append((*way, step))
    return None


def _all_paths() -> dict[tuple[DeviceState, DeviceState], tuple[DeviceState, ...]]:
    paths: dict[tuple[DeviceState, DeviceState], tuple[DeviceState, ...]] = {}
    for current in DeviceState:
        for target in DeviceState:
            if _S.ERROR in (current, target) or (current, target) in FORBIDDEN:
                continue
            way = () if current is target else _shortest(current, target)
            if way is not None:
                paths[current, target] = way
    return paths


#: Every legal move and the states it passes through, the target last; nothing to do for a move to the present state.
PATHS: Mapping[tuple[DeviceState, DeviceState], tuple[DeviceState, ...]] = MappingProxyType(_all_paths())


def path(current: DeviceState, target: DeviceState) -> tuple[DeviceState, ...]:
    """The states to pass through on the way from `current` to `target`, the target last; empty if already there.

    On a failure the device may stand in any state of the path (uAPI: "the user may see any step along the path").

    :raise DeviceRefused: if there is no such move.
    """
    way = PATHS.get((current, target))
    if way is not None:
        return way
    if current is _S.ERROR:
        reason, remedy = f"a device in ERROR cannot go to {target}", "reset the device, or end its process"
    elif target is _S.ERROR:
        reason, remedy = "ERROR is where a device ends up, not where it is sent", "ask for another state"
    else:
        reason = f"a device cannot go from {current} to {target}: its saving session has passed that point"
        remedy = f"go to {_S.RUNNING} first, which ends the session, then to {target}"
    raise DeviceRefused(reason, remedy=remedy)


def parse(name: str) -> DeviceState:
    """The state that a peer named.

    :raise DeviceRefused: if there is no such state.
    """
    try:
        return DeviceState(name)
    except ValueError:
        known = ", ".join(DeviceState)
        raise DeviceRefused(f"there is no device state {name[:40]!r}", remedy=f"one of {known}") from None
