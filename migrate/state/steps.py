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


#: (device type, from version, to version) → what becomes of a state.
STEPS: Final[Mapping[tuple[str, int, int], Step]] = {
    ("uart16550", 2, 1): _uart_down,
    ("uart16550", 1, 2): _uart_up,
}
