"""A real device of which one hook fails: for the demo's `load-failure` scenario and for tests of what happens then.

    python -m devices.faulty uart16550 --fail apply --id uart0 …    (the other arguments are the device's own)

Nothing else is changed: the class, its schema, its registers are the real ones.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, NoReturn

from devices.kit import Device, main
from migrate.errors import DeviceRefused, Phase


def _raise(device: Device, *_: object) -> NoReturn:
    raise RuntimeError("told to fail by devices.faulty")


def _refuse(device: Device, *_: object) -> NoReturn:
    raise DeviceRefused(
        "told to refuse by devices.faulty", remedy="start the real device", phase=Phase.LOAD, device=device.id
    )


def _hang(device: Device, *_: object) -> NoReturn:
    while True:
        threading.Event().wait()


#: What --fail takes: the hook of Device, and what it does instead.
FAULTS: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "save": ("save", _raise),
    "hang-save": ("save", _hang),
    "stage": ("check", _refuse),
    "apply": ("load", _raise),
    "hang-apply": ("load", _hang),
    "start": ("start", _raise),
    "rest": ("enter_p2p", _raise),
    "stop": ("stop", _raise),
}


def faulty(device_class: type[Device], fault: str) -> type[Device]:
    """`device_class` with that fault."""
    hook, action = FAULTS[fault]
    made: type[Device] = type(
        device_class.__name__, (device_class,), {hook: action, "__module__": device_class.__module__}
    )
    return made


def find(type_name: str) -> type[Device]:
    """The class of a device type. :raise LookupError: there is none."""
    module = _module(type_name)
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Device)
            and getattr(value, "type", None) == type_name
        ):
            return value
    raise LookupError(f"{module.__name__} has no device of type {type_name}")


def _module(type_name: str) -> ModuleType:
    for entry in entry_points(group="vmferry.devices", name=type_name):
        return importlib.import_module(entry.value)
    if re.fullmatch(r"[a-z][a-z0-9_]*", type_name):
        try:
            return importlib.import_module(f"devices.{type_name}")
        except ModuleNotFoundError:
            pass
    raise LookupError(f"there is no device type {type_name!r}")


def run(argv: Sequence[str] | None = None) -> NoReturn:
    parser = argparse.ArgumentParser(
        prog="python -m devices.faulty", allow_abbrev=False, description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("type", help="the device type, such as uart16550")
    parser.add_argument("--fail", required=True, choices=sorted(FAULTS), help="what is to fail")
    arguments, rest = parser.parse_known_args(argv)
    try:
        device_class = find(arguments.type)
    except LookupError as error:
        parser.error(str(error))
    main(faulty(device_class, arguments.fail), rest)


if __name__ == "__main__":
    run(sys.argv[1:])
