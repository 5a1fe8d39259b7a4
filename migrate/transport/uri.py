"""Where a migration goes and where a host listens: the four forms of a URI, parsed and nothing else.

    tls://HOST:PORT[?name=CERTNAME]   TCP with mutual TLS 1.3; IPv6 in brackets; `name` where the certificate is for another name
    unix:/PATH                        a Unix socket on this host
    exec:COMMAND                      a command's stdin and stdout, run by `sh -c`
    local:                            the same host, memory by descriptor

Nothing is resolved or opened here.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import NoReturn

from migrate.errors import UsageError

#: sun_path of struct sockaddr_un is 108 bytes with its NUL (unix(7)).
MAX_UNIX_PATH = 107

EXAMPLE = "tls://hostb.example:4789, unix:/run/vmferry/host.sock or 'exec:ssh hostb ferry accept'"
LISTEN_EXAMPLE = "tls://0.0.0.0:4789 or unix:/run/vmferry/host.sock"

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


@dataclass(frozen=True, slots=True)
class TlsDestination:
    """TCP with mutual TLS 1.3. `name` is what the peer's certificate must say; without it, `host`."""

    host: str
    port: int
    name: str | None = None

    @property
    def certificate_name(self) -> str:
        return self.name if self.name is not None else self.host.partition("%")[0]

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tls://{host}:{self.port}" + (f"?name={self.name}" if self.name is not None else "")


@dataclass(frozen=True, slots=True)
class UnixDestination:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class ExecDestination:
    command: str

    def __str__(self) -> str:
        return f"exec:{self.command}"


@dataclass(frozen=True, slots=True)
class LocalDestination:
    def __str__(self) -> str:
        return "local:"


Destination = TlsDestination | UnixDestination | ExecDestination | LocalDestination
ListenAddress = TlsDestination | UnixDestination


def parse(text: str) -> Destination:
    """Read a destination.

    :raise UsageError: naming what is wrong, with an example.
    """
    scheme, rest = _split(text, EXAMPLE)
    if scheme == "tls":
        return _parse_tls(text, rest, lowest_port=1)
    if scheme == "unix":
        return _parse_unix(text, rest, EXAMPLE)
    if scheme == "exec":
        if not rest.strip() or "\0" in rest:
            _refuse(
                text, "there is no command after exec:", "write it as one word: 'exec:ssh hostb ferry accept'"
            )
        return ExecDestination(rest)
    if scheme == "local":
        if rest:
            _refuse(text, "nothing may follow local:", "write just local:")
        return LocalDestination()
    return _unknown_scheme(text, scheme, EXAMPLE)


def parse_listen(text: str) -> ListenAddress:
    """Read an address to listen on: tls:// (port 0 lets the kernel choose) or unix:.

    :raise UsageError: naming what is wrong, with an example.
    """
    scheme, rest = _split(text, LISTEN_EXAMPLE)
    if scheme == "tls":
        address = _parse_tls(text, rest, lowest_port=0)
        if address.name is not None:
            _refuse(
                text, "?name= is for a destination", "leave it out: a host's name is in its own certificate"
            )
        return address
    if scheme == "unix":
        return _parse_unix(text, rest, LISTEN_EXAMPLE)
    if scheme in ("exec", "local"):
        _refuse(text, f"a host cannot listen on {scheme}:", f"listen on {LISTEN_EXAMPLE}")
    return _unknown_scheme(text, scheme, LISTEN_EXAMPLE)


def _refuse(text: str, problem: str, remedy: str) -> NoReturn:
    raise UsageError(f"{_quoted(text)}: {problem}", remedy=remedy)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "…")


def _split(text: str, example: str) -> tuple[str, str]:
    scheme, colon, rest = text.partition(":")
    if not colon or not scheme.isalpha() or re.fullmatch(r"\d+", rest):
        # "hostb", "hostb.example:4789" and "hostb:4789" alike
        _refuse(text, "there is no scheme before the address", f"a destination looks like {example}")
    return scheme.lower(), rest


def _unknown_scheme(text: str, scheme: str, example: str) -> NoReturn:
    if scheme == "tcp":
        _refuse(
            text,
            "memory does not leave a host in the clear",
            "use tls://, with `ferry pki init` and `ferry pki issue`",
        )
    if scheme == "ssh":
        _refuse(text, "ssh is run as a command", "write it as 'exec:ssh hostb ferry accept'")
    _refuse(text, f"{scheme}: is not a kind of address", f"a destination looks like {example}")


def _parse_unix(text: str, path: str, example: str) -> UnixDestination:
    if path.startswith("///"):
        path = path[2:]  # unix:///run/x is what other tools write
    if not path.startswith("/") or path.startswith("//") or "\0" in path:
        _refuse(text, "the path is not absolute", f"write it like {example}")
    if (size := len(os.fsencode(path))) > MAX_UNIX_PATH:
        _refuse(
            text,
            f"the path has {size} bytes, a Unix socket's at most {MAX_UNIX_PATH}",
            "use a shorter directory",
        )
    return UnixDestination(path)


def _parse_tls(text: str, rest: str, *, lowest_port: int) -> TlsDestination:
    example = "tls://hostb.example:4789 or tls://[2001:db8::7]:4789"
    if not rest.startswith("//"):
        _refuse(text, "two slashes are missing after tls:", f"write it like {example}")
    authority, question, query = rest[2:].partition("?")
    if authority.startswith("["):
        host, bracket, tail = authority[1:].partition("]")
        if not bracket or not _is_ip(host, 6):
            _refuse(text, "what is in brackets is not an IPv6 address", f"write it like {example}")
        if tail and not tail.startswith(":"):
            _refuse(text, f"{tail!r} after the bracket is not a port", f"write it like {example}")
        port_text = tail[1:]
    else:
        host, _, port_text = authority.rpartition(":") if ":" in authority else (authority, "", "")
        if ":" in host:
            _refuse(text, "an IPv6 address needs brackets", f"write it like {example}")
        if not _NAME.fullmatch(host):
            _refuse(text, f"{host!r} is not a host's name or address", f"write it like {example}")
    if not port_text:
        _refuse(text, "the port is missing", f"write it like {example}")
    if not re.fullmatch(r"[0-9]{1,5}", port_text) or not lowest_port <= int(port_text) <= 65535:
        _refuse(text, f"{port_text!r} is not a port ({lowest_port} to 65535)", f"write it like {example}")
    name = _parse_query(text, query) if question else None
    return TlsDestination(host, int(port_text), name)


def _parse_query(text: str, query: str) -> str:
    key, _, name = query.partition("=")
    if key != "name":
        _refuse(
            text,
            f"{key!r} is not an option here",
            "the only one is ?name=, the name in the peer's certificate",
        )
    if not is_name(name):
        _refuse(
            text, f"{name!r} is not a name that a certificate can have", "write it like ?name=hostb.example"
        )
    return name


def is_name(text: str) -> bool:
    """Whether this can be a host's name in a certificate: a DNS name without wildcards, or an IP address."""
    return bool(_NAME.fullmatch(text)) or _is_ip(text, 6)


def _is_ip(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False
