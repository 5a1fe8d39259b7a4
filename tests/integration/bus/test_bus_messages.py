"""Headers and bodies, with dbus-next's own codec of whole messages as the other opinion."""

from __future__ import annotations

import io
import os
import struct
from typing import Any

import pytest
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message as TheirMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate.bus import library
from migrate.bus.descriptors import take_fds
from migrate.bus.messages import (
    FIXED,
    MAX_MESSAGE,
    Fields,
    Kind,
    Message,
    decode,
    encode_header,
    frame_length,
)
from migrate.errors import LocalProtocolError, RemoteProtocolError

# The machine that runs this may be busy: how long an example takes is no finding.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
words = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True)
dotted = st.lists(words, min_size=2, max_size=4).map(".".join)
paths = st.lists(words, max_size=4).map(lambda parts: "/" + "/".join(parts))
serials = st.integers(1, 0xFFFFFFFF)
texts = st.text("aZ0 /.\\'\"\n\x7fé€😀", max_size=30)

# Signature and a strategy of values, for every type that our interfaces use and the containers around them.
BODIES: list[tuple[str, st.SearchStrategy[Any]]] = [
    ("y", st.integers(0, 255)),
    ("b", st.booleans()),
    ("n", st.integers(-(2**15), 2**15 - 1)),
    ("q", st.integers(0, 2**16 - 1)),
    ("i", st.integers(-(2**31), 2**31 - 1)),
    ("u", st.integers(0, 2**32 - 1)),
    ("x", st.integers(-(2**63), 2**63 - 1)),
    ("t", st.integers(0, 2**64 - 1)),
    ("s", texts),
    ("o", paths),
    ("ay", st.binary(max_size=40)),
    ("au", st.lists(st.integers(0, 2**32 - 1), max_size=5)),
    ("as", st.lists(texts, max_size=5)),
    ("a{st}", st.dictionaries(texts, st.integers(0, 2**64 - 1), max_size=4)),
    ("(sxb)", st.tuples(texts, st.integers(-(2**63), 2**63 - 1), st.booleans()).map(list)),
    ("a(st)", st.lists(st.tuples(texts, st.integers(0, 2**64 - 1)).map(list), max_size=4)),
]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, list[Any]]:
    chosen = draw(st.lists(st.sampled_from(BODIES), max_size=5))
    return "".join(signature for signature, _ in chosen), [draw(values) for _, values in chosen]


@patient
@given(bodies())
def test_a_body_comes_back_as_it_was_sent(sent: tuple[str, list[Any]]) -> None:
    signature, body = sent
    assert (
        library.decode_body(signature, bytes(library.encode_body(signature, body)), big_endian=False) == body
    )


@patient
@given(paths, dotted, words, bodies(), serials)
def test_the_library_reads_our_calls_as_we_meant_them(
    path: str, interface: str, member: str, body: tuple[str, list[Any]], serial: int
) -> None:
    encoded = library.encode_body(*body)
    fields = Fields(path, interface, member, None, 0, "org.vmferry.Test", None, body[0])
    frame = encode_header(Kind.CALL, serial, len(encoded), fields, flags=2) + encoded
    assert frame_length(frame[:FIXED]) == len(frame)
    theirs = Unmarshaller(io.BytesIO(frame)).unmarshall()
    assert (theirs.path, theirs.interface, theirs.member) == (path, interface, member)
    assert (theirs.destination, theirs.signature, theirs.body) == ("org.vmferry.Test", body[0], body[1])
    assert (theirs.serial, theirs.message_type, theirs.flags) == (
        serial,
        MessageType.METHOD_CALL,
        MessageFlag.NO_AUTOSTART,
    )


@patient
@given(serials, serials, dotted, bodies())
def test_the_library_reads_our_replies_and_errors_as_we_meant_them(
    serial: int, answers: int, name: str, body: tuple[str, list[Any]]
) -> None:
    encoded = library.encode_body(*body)
    for kind, fields in (
        (Kind.RETURN, Fields(destination=":1.5", signature=body[0])),
        (Kind.ERROR, Fields(error_name=name, destination=":1.5", signature=body[0])),
    ):
        header = encode_header(kind, serial, len(encoded), fields, reply_serial=answers)
        theirs = Unmarshaller(io.BytesIO(header + encoded)).unmarshall()
        assert (theirs.reply_serial, theirs.destination, theirs.body) == (answers, ":1.5", body[1])
        assert theirs.error_name == (name if kind is Kind.ERROR else None)


@patient
@given(paths, dotted, words, texts, serials)
def test_we_read_the_library_s_messages_as_it_meant_them(
    path: str, interface: str, member: str, text: str, serial: int
) -> None:
    call = TheirMessage(
        ":1.2", path, interface, member, signature="s", body=[text], serial=serial, unix_fds=[7, 8]
    )
    ours = read(bytes(call._marshall(negotiate_unix_fd=True)))
    assert ours.fields == Fields(path, interface, member, None, 0, ":1.2", None, "s", 2)
    assert (ours.kind, ours.serial, ours.reply_serial) == (Kind.CALL, serial, 0)
    assert library.decode_body("s", ours.body, ours.big_endian) == [text]
    error = TheirMessage.new_error(call, "org.vmferry.Error.Test", text)
    error.serial, error.sender = 9, ":1.3"
    ours = read(bytes(error._marshall()))
    assert (ours.kind, ours.reply_serial, ours.fields.error_name) == (
        Kind.ERROR,
        serial,
        "org.vmferry.Error.Test",
    )


