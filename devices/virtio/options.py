"""Options of disks, whatever they are behind: numbers, switches, serial numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from migrate.errors import UsageError


def number(options: Mapping[str, str], key: str, otherwise: int, most: int) -> int:
    """:raise UsageError: it is not 1 to `most`."""
    text = options.get(key, str(otherwise))
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= most:
        raise UsageError(
            f"{key}={text} is not a number from 1 to {most}", remedy=f"leave it out for {otherwise}"
        )
    return int(text)


def switch(options: Mapping[str, str], key: str) -> bool:
    """:raise UsageError: it is neither on nor off."""
    text = options.get(key, "off")
    if text not in ("on", "off"):
        raise UsageError(f"{key}={text} is neither on nor off", remedy=f"write {key}=on or leave it out")
    return text == "on"


def choice(options: Mapping[str, str], key: str, choices: tuple[str, ...]) -> str:
    """The first is the default. :raise UsageError: it is none of them."""
    text = options.get(key, choices[0])
    if text not in choices:
        raise UsageError(f"{key}={text} is not one", remedy=f"one of: {', '.join(choices)}")
    return text


def serial_of(options: Mapping[str, str], device_id: str, most: int) -> str:
    """:raise UsageError: no disk can say that."""
    serial = options.get("serial", device_id[:most])
    if not re.fullmatch(rf"[ -~]{{0,{most}}}", serial):
        raise UsageError(
            f"serial={serial[:40]!r} is not at most {most} characters of ASCII", remedy="choose another"
        )
    return serial
