"""What a process offers on the bus, as tables, and the dispatch of calls to them.

An Interface is a table of methods, properties and signals; its introspection XML is made from that table, so it cannot say
something else than what is served. The standard interfaces (Introspectable, Properties, Peer) are served for every path.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import quoteattr

from migrate.bus import failures, library
from migrate.bus.failures import CallRefused
from migrate.bus.messages import Message
from migrate.errors import LocalProtocolError, RemoteProtocolError


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
        lines = [f"  <interface name={quoteattr(self.name)}>"]
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


class Answer:
    """What a call is answered with; `fds` are the answerer's to close once they are sent."""

    __slots__ = ("body", "signature")

    def __init__(self, signature: str = "", body: Sequence[Any] = ()) -> None:
        self.signature = signature
        self.body = body


class Exports:
    """The objects of one connection: which interfaces are at which path."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[str, Interface]] = {}

    def add(self, path: str, interfaces: Sequence[Interface]) -> None:
        """Raises LocalProtocolError where an interface is there already."""
        here = self._objects.setdefault(path, {})
        for interface in interfaces:
            if interface.name in here:
                raise LocalProtocolError(f"{interface.name} is exported at {path} already")
            here[interface.name] = interface

    def remove(self, path: str) -> None:
        self._objects.pop(path, None)

    def answer(self, message: Message) -> Answer | Awaitable[Answer]:
        """The answer to a call, or where one of our methods gives it, an awaitable of it.

        Raises CallRefused with the standard error for what is not there. The message's descriptors that were not given to
        a handler are left in it, for the caller to close.
        """
        fields = message.fields
        path, interface, member = fields.path or "", fields.interface, fields.member or ""
        standard = _STANDARD.get((interface, member)) if interface else None
        if standard is not None:
            signature, serve = standard
            if fields.signature != signature:
                raise _wrong_arguments(f"{interface}.{member}", signature, fields.signature)
            return serve(self, path, *decode_arguments(message))
        here = self._objects.get(path)
        if here is None:
            raise CallRefused(failures.UNKNOWN_OBJECT, f"nothing is at {path}")
        if interface is not None and interface not in here:
            if interface in _STANDARD_INTERFACES:
                raise CallRefused(failures.UNKNOWN_METHOD, f"{interface} has no method {member}")
            raise CallRefused(failures.UNKNOWN_INTERFACE, f"{interface} is not at {path}")
        # A call may leave the interface out; then the first that has such a method is meant.
        for candidate in here.values() if interface is None else (here[interface],):
            method = candidate.by_method.get(member)
            if method is not None:
                if fields.signature != method.in_signature:
                    raise _wrong_arguments(
                        f"{candidate.name}.{member}", method.in_signature, fields.signature
                    )
                call = Call(fields.sender or "", path, candidate.name, member)
                return _invoke(method, call, decode_arguments(message))
        raise CallRefused(failures.UNKNOWN_METHOD, f"{interface or path} has no method {member}")

    def _introspect(self, path: str) -> Answer:
        below = {
            name[len(path.rstrip("/")) + 1 :].split("/", 1)[0]
            for name in self._objects
            if name.startswith(path.rstrip("/") + "/")
        }
        lines = [_DOCTYPE, "<node>"]
        here = self._objects.get(path)
        if here is not None:
            lines += [interface.introspection() for interface in here.values()]
            lines.append(_STANDARD_XML)
        lines += [f"  <node name={quoteattr(name)}/>" for name in sorted(below)]
        return Answer("s", ["\n".join([*lines, "</node>\n"])])

    def _get(self, path: str, interface: str, name: str) -> Answer:
        return Answer("v", [_value(self._property(path, interface, name))])

    def _get_all(self, path: str, interface: str) -> Answer:
        found = self._interface(path, interface)
        return Answer("a{sv}", [{item.name: _value(item) for item in found.properties} if found else {}])

    def _set(self, path: str, interface: str, name: str, _value: object) -> Answer:
        self._property(path, interface, name)
        raise CallRefused(failures.PROPERTY_READ_ONLY, f"{interface}.{name} can only be read")

    def _ping(self, _path: str) -> Answer:
        return Answer()

    def _machine_id(self, _path: str) -> Answer:
        try:
            with open("/etc/machine-id", encoding="ascii") as file:
                return Answer("s", [file.read(64).strip()])
        except (OSError, ValueError):
            raise CallRefused(
                "org.freedesktop.DBus.Error.FileNotFound", "this host has no machine-id"
            ) from None

    def _property(self, path: str, interface: str, name: str) -> Property:
        found = self._interface(path, interface)
        if found is None or name not in found.by_property:
            raise CallRefused(failures.UNKNOWN_PROPERTY, f"{interface} has no property {name}")
        return found.by_property[name]

    def _interface(self, path: str, name: str) -> Interface | None:
        here = self._objects.get(path)
        if here is None:
            raise CallRefused(failures.UNKNOWN_OBJECT, f"nothing is at {path}")
        if name in _STANDARD_INTERFACES:
            return None
        if name not in here:
            raise CallRefused(failures.UNKNOWN_INTERFACE, f"{name} is not at {path}")
        return here[name]


def decode_arguments(message: Message) -> list[Any]:
    """The body's values, `h` as descriptors that are the caller's from now on. Raises CallRefused."""
    signature = message.fields.signature
    try:
        values = library.decode_body(signature, message.body, message.big_endian)
        if message.fds or "h" in signature:
            take_fds(signature, values, message)
    except RemoteProtocolError as error:
        raise CallRefused(failures.INVALID_ARGS, error.reason) from None
    return values


def take_fds(signature: str, values: list[Any], message: Message) -> None:
    """Put descriptors where `values` has indexes, and close those that nothing names. Raises RemoteProtocolError."""
    kinds = library.complete_types(signature)
    places = [place for place, kind in enumerate(kinds) if kind == "h"]
    indexes = [values[place] for place in places]
    if len(places) != signature.count("h") or len(set(indexes)) != len(indexes):
        raise RemoteProtocolError("descriptors are taken as plain arguments only, each of its own")
    if any(index >= len(message.fds) for index in indexes):
        raise RemoteProtocolError("a descriptor that was announced did not come")
    for place, index in zip(places, indexes, strict=True):
        values[place] = message.fds[index]
    message.fds = [fd for index, fd in enumerate(message.fds) if index not in indexes]
    message.close_fds()


async def _invoke(method: Method, call: Call, arguments: list[Any]) -> Answer:
    kinds = library.complete_types(method.in_signature) if "h" in method.in_signature else ()
    given = (
        [_identity(value) for kind, value in zip(kinds, arguments, strict=True) if kind == "h"]
        if kinds
        else []
    )
    try:
        result = await method.handler(call, *arguments)
    except BaseException:
        for identity in given:
            _close_if_same(identity)
        raise
    if not method.out_signature:
        return Answer()
    values = result if len(method.out_names) > 1 else (result,)
    if len(values) != len(method.out_names):
        raise TypeError(
            f"{call.interface}.{method.name} gives {len(values)} values of {len(method.out_names)}"
        )
    return Answer(method.out_signature, values)


def _identity(fd: int) -> tuple[int, int, int]:
    status = os.fstat(fd)
    return fd, status.st_dev, status.st_ino


def _close_if_same(identity: tuple[int, int, int]) -> None:
    """Close a descriptor unless the handler that raised had closed it, and its number is another file's by now."""
    try:
        if _identity(identity[0]) == identity:
            os.close(identity[0])
    except OSError:
        pass  # closed already