def test_a_big_endian_peer_is_understood() -> None:
    fields = struct.pack(">BBBBI", 5, 1, ord("u"), 0, 77) + bytes((8, 1, ord("g"), 0, 3)) + b"its\0"
    # "its": an int, a 64-bit number aligned to 8, a string.
    body = struct.pack(">iiQI", -7, 0, 1 << 40, 3) + b"abc\0"
    header = (
        struct.pack(">cBBBIII", b"B", 2, 1, 1, len(body), 5, len(fields)) + fields + bytes(-len(fields) % 8)
    )
    message = read(header + body)
    assert (message.reply_serial, message.fields.signature) == (77, "its")
    assert library.decode_body("its", message.body, message.big_endian) == [-7, 1 << 40, "abc"]


def test_variants_are_plain_values_when_they_arrive() -> None:
    inner = library.variant("as", ["a"])
    body = [{"list": inner, "number": library.variant("t", 5), "nested": library.variant("v", inner)}]
    encoded = bytes(library.encode_body("a{sv}", body))
    assert library.decode_body("a{sv}", encoded, False) == [{"list": ["a"], "number": 5, "nested": ["a"]}]


@patient
@given(st.binary(min_size=FIXED, max_size=300))
def test_no_bytes_make_the_header_reader_fail_in_a_way_of_its_own(noise: bytes) -> None:
    for start in (noise[:4], b"l\x01\x00\x01", b"B\x02\x00\x01"):
        frame = start + noise[4:8][:1] + bytes(3) + noise[8:12] + noise[12:13] + bytes(3) + noise[16:]
        try:
            length = frame_length(frame[:FIXED])
            message = decode((frame + bytes(length))[:length])
            library.decode_body(message.fields.signature, message.body, message.big_endian)
        except RemoteProtocolError:
            pass


def test_a_field_nobody_knows_is_passed_over() -> None:
    unknown = bytes((200, 1, ord("t"), 0, 0, 0, 0, 0)) + bytes(8)
    fields = unknown + bytes((3, 1, ord("s"), 0)) + struct.pack("<I", 4) + b"Ping\0"
    header = struct.pack("<cBBBIII", b"l", 1, 0, 1, 0, 5, len(fields)) + fields + bytes(-len(fields) % 8)
    assert read(header).fields.member == "Ping"


def test_a_body_is_not_taken_for_the_header_s_first_field() -> None:
    body = bytes((5, 1, ord("u"), 0, 9, 0, 0, 0))
    message = read(struct.pack("<cBBBIII", b"l", 2, 1, 1, len(body), 5, 0) + body)
    assert (message.reply_serial, message.fields, message.body) == (0, Fields(), body)


@pytest.mark.parametrize(
    ("signature", "values", "why"),
    [("hh", [0, 0], "each of its own"), ("ah", [[0]], "plain arguments"), ("h", [1], "did not come")],
)
def test_descriptors_that_are_named_in_an_odd_way_are_refused(
    signature: str, values: list[Any], why: str
) -> None:
    message = Message(1, 0, 1, 0, Fields(signature=signature), b"", False, [os.memfd_create("x")])
    with pytest.raises(RemoteProtocolError, match=why):
        take_fds(signature, values, message)
    message.close_fds()


def test_a_length_is_refused_before_anything_of_it_is_read() -> None:
    for body, fields in ((0xFFFFFFFF, 0), (0, 0xFFFFFFF0), (MAX_MESSAGE, 0)):
        with pytest.raises(RemoteProtocolError, match="limit"):
            frame_length(struct.pack("<cBBBIII", b"l", 1, 0, 1, body, 1, fields))
    with pytest.raises(RemoteProtocolError, match="not D-Bus"):
        frame_length(b"HTTP/1.1 200 OK\r")


def test_a_message_over_the_limit_is_not_made() -> None:
    with pytest.raises(LocalProtocolError, match="memfd"):
        encode_header(Kind.CALL, 1, MAX_MESSAGE, Fields("/", "a.b", "C"))


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("u", [-1]),
        ("u", ["1"]),
        ("s", [1]),
        ("s", []),
        ("", [1]),
        ("ay", ["text"]),
        ("q", [65536]),
        ("(", [1]),
    ],
)
def test_a_value_that_does_not_fit_its_type_is_an_error_of_ours(signature: str, body: list[Any]) -> None:
    with pytest.raises((LocalProtocolError, RemoteProtocolError)):
        library.encode_body(signature, body)


def test_a_body_that_ends_too_early_is_an_error_of_the_peer() -> None:
    encoded = bytes(library.encode_body("su", ["hello", 1]))
    for length in range(len(encoded)):
        with pytest.raises(RemoteProtocolError):
            library.decode_body("su", encoded[:length], False)


def read(frame: bytes) -> Message:
    assert frame_length(frame[:FIXED]) == len(frame)
    return decode(frame)
