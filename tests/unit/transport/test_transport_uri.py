"""Destinations and listen addresses: what is read, and what a person is told about what is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import UsageError
from migrate.transport.uri import (
    ExecDestination,
    LocalDestination,
    TlsDestination,
    UnixDestination,
    parse,
    parse_listen,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tls://hostb:4789", TlsDestination("hostb", 4789)),
        ("tls://hostb.example:1?name=b.internal", TlsDestination("hostb.example", 1, "b.internal")),
        ("tls://192.0.2.7:65535", TlsDestination("192.0.2.7", 65535)),
        ("tls://[2001:db8::7]:4789", TlsDestination("2001:db8::7", 4789)),
        ("tls://[fe80::1%eth0]:4789", TlsDestination("fe80::1%eth0", 4789)),
        ("TLS://h:1?name=2001:db8::7", TlsDestination("h", 1, "2001:db8::7")),
        ("unix:/run/a b?c.sock", UnixDestination("/run/a b?c.sock")),
        ("unix:///run/x.sock", UnixDestination("/run/x.sock")),
        ("exec:ssh -p 22 hostb ferry accept", ExecDestination("ssh -p 22 hostb ferry accept")),
        ("local:", LocalDestination()),
    ],
)
def test_every_form_is_read(text: str, expected: object) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hostb", "no scheme"),
        ("hostb:4789", "no scheme"),
        ("hostb.example:4789", "no scheme"),
        ("", "no scheme"),
        ("tcp://hostb:4789", "clear"),
        ("ssh://hostb", "exec:ssh hostb ferry accept"),
        ("http://hostb:80", "http:"),
        ("tls:hostb:4789", "two slashes"),
        ("tls://hostb", "port is missing"),
        ("tls://hostb:", "port is missing"),
        ("tls://hostb:0", "'0' is not a port"),
        ("tls://hostb:65536", "not a port"),
        ("tls://hostb:４", "not a port"),
        ("tls://hostb:4789/x", "not a port"),
        ("tls://:4789", "not a host's name"),
        ("tls://user@hostb:4789", "not a host's name"),
        ("tls://2001:db8::7:4789", "needs brackets"),
        ("tls://[hostb]:4789", "not an IPv6 address"),
        ("tls://[::1]4789", "not a port"),
        ("tls://hostb:1?nmae=x", "'nmae' is not an option"),
        ("tls://hostb:1?name=", "not a name"),
        ("tls://hostb:1?name=*", "not a name"),
        ("unix:run/x.sock", "not absolute"),
        ("unix:/" + "x" * 107, "108 bytes"),
        ("exec:", "no command"),
        ("exec:  ", "no command"),
        ("local:x", "nothing may follow"),
    ],
)
def test_a_wrong_destination_is_refused_by_saying_what_is_wrong_and_what_to_write(
    text: str, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_listen_address_is_tls_with_any_port_or_unix() -> None:
    assert parse_listen("tls://0.0.0.0:0") == TlsDestination("0.0.0.0", 0)
    assert parse_listen("unix:/run/x.sock") == UnixDestination("/run/x.sock")


@pytest.mark.parametrize("text", ["exec:cat", "local:", "tls://hostb:1?name=b", "hostb:1", "tls://hostb"])
def test_a_host_cannot_listen_elsewhere(text: str) -> None:
    with pytest.raises(UsageError):
        parse_listen(text)


def test_the_name_wanted_of_a_certificate_is_the_host_unless_told() -> None:
    assert TlsDestination("hostb", 1).certificate_name == "hostb"
    assert TlsDestination("10.0.0.1", 1, "hostb").certificate_name == "hostb"
    assert TlsDestination("fe80::1%eth0", 1).certificate_name == "fe80::1"


@given(
    st.one_of(
        st.builds(
            TlsDestination,
            st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{1,9})?", fullmatch=True)
            | st.ip_addresses().map(str),
            st.integers(1, 65535),
            st.none() | st.from_regex(r"[a-z]{1,20}", fullmatch=True),
        ),
        st.builds(UnixDestination, st.from_regex(r"/[a-z?# .]{1,90}", fullmatch=True)),
        st.builds(ExecDestination, st.from_regex(r"[a-z][ -~]{0,60}", fullmatch=True)),
    )
)
def test_what_is_printed_is_read_back(
    destination: TlsDestination | UnixDestination | ExecDestination,
) -> None:
    assert parse(str(destination)) == destination


@given(st.text(max_size=60) | st.text(max_size=40).map("tls://".__add__))
def test_any_text_is_read_or_refused_as_usage(text: str) -> None:
    for read in (parse, parse_listen):
        try:
            read(text)
        except UsageError as error:
            assert error.remedy
