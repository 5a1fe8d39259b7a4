"""Steps between neighbouring schema versions that the rule of upgrades.py cannot take: one function each way, in one table.

A step gets a state that fits the one version and answers with what becomes of it in the other; it may leave names in that the
other does not have. Where going down would lose what is needed it raises `Lost`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

Step = Callable[[Mapping[str, object]], Mapping[str, object]]


class Lost(Exception):
    """What this field says would be lost. Never leaves `migrate.state`."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name)
        self.name, self.why = name, why


#: Receive triggers by FCR's bits 7 and 6, on a PC16550D.
_TRIGGERS: Final = (1, 4, 8, 14)


def _uart_down(state: Mapping[str, object]) -> Mapping[str, object]:
    """Version 1 works the trigger out of FCR, which is 0 while the FIFOs are off."""
    fcr = state["fcr"]
    assert isinstance(fcr, int)
    follows = _TRIGGERS[fcr >> 6]
    if state["rx_trigger"] != follows:
        raise Lost("rx_trigger", f"is {state['rx_trigger']} and not the {follows} that follows from FCR")
    return {name: value for name, value in state.items() if name != "rx_trigger"}


def _uart_up(state: Mapping[str, object]) -> Mapping[str, object]:
    fcr = state["fcr"]
    assert isinstance(fcr, int)
    return {**state, "rx_trigger": _TRIGGERS[fcr >> 6]}


def _uart_split(state: Mapping[str, object]) -> Mapping[str, object]:
    divisor = state["divisor"]
    assert isinstance(divisor, int)
    rest = {name: value for name, value in state.items() if name != "divisor"}
    return {**rest, "dll": divisor & 0xFF, "dlm": divisor >> 8}


def _uart_join(state: Mapping[str, object]) -> Mapping[str, object]:
    low, high = state["dll"], state["dlm"]
    assert isinstance(low, int)
    assert isinstance(high, int)
    return {**state, "divisor": high << 8 | low}


def _rtc_name_the_alarm(state: Mapping[str, object]) -> Mapping[str, object]:
    return {**state, "alarm_fired": state["irq_pending"]}


def _rtc_name_the_interrupt(state: Mapping[str, object]) -> Mapping[str, object]:
    rest = {name: value for name, value in state.items() if name != "alarm_fired"}
    return {**rest, "irq_pending": state["alarm_fired"]}


def _rtc_halves(state: Mapping[str, object]) -> dict[str, object]:
    """The high halves as they are where no guest is between two reads."""
    guest, mono = state["guest_ns"], state["mono_ns"]
    assert isinstance(guest, int)
    assert isinstance(mono, int)
    return {"time_high": guest >> 32, "mono_high": mono >> 32}


def _rtc_halves_when_needed(state: Mapping[str, object]) -> Mapping[str, object]:
    half = {name: state[name] for name in ("time_high", "mono_high")}
    return {**state, "half_read": half if half != _rtc_halves(state) else None}


def _rtc_halves_always(state: Mapping[str, object]) -> Mapping[str, object]:
    """Version 2 has room for what the subsection says: nothing is lost."""
    half = state.get("half_read") or _rtc_halves(state)
    assert isinstance(half, Mapping)
    return {**{name: value for name, value in state.items() if name != "half_read"}, **half}


#: (device type, from version, to version) → what becomes of a state.
STEPS: Final[Mapping[tuple[str, int, int], Step]] = {
    ("uart16550", 2, 1): _uart_down,
    ("uart16550", 1, 2): _uart_up,
    ("uart16550", 3, 2): _uart_split,
    ("uart16550", 2, 3): _uart_join,
    ("rtc", 1, 2): _rtc_name_the_alarm,
    ("rtc", 2, 1): _rtc_name_the_interrupt,
    ("rtc", 2, 3): _rtc_halves_when_needed,
    ("rtc", 3, 2): _rtc_halves_always,
}