def _value(item: Property) -> Any:
    return library.variant(item.signature, item.getter())


def _wrong_arguments(method: str, wanted: str, got: str) -> CallRefused:
    return CallRefused(
        failures.INVALID_ARGS, f"{method} takes arguments of the signature {wanted!r}, not {got!r}"
    )


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


_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">'
)
_INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_PEER = "org.freedesktop.DBus.Peer"
_STANDARD_XML = """\
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect">
      <arg name="data" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="GetMachineId">
      <arg name="machine_uuid" type="s" direction="out"/>
    </method>
    <method name="Ping"/>
  </interface>
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface" type="s" direction="in"/>
      <arg name="property" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface" type="s" direction="in"/>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface" type="s" direction="in"/>
      <arg name="property" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
  </interface>"""
_STANDARD_INTERFACES = frozenset((_INTROSPECTABLE, _PROPERTIES, _PEER))
# The signature of the arguments and the method of Exports that answers.
_STANDARD: Mapping[tuple[str, str], tuple[str, Callable[..., Answer]]] = {
    (_INTROSPECTABLE, "Introspect"): ("", Exports._introspect),
    (_PROPERTIES, "Get"): ("ss", Exports._get),
    (_PROPERTIES, "GetAll"): ("s", Exports._get_all),
    (_PROPERTIES, "Set"): ("ssv", Exports._set),
    (_PEER, "Ping"): ("", Exports._ping),
    (_PEER, "GetMachineId"): ("", Exports._machine_id),
}
