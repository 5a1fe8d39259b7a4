"""What a process offers: the standard interfaces and errors, seen by another D-Bus implementation."""

from __future__ import annotations

import asyncio
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from dbus_next import Message, MessageFlag, MessageType, Variant
from dbus_next.aio import MessageBus
from dbus_next.introspection import Node

from migrate.bus import Bus, Call, Interface, Method, PrivateBus, Property, Signal, device_interfaces
from migrate.bus.host import host_interface
from migrate.bus.job import job_interface
from migrate.bus.machine import machine_interface
from migrate.bus.supervisor import supervisor_interface
from migrate.errors import LocalProtocolError

OnBus = Callable[[Callable[[PrivateBus], Awaitable[Any]]], Any]
NAME = "org.vmferry.Test"
PROPERTIES = "org.freedesktop.DBus.Properties"
ERROR = "org.freedesktop.DBus.Error."


async def greet(call: Call, word: str, times: int) -> tuple[str, bytes]:
    return f"{word}, {call.sender}", bytes(times)


def broken() -> str:
    raise OSError(13, "denied", "/etc/shadow")


INTERFACE = Interface(
    NAME,
    methods=[Method("Greet", "su", "say", ["word", "times"], ["words", "zeros"], greet)],
    properties=[
        Property("Id", "s", lambda: "uart0"),
        Property("Versions", "au", lambda: [1, 2]),
        Property("Digest", "ay", lambda: b"\0\1"),
    ],
    signals=[Signal("Rang", "s", ["who"])],
)
# Each call, and the error or the body that the specification asks for.
CALLS: list[tuple[str, str | None, str, str, list[Any], str | list[Any]]] = [
    ("/a/b", NAME, "Greet", "s", ["x"], "InvalidArgs"),
    ("/a/b", NAME, "Greet", "us", [1, "x"], "InvalidArgs"),
    ("/a/b", NAME, "Grete", "", [], "UnknownMethod"),
    ("/a/b", "org.vmferry.Other", "Greet", "", [], "UnknownInterface"),
    ("/a/c", NAME, "Greet", "", [], "UnknownObject"),
    ("/a", NAME, "Greet", "", [], "UnknownObject"),
    ("/a/b", PROPERTIES, "Get", "ss", [NAME, "Id"], [Variant("s", "uart0")]),
    ("/a/b", PROPERTIES, "Get", "ss", [NAME, "Versions"], [Variant("au", [1, 2])]),
    ("/a/b", PROPERTIES, "Get", "ss", [NAME, "id"], "UnknownProperty"),
    ("/a/b", PROPERTIES, "Get", "ss", ["org.vmferry.Other", "Id"], "UnknownInterface"),
    ("/a/b", PROPERTIES, "Get", "ss", [PROPERTIES, "Id"], "UnknownProperty"),
    ("/a/b", PROPERTIES, "Get", "s", [NAME], "InvalidArgs"),
    ("/a/c", PROPERTIES, "Get", "ss", [NAME, "Id"], "UnknownObject"),
    ("/a/b", PROPERTIES, "Set", "ssv", [NAME, "Id", Variant("s", "x")], "PropertyReadOnly"),
    ("/a/b", PROPERTIES, "Set", "ssv", [NAME, "Nope", Variant("s", "x")], "UnknownProperty"),
    ("/a/b", PROPERTIES, "Change", "", [], "UnknownMethod"),
    (
        "/a/b",
        PROPERTIES,
        "GetAll",
        "s",
        [NAME],
        [{"Id": Variant("s", "uart0"), "Versions": Variant("au", [1, 2]), "Digest": Variant("ay", b"\0\1")}],
    ),
    ("/a/b", PROPERTIES, "GetAll", "s", ["org.freedesktop.DBus.Peer"], [{}]),
    ("/a/c", PROPERTIES, "GetAll", "s", [NAME], "UnknownObject"),
    ("/a/b", "org.freedesktop.DBus.Peer", "Ping", "", [], []),
    ("/anywhere", "org.freedesktop.DBus.Peer", "Ping", "", [], []),
    ("/a/b", "org.freedesktop.DBus.Peer", "Ping", "s", ["x"], "InvalidArgs"),
]


async def with_foreign_client(private: PrivateBus, *interfaces: Interface) -> tuple[Bus, Any]:
    """A service of ours and dbus-next's own connection to call it."""
    bus = await Bus.connect(private.address)
    bus.export("/a/b", *interfaces)
    return bus, await MessageBus(bus_address=private.address, negotiate_unix_fd=True).connect()


async def leave(bus: Bus, foreign: Any) -> None:
    foreign.disconnect()
    await foreign.wait_for_disconnect()
    foreign._sock.close()  # dbus-next leaves both to the garbage collector
    foreign._stream.close()
    await bus.close()


