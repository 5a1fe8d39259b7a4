"""The objects that a process offers on one connection: what a call leads to, and the standard interfaces.

Introspectable, Properties and Peer are served for every object; Properties.Set is always refused, nothing of ours is written
that way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from migrate.bus import failures, library
from migrate.bus.descriptors import close_if_same, identity, take_fds
from migrate.bus.failures import CallRefused
from migrate.bus.messages import Message
from migrate.bus.service import Call, Interface, Method, Property
from migrate.errors import LocalProtocolError, RemoteProtocolError


class Answer:
    """What a call is answered with; descriptors in it are closed when it was sent."""

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
            return serve(self, path, *_arguments(message))
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
                return _invoke(method, call, _arguments(message))
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
        lines += [f'  <node name="{name}"/>' for name in sorted(below)]
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


def _arguments(message: Message) -> list[Any]:
    """The body's values, `h` as descriptors that are the caller's from now on. Raises CallRefused."""
    signature = message.fields.signature
    try:
        values = library.decode_body(signature, message.body, message.big_endian)
        if message.fds or "h" in signature:
            take_fds(signature, values, message)
    except RemoteProtocolError as error:
        raise CallRefused(failures.INVALID_ARGS, error.reason) from None
    return values


async def _invoke(method: Method, call: Call, arguments: list[Any]) -> Answer:
    kinds = library.complete_types(method.in_signature) if "h" in method.in_signature else ()
    given = (
        [identity(value) for kind, value in zip(kinds, arguments, strict=True) if kind == "h"]
        if kinds
        else []
    )
    try:
        result = await method.handler(call, *arguments)
    except BaseException:
        for known in given:
            close_if_same(known)
        raise
    if not method.out_signature:
        return Answer()
    values = result if len(method.out_names) > 1 else (result,)
    if len(values) != len(method.out_names):
        raise TypeError(
            f"{call.interface}.{method.name} gives {len(values)} values of {len(method.out_names)}"
        )
    return Answer(method.out_signature, values)


def _value(item: Property) -> Any:
    return library.variant(item.signature, item.getter())


def _wrong_arguments(method: str, wanted: str, got: str) -> CallRefused:
    return CallRefused(
        failures.INVALID_ARGS, f"{method} takes arguments of the signature {wanted!r}, not {got!r}"
    )


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
