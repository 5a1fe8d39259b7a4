"""A Linux guest in QEMU that writes its disk all the while, moved to and fro, every third attempt made to fail:

    python -m tests.interop.shuttle --moves 50

Afterwards every block that the guest was told would last is on the disk, whole; its own memory and ticks are right; and the disk
was served on one side only at every instant. Says what it saw, one line a move, and figures at the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

from tests.faults.leftovers import pen
from tests.interop.qemu_world import QemuHost, World, missing, word_for

#: How an attempt is made to fail, in turn.
FAILURES = ("cancel at round:1", "cancel at quiesced", "cancel at stopped", "a device fails to load")


def shuttle(world: World, moves: int, say: Callable[[str], None]) -> list[float]:
    """Downtimes in ms of the moves that were to succeed; every promise is asserted."""
    world.run()
    here, there = world.hosts
    downtimes = []
    for number in range(1, moves + 1):
        if number % 3 == 0:
            how = FAILURES[number // 3 % len(FAILURES)]
            _fail(world, here, there, how)
            say(f"{number}: {how}: it runs on at {here.name}")
        else:
            outcome = world.moves(here, there, "--connections", "2" if number % 2 else "1")
            here, there = there, here
            downtimes.append(float(outcome["downtime_ms"]))
            say(f"{number}: at {here.name} after {outcome['downtime_ms']:.1f} ms; both memories equal")
        world.runs_on(here, there)
        assert b"CORRUPT" not in world.said()
    synced = world.guest_is_whole(here)
    world.one_disk_at_a_time()
    here.tell_guest("quit")
    here.becomes("")
    world.disk_is_whole(synced)
    return downtimes


def _fail(world: World, here: QemuHost, there: QemuHost, how: str) -> None:
    if how == "a device fails to load":
        faulty = ", ".join(f'"{word}"' for word in word_for("devices.faulty", "rtc", "--fail", "apply"))
        there.write_toml(world.command, f"[device.rtc]\ncommand = [{faulty}]\n")
        said = world.move(here, there)
        there.write_toml(world.command)
    else:
        at = how.rpartition(" ")[2]
        moving = world.begin(here, there, "--hold", at)
        moving.until("held", at=at)
        assert here.ferry("cancel", "web1").code == 0
        said = moving.end()
    assert said.code == 1, said
    assert said.outcome["running_on"] == "source", said


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moves", type=int, default=50)
    words = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    with pen() as ground:
        world = World(ground)
        try:
            times = sorted(shuttle(world, words.moves, lambda text: print(text, flush=True)))
        finally:
            world.close()
    print(
        f"{words.moves} moves, {words.moves - len(times)} of them made to fail; downtime median "
        f"{statistics.median(times):.1f} ms, longest {times[-1]:.1f} ms; nothing lost, nothing corrupt"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
