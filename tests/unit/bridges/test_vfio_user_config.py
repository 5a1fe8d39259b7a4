"""The configuration space of a function behind a server that knows nothing of ours: which registers are put back, and whose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.bridges.vfio_user import config


def space(*capabilities: tuple[int, int, bytes], **fields: int) -> bytearray:
    """:param capabilities: offset, identity and what follows the pointer to the next."""
    made = bytearray(config.SIZE)
    made[0:4] = b"\x34\x12\x78\x56"
    if capabilities:
        made[0x06] = 0x10
        made[0x34] = capabilities[0][0]
    for (offset, identity, rest), following in zip(
        capabilities, [*capabilities[1:], (0, 0, b"")][: len(capabilities)], strict=True
    ):
        made[offset : offset + 2 + len(rest)] = bytes((identity, following[0])) + rest
    for name, value in fields.items():
        made[int(name[1:], 16)] = value
    return made


def offsets(made: bytes) -> list[int]:
    return [register.offset for register in config.registers(made)]


def test_a_plain_function_has_its_bars_lines_and_command_put_back_the_command_last() -> None:
    assert offsets(bytes(space())) == [0x0C, 0x0D, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x24, 0x30, 0x3C, 0x04]


@pytest.mark.parametrize(
    ("identity", "control", "registers"),
    [
        (0x01, b"", [0x44]),
        (0x11, b"\x05\x80", [0x42]),
        (0x10, b"", [0x48, 0x50, 0x68, 0x70]),
        (0x05, b"\x00\x00", [0x44, 0x48, 0x42]),
        (0x05, b"\x80\x01", [0x44, 0x48, 0x4C, 0x50, 0x42]),
        (0x05, b"\x80\x00", [0x44, 0x48, 0x4C, 0x42]),
        (0x09, b"\x10", []),  # a vendor's own: nobody knows what a write there does
    ],
    ids=["power", "msi-x", "express", "msi", "msi wide masked", "msi wide", "vendor"],
)
def test_of_a_capability_what_a_guest_sets_is_put_back_and_that_it_is_on_last(
    identity: int, control: bytes, registers: list[int]
) -> None:
    assert offsets(bytes(space((0x40, identity, control))))[10:-1] == registers


def test_all_capabilities_of_a_list_are_found_and_a_list_in_circles_ends() -> None:
    made = space((0x40, 0x01, b""), (0x60, 0x11, b"\0\0"))
    assert offsets(bytes(made))[10:-1] == [0x44, 0x62]
    made[0x61] = 0x40
    assert offsets(bytes(made))[10:-1] == [0x44, 0x62]


@given(st.binary(min_size=config.SIZE, max_size=config.SIZE))
def test_whatever_a_space_holds_no_register_is_outside_of_it(made: bytes) -> None:
    for register in config.registers(made):
        assert len(config.value(made + bytes(64), register)) == register.size
        assert register.offset + register.size <= config.SIZE + 0x32


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"x00": 1}, "vendor 0x1201 where this one has 0x1234"),
        ({"x09": 2}, "revision and class"),
        ({"x2c": 7}, "subsystem"),
        ({"x41": 0x50}, "its list of capabilities"),
    ],
)
def test_another_function_is_told_by_what_differs(fields: dict[str, int], why: str) -> None:
    ours = bytes(space((0x40, 0x11, b"")))
    assert config.of_one_function(ours, bytes(space((0x40, 0x11, b""), x04=6, x10=0xFF, x3c=9))) == []
    [told] = config.of_one_function(ours, bytes(space((0x40, 0x11, b""), **fields)))
    assert why in told
