"""The built-in guest: it works on whatever devices there are, is not disturbed by being moved, and notices what is lost."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from vcpu_machine import GENERATIONS, WORKING_SET, Machine, corrupt, ticks

from devices.vcpu.platform_file import BUILT_IN_GUEST
from devices.vcpu.platform_page import PoweredOff

#: A small working set that is looked at as a whole every fourth tick, so that damage shows soon.
BUSY = "span=1 check=64 dirty=32 tick_us=2000 idle_us=1000 draw=1 loop=1"
PAGES = 256


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def make(*arguments: object, **named: object) -> Machine:
        made.append(Machine(tmp_path, *arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()
    for memory in {id(one.memory): one.memory for one in made}.values():
        memory.close()


@pytest.mark.parametrize(
    "types",
    [(), ("uart16550",), ("uart16550", "rtc"), ("display", "uart16550"), ("uart16550", "rtc", "display")],
)
def test_it_works_on_whatever_devices_there_are_and_ends_after_its_last_tick(machine, types):
    guest = machine(BUSY + " ticks=20", types=types)
    off = threading.Event()
    guest.runner._failed = lambda failure: (guest.failures.append(failure), off.set())
    guest.run()
    assert off.wait(20)
    assert isinstance(guest.failures[0], PoweredOff)
    if "uart16550" in types:
        guest.drain()
        assert guest.said[0] == f"B {32 << 20} {len(types)} {PAGES}"
        assert ticks(guest.said) == list(range(1, 21))
        assert guest.said[-1] == "DONE"
        assert not corrupt(guest.said)


def test_a_storm_dirties_without_a_pause(machine):
    guest = machine("storm=1 stride=64 span=4 tick_us=5000", types=("uart16550", "rtc"))
    said = guest.run_ticks(20)
    assert not corrupt(said)
    rewritten = [int(line.split()[5]) for line in said if line.startswith("T ")]
    # A guest that is not in a storm rewrites 64 pages a tick.
    assert rewritten[-1] > 64 * len(rewritten) * 2


def test_it_notices_how_long_it_stood_still(machine):
    guest = machine(BUSY)
    guest.run_ticks(5)
    state = guest.save()
    state["rtc"]["mono_ns"] += 3_000_000_000
    guest.load(state)
    last = guest.run_ticks(3)[-1].split()
    assert 3_000_000 <= int(last[3]) < 4_000_000


def test_it_is_not_disturbed_by_being_stopped_a_hundred_times(machine):
    guest = machine(BUSY)
    guest.run()
    guest.listen(lambda said: len(ticks(said)) >= 2)
    for _ in range(100):
        guest.rest()
        guest.run()
    said = guest.run_ticks(5)
    assert not corrupt(said)
    assert ticks(said) == list(range(1, len(ticks(said)) + 1))


def test_it_goes_on_in_another_machine_with_the_same_memory_and_states(machine):
    source = machine(BUSY)
    said = source.run_ticks(12)
    state = source.save()
    destination = machine(memory=source.memory)
    vram = destination.devices["display"].streamed
    vram.view[:] = source.devices["display"].streamed.view
    destination.load(state)
    assert destination.save() == state
    said = said + destination.run_ticks(30)
    assert not corrupt(said)
    assert ticks(said) == list(range(1, len(ticks(said)) + 1))


def reported(said: list[str]) -> set[str]:
    return {line.split()[1] for line in corrupt(said)}


# -- it notices what is lost ------------------------------------------------------------------------------------------------


def page(guest: Machine, number: int) -> np.ndarray:
    return guest.region.pages[(WORKING_SET >> 12) + number]


def generation(guest: Machine, number: int) -> np.ndarray:
    return guest.region.view[GENERATIONS : GENERATIONS + 4 * PAGES].cast("I")[number : number + 1]


def lose_a_page(guest: Machine) -> None:
    written = [n for n in range(PAGES) if page(guest, n).any()]
    page(guest, written[0])[:] = 0


def damage_a_word(guest: Machine) -> None:
    page(guest, 7)[100] ^= 1


def exchange_two_pages(guest: Machine) -> None:
    one, other = [n for n in range(PAGES) if page(guest, n).any()][:2]
    page(guest, one)[:], page(guest, other)[:] = page(guest, other).copy(), page(guest, one).copy()


class Older:
    """Puts back what was there some ticks before."""

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self.ranges = ranges

    def __call__(self, guest: Machine) -> None:
        old = [bytes(guest.region.view[start : start + size]) for start, size in self.ranges]
        guest.run_ticks(16)
        for (start, _), content in zip(self.ranges, old, strict=True):
            guest.region.view[start : start + len(content)] = content


def change(part: str, field: str, value: Callable[[object], object]) -> Callable[[Machine], None]:
    def damage(guest: Machine) -> None:
        state = guest.save()
        state[part][field] = value(state[part][field])
        guest.load(state)

    return damage


def in_the_fifo(replace: Callable[[bytes], bytes]) -> Callable[[Machine], None]:
    def damage(guest: Machine) -> None:
        uart = guest.devices["uart16550"]
        for _ in range(100):
            guest.run()
            while not uart.rx:
                assert not guest.failures
            guest.rest()
            if uart.rx:  # it may have been emptied since
                uart.rx[:] = replace(bytes(uart.rx))
                return
        raise AssertionError("the guest was never stopped while bytes lay in the FIFO")

    return damage


def lose_interrupts(guest: Machine) -> None:
    guest.page.set_mask(guest.page.mask | 0b111)


def lose_the_alarm(guest: Machine) -> None:
    guest.devices["rtc"].irq().connect(None)


def older_vram(guest: Machine) -> None:
    vram = guest.devices["display"].streamed
    old = bytes(vram.view)
    guest.run_ticks(50)
    vram.view[:] = old


@pytest.mark.parametrize(
    ("damage", "noticed"),
    [
        pytest.param(lose_a_page, "page", id="a page is zero"),
        pytest.param(damage_a_word, "page", id="a word changed"),
        pytest.param(exchange_two_pages, "page", id="two pages changed places"),
        pytest.param(Older((WORKING_SET, PAGES * 4096)), "page", id="the working set is old"),
        pytest.param(Older((GENERATIONS, PAGES * 4)), "page", id="the generations are old"),
        pytest.param(
            Older((WORKING_SET, PAGES * 4096), (GENERATIONS, PAGES * 4)), "generations", id="both are old"
        ),
        pytest.param(older_vram, "vram", id="VRAM is old"),
        pytest.param(in_the_fifo(lambda fifo: fifo[:-1]), "uart_lost", id="a byte of the FIFO"),
        pytest.param(in_the_fifo(lambda fifo: fifo[:-1] + b"\xee"), "uart_byte", id="another byte"),
        pytest.param(in_the_fifo(lambda fifo: fifo + b"\xee"), "uart_extra", id="a byte too many"),
        pytest.param(change("rtc", "mono_ns", lambda ns: ns // 2), "rtc_back", id="time runs back"),
        pytest.param(
            change("rtc", "scratch", lambda tick: tick - 1), "scratch", id="a register of the rtc is old"
        ),
        pytest.param(change("display", "frames", lambda frames: frames - 1), "frames", id="frames"),
        pytest.param(change("cpu", "gs_base", lambda base: base + 1), "register", id="a register"),
        pytest.param(
            change("cpu", "xmm", lambda xmm: [*xmm[:15], bytes(16)]), "register", id="a vector register"
        ),
        pytest.param(lose_interrupts, "display_irq", id="interrupts"),
        pytest.param(lose_interrupts, "mask", id="the mask"),
        pytest.param(lose_the_alarm, "alarm_lost", id="an alarm's interrupt"),
    ],
)
def test_it_says_so_when_something_is_lost_and_goes_on(machine, damage, noticed):
    guest = machine(BUSY)
    guest.run_ticks(12)
    for _ in range(3):
        # Where it stops is chance: between looking at a value and storing the next one, what is damaged is never looked at.
        damage(guest)
        assert not corrupt(guest.said)
        enough = len(ticks(guest.said)) + 1000
        guest.run()
        # Most shows within four ticks; a tile of the screen within 48; an alarm counts as lost after a second.
        guest.listen(lambda said, enough=enough: noticed in reported(said) or len(ticks(said)) > enough)
        guest.rest()
        said = guest.run_ticks(3)
        if noticed in reported(said):
            break
    assert noticed in reported(said)
    assert ticks(said) == list(range(1, len(ticks(said)) + 1))


# -- the binary -------------------------------------------------------------------------------------------------------------

SOURCE = BUILT_IN_GUEST.parent


def test_the_committed_binary_is_what_the_source_makes(tmp_path):
    missing = [tool for tool in ("make", "gcc", "ld") if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"to rebuild the guest, {' and '.join(missing)} is missing: apt-get install build-essential"
        )
    ours = (SOURCE / "COMPILER").read_text().strip()
    found = subprocess.run(
        ["gcc", "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    if found != ours:
        pytest.skip(f"guest.bin was made by {ours}; this is {found}, which makes other bytes")
    subprocess.run(["make", "-C", SOURCE, f"OUT={tmp_path}"], check=True, capture_output=True)
    assert (tmp_path / "guest.bin").read_bytes() == BUILT_IN_GUEST.read_bytes(), (
        "run make -C devices/vcpu/guest, and commit guest.bin"
    )
