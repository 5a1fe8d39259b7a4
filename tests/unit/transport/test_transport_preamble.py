"""The first 32 bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import LocalProtocolError, RemoteProtocolError
from migrate.transport.preamble import SIZE, Kind, Preamble, decode, encode

SESSION = bytes(range(16))

preambles = st.builds(
    Preamble, st.just(Kind.PAGE), st.integers(0, 255), st.binary(min_size=16, max_size=16)
) | st.builds(Preamble, st.just(Kind.CONTROL), st.just(0), st.binary(min_size=16, max_size=16))


@given(preambles)
def test_what_is_encoded_is_decoded(preamble: Preamble) -> None:
    assert decode(encode(preamble)) == preamble


def test_the_bytes_are_those_of_the_table() -> None:
    assert encode(Preamble(Kind.PAGE, 3, SESSION)) == b"VMFERRY\x01" + b"\x01\x03" + bytes(6) + SESSION


@given(
    st.binary(max_size=40)
    | preambles.map(encode).flatmap(lambda good: st.integers(0, SIZE).map(lambda n: good[:n]))
)
def test_any_bytes_are_a_preamble_or_a_protocol_error(data: bytes) -> None:
    try:
        decoded = decode(data)
    except RemoteProtocolError as error:
        assert error.remedy
    else:
        assert encode(decoded) == data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: hostb\r\n\r\n\r\n", "speaks HTTP"),
        (b"\x16\x03\x01\x02\x00\x01" + bytes(26), "TLS at once"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb", "speaks SSH"),
        (bytes(32), "not a vmferry"),
        (b"", "after 0 of the first 32 bytes"),
        (b"VMFERRY\x01\x00", "after 9 of the first 32 bytes"),
        (b"VMFERRY\x02" + bytes(24), "version 2"),
        (b"VMFERRY\x01\x02" + bytes(23), "kind 2"),
        (b"VMFERRY\x01\x00\x01" + bytes(22), "index 1"),
        (b"VMFERRY\x01\x01\x00" + b"\0\0\0\0\0\1" + bytes(16), "does not exist"),
    ],
)
def test_garbage_is_named_for_what_it_looks_like(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        decode(data)


@pytest.mark.parametrize(
    "wrong",
    [Preamble(Kind.CONTROL, 1, SESSION), Preamble(Kind.PAGE, 256, SESSION), Preamble(Kind.PAGE, 0, b"short")],
)
def test_we_do_not_send_a_preamble_that_nobody_would_take(wrong: Preamble) -> None:
    with pytest.raises(LocalProtocolError):
        encode(wrong)