def test_every_standard_question_has_the_standard_answer(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus, foreign = await with_foreign_client(private, INTERFACE)
        for path, interface, member, signature, body, expected in CALLS:
            reply = await foreign.call(
                Message(bus.unique_name, path, interface, member, signature=signature, body=body)
            )
            seen: Any = reply.body
            if reply.message_type is MessageType.ERROR:
                seen = reply.error_name.removeprefix(ERROR)
            assert seen == expected, (path, interface, member, body)
        await leave(bus, foreign)

    on_bus(scenario)


def test_a_call_may_leave_the_interface_out(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus, foreign = await with_foreign_client(private, Interface("org.vmferry.First"), INTERFACE)
        reply = await foreign.call(
            Message(bus.unique_name, "/a/b", None, "Greet", signature="su", body=["hello", 2])
        )
        assert reply.body == [f"hello, {foreign.unique_name}", b"\0\0"]
        reply = await foreign.call(Message(bus.unique_name, "/a/b", None, "Nope"))
        assert reply.error_name == ERROR + "UnknownMethod"
        await leave(bus, foreign)

    on_bus(scenario)


def test_a_call_that_wants_no_answer_gets_none_and_is_done(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        called = asyncio.Event()

        async def note(_call: Call) -> None:
            called.set()
            raise ValueError("and nobody is told")

        bus, foreign = await with_foreign_client(
            private, Interface(NAME, [Method("Note", "", "", [], [], note)])
        )
        seen: list[Any] = []
        foreign.add_message_handler(seen.append)
        quiet = {"flags": MessageFlag.NO_REPLY_EXPECTED, "serial": 4321}
        await foreign.send(Message(bus.unique_name, "/a/b", NAME, "Note", **quiet))
        await foreign.send(Message(bus.unique_name, "/a/b", NAME, "Nope", **quiet))
        await asyncio.wait_for(called.wait(), 5)
        await foreign.call(Message(bus.unique_name, "/a/b", "org.freedesktop.DBus.Peer", "Ping"))
        assert not [message for message in seen if message.reply_serial == 4321]
        await leave(bus, foreign)

    on_bus(scenario)


def test_a_property_that_fails_tells_nothing_about_this_host(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus, foreign = await with_foreign_client(
            private, Interface(NAME, properties=[Property("Bad", "s", broken)])
        )
        for member, signature, body in (("Get", "ss", [NAME, "Bad"]), ("GetAll", "s", [NAME])):
            reply = await foreign.call(
                Message(bus.unique_name, "/a/b", PROPERTIES, member, signature=signature, body=body)
            )
            assert reply.error_name == "org.vmferry.Error.Internal"
            assert "shadow" not in reply.body[0]
            assert "Traceback" not in reply.body[0]
        await leave(bus, foreign)

    on_bus(scenario)


def test_introspection_leads_from_the_root_to_what_is_served(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus, foreign = await with_foreign_client(private, INTERFACE)
        bus.export("/a/z", INTERFACE)
        root = await foreign.introspect(bus.unique_name, "/")
        assert [node.name for node in root.nodes] == ["a"]
        assert not root.interfaces
        assert [node.name for node in (await foreign.introspect(bus.unique_name, "/a")).nodes] == ["b", "z"]
        node: Node = await foreign.introspect(bus.unique_name, "/a/b")
        assert {interface.name for interface in node.interfaces} == {
            NAME,
            "org.freedesktop.DBus.Introspectable",
            "org.freedesktop.DBus.Peer",
            PROPERTIES,
        }
        (ours,) = [interface for interface in node.interfaces if interface.name == NAME]
        (method,) = ours.methods
        assert (method.name, method.in_signature, method.out_signature) == ("Greet", "su", "say")
        assert [(item.name, item.signature, item.access.value) for item in ours.properties] == [
            ("Id", "s", "read"),
            ("Versions", "au", "read"),
            ("Digest", "ay", "read"),
        ]
        assert [(item.name, item.signature) for item in ours.signals] == [("Rang", "s")]
        await leave(bus, foreign)

    on_bus(scenario)


def test_an_interface_whose_names_do_not_fit_its_signature_cannot_be_made() -> None:
    with pytest.raises(LocalProtocolError, match=r"Greet: 1 names for the signature 'su'"):
        Interface(NAME, [Method("Greet", "su", "", ["word"], [], greet)])


def test_an_interface_is_exported_once(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        bus = await Bus.connect(private.address)
        bus.export("/a", INTERFACE)
        with pytest.raises(LocalProtocolError, match="already"):
            bus.export("/a", INTERFACE)
        bus.unexport("/a")
        bus.export("/a", INTERFACE)
        await bus.close()

    on_bus(scenario)


def shape(interface: ET.Element) -> Any:
    """All that matters of an `<interface>`: names, signatures, directions, and the order of arguments."""
    members = []
    for member in interface:
        args = [(arg.get("name"), arg.get("type"), arg.get("direction")) for arg in member.findall("arg")]
        members.append((member.tag, member.get("name"), member.get("type"), member.get("access"), args))
    return interface.get("name"), sorted(members, key=str)


def documented(name: str) -> Any:
    path = Path(__file__).parents[3] / "docs" / "dbus" / f"{name}.xml"
    (interface,) = ET.parse(path).getroot().findall("interface")  # our own file
    return shape(interface)


def served(interface: Interface) -> Any:
    return shape(ET.fromstring(interface.introspection()))


def test_what_is_served_is_what_docs_dbus_says() -> None:
    class Anything:
        def __getattr__(self, name: str) -> Any:
            return None

    nobody: Any = Anything()
    interfaces = (
        *device_interfaces(nobody),
        supervisor_interface(nobody),
        host_interface(nobody, nobody),
        machine_interface(nobody, "m", nobody, nobody),
        job_interface(nobody, "j", nobody, nobody),
    )
    for interface in interfaces:
        assert served(interface) == documented(interface.name)
