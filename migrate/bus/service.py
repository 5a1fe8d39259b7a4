"""What a process offers on the bus, as tables: interfaces of methods, properties and signals.

The introspection XML is made from the same table that calls are looked up in, so it cannot say something else than what is
served. exports.py looks up, serving.py answers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from migrate.bus import library
from migrate.errors import LocalProtocolError


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls what. `sender` is the caller's unique name, stamped by the bus; Bus.pid_of and uid_of tell more."""

    sender: str
    path: str
    interface: str
    member: str


@dataclass(frozen=True, slots=True)
class Method:
    """One method. `handler(call, *args)` gives None, one value, or a tuple where `out_signature` has several types.

    Descriptors (`h`, at the top level only) are plain ints. Those that come in are the handler's once it returns; where it
    raises, the dispatcher closes those it did not close itself. Those that a handler returns are given away: they are
    closed when they are sent.
    """

    name: str
    in_signature: str
    out_signature: str
    in_names: Sequence[str]
    out_names: Sequence[str]
    handler: Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Property:
    """A read-only property; `getter()` gives its value now."""

    name: str
    signature: str
    getter: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Signal:
    name: str
    signature: str
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    methods: Sequence[Method] = ()
    properties: Sequence[Property] = ()
    signals: Sequence[Signal] = ()
    by_method: Mapping[str, Method] = field(init=False, repr=False)
    by_property: Mapping[str, Property] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for method in self.methods:
            _check_names(method.in_signature, method.in_names, f"{self.name}.{method.name}")
            _check_names(method.out_signature, method.out_names, f"{self.name}.{method.name}")
        for signal in self.signals:
            _check_names(signal.signature, signal.names, f"{self.name}.{signal.name}")
        object.__setattr__(self, "by_method", {method.name: method for method in self.methods})
        object.__setattr__(self, "by_property", {item.name: item for item in self.properties})

    def introspection(self) -> str:
        """The `<interface>` element, as docs/dbus/*.xml has it."""
        lines = [f'  <interface name="{self.name}">']
        lines += [
            f'    <property name="{item.name}" type="{item.signature}" access="read"/>'
            for item in self.properties
        ]
        for method in self.methods:
            args = _args(method.in_signature, method.in_names, ' direction="in"')
            args += _args(method.out_signature, method.out_names, ' direction="out"')
            lines += _element("method", method.name, args)
        for signal in self.signals:
            lines += _element("signal", signal.name, _args(signal.signature, signal.names, ""))
        return "\n".join([*lines, "  </interface>"])


def _check_names(signature: str, names: Sequence[str], where: str) -> None:
    if len(library.complete_types(signature)) != len(names):
        raise LocalProtocolError(f"{where}: {len(names)} names for the signature {signature!r}")


def _args(signature: str, names: Sequence[str], direction: str) -> list[str]:
    kinds = library.complete_types(signature)
    return [
        f'      <arg name="{name}" type="{kind}"{direction}/>'
        for name, kind in zip(names, kinds, strict=True)
    ]


def _element(tag: str, name: str, args: list[str]) -> list[str]:
    if not args:
        return [f'    <{tag} name="{name}"/>']
    return [f'    <{tag} name="{name}">', *args, f"    </{tag}>"]
