"""Mutual TLS 1.3 between two hosts: contexts, the handshake, and who is let in. Blocking; no asyncio, no listening.

Both sides show a certificate of one private CA. The client wants the destination's name in the server's certificate;
the server wants a name of the client's certificate in its allow-list, and has none unless it is told one.

After the handshake, inside TLS, before anything else (sizes in bytes):

    client → server   32   the connection's preamble once more; 32 zeros: "I refuse your certificate's name"
    server → client    1   0 come in; 1 your certificate's name is not allowed; 2 that is not the preamble I was routed by

The preamble travels in the clear, so this copy is what binds a channel to its session. The answer is there because a
TLS 1.3 client has finished its handshake before the server looks at its certificate: without it, it would learn of
a refusal only at some later read.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import FerryError, RemoteProtocolError, TransportError, UsageError
from migrate.transport import preamble, tls_errors
from migrate.transport.deadline import Deadline

ANY_NAME = "*"

_COME_IN, _NAME_REFUSED, _PREAMBLE_DIFFERS = b"\0", b"\1", b"\2"
_I_REFUSE = bytes(preamble.SIZE)

#: How long, in seconds, and how much, in bytes, a refused peer is listened to so that it can read why.
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Credentials:
    """Paths of PEM files, read anew for each connection (so a renewed certificate is used at once), and an allow-list.

    `allow` holds names of certificates (DNS or IP), or "*" for every certificate of the CA. A client may leave it empty: it
    checks the destination's name in any case. A server may not.
    """

    ca: Path
    cert: Path
    key: Path
    allow: frozenset[str] = frozenset()

    def check(self, *, serving: bool) -> None:
        """Read everything once, at the start of a daemon or command.

        :raise UsageError: a file is missing, is no PEM, does not fit the others; or a server has no allow-list.
        """
        _context(self, serving=serving)

    def allows(self, names: Iterable[str]) -> str | None:
        """The first of `names` that may come in, or None."""
        allowed = {normalise(name) for name in self.allow}
        return next((name for name in names if ANY_NAME in allowed or name in allowed), None)


def load(directory: Path, allow: Iterable[str] = ()) -> Credentials:
    """Credentials from a directory that `ferry pki issue` made: ca.pem, cert.pem, key.pem.

    :raise UsageError: one of them is missing or wrong.
    """
    credentials = Credentials(
        directory / "ca.pem", directory / "cert.pem", directory / "key.pem", frozenset(allow)
    )
    credentials.check(serving=False)
    return credentials


def normalise(name: str) -> str:
    """One spelling a name: lower case, and IP addresses as Python writes them."""
    try:
        return str(ipaddress.ip_address(name.strip()))
    except ValueError:
        return name.strip().lower()


def connect(
    sock: socket.socket,
    credentials: Credentials,
    name: str,
    first: preamble.Preamble,
    deadline: Deadline,
    label: str,
) -> tuple[ssl.SSLSocket, str]:
    """The client's side, after `first` was sent in the clear. Takes `sock` over, closes it on failure.

    :param name: what the server's certificate must say.
    :param label: how error texts name the peer.
    :return: the connection, and the peer's certificate name.
    :raise TransportError: TLS failed, or one side refused the other's certificate.
    :raise UsageError: our own files are wrong.
    """
    tls = _wrap(sock, credentials, serving=False, label=label)
    refusal: TransportError | None = None
    try:
        _handshake(tls, deadline, label)
        names, wanted = _names(tls), normalise(name)
        if wanted not in names:
            refusal = TransportError(
                f"the certificate of {label} is for {_list(names)}, not for {wanted}",
                remedy=f"if that is the right host, add ?name={names[0] if names else 'NAME'} to the destination; "
                "else issue it a certificate with this name",
            )
        elif credentials.allow and credentials.allows(names) is None:
            refusal = _not_allowed(names, credentials)
        with contextlib.suppress(
            ConnectionError
        ):  # closed already? The alert that says why can still be read
            _send(tls, _I_REFUSE if refusal else preamble.encode(first), deadline)
        if refusal:
            raise refusal
        verdict = _receive(tls, 1, deadline)
        if verdict == _NAME_REFUSED:
            raise TransportError(
                f"{label} does not allow the name of our certificate ({credentials.cert})",
                remedy="add it to the list of allowed hosts there",
            )
        if verdict != _COME_IN:
            raise TransportError(
                f"{label} was routed to another session than we asked for",
                remedy="something between the hosts alters connections: look for a proxy, or an attacker",
            )
    except OSError as error:
        tls.close()
        raise refusal or tls_errors.explain(error, label) from error
    except BaseException:
        tls.close()
        raise
    return tls, wanted


def accept(
    sock: socket.socket, credentials: Credentials, first: preamble.Preamble, deadline: Deadline, label: str
) -> tuple[ssl.SSLSocket, str]:
    """The server's side; `first` is the preamble by which the connection was routed here. Takes `sock` over.

    :return: the connection, and the peer's certificate name.
    :raise TransportError, RemoteProtocolError: the peer is not let in; it was told so if it could be.
    :raise UsageError: our own files are wrong, or there is no allow-list.
    """
    tls = _wrap(sock, credentials, serving=True, label=label)
    try:
        try:
            _handshake(tls, deadline, label)
            names = _names(tls)
            echo = _receive(tls, preamble.SIZE, deadline)
            if echo == _I_REFUSE:
                raise TransportError(
                    f"{label} refused the name in our certificate ({credentials.cert})",
                    remedy="its log says which name it wants; issue a certificate with that name, or give it ?name=",
                )
            name = credentials.allows(names)
            if name is None:
                _send(tls, _NAME_REFUSED, deadline)
                raise _not_allowed(names, credentials)
            if echo != preamble.encode(first):
                _send(tls, _PREAMBLE_DIFFERS, deadline)
                raise RemoteProtocolError(
                    f"{label} asked for another session inside TLS than before it",
                    remedy="something between the hosts alters connections: look for a proxy, or an attacker",
                )
            _send(tls, _COME_IN, deadline)
        except TimeoutError:
            raise
        except (OSError, FerryError):
            _linger(tls)
            raise
    except OSError as error:
        tls.close()
        raise tls_errors.explain(error, label) from error
    except BaseException:
        tls.close()
        raise
    return tls, name


def _context(credentials: Credentials, *, serving: bool) -> ssl.SSLContext:
    if serving and not credentials.allow:
        raise UsageError(
            "there is no list of hosts that may connect",
            remedy='name the certificates to allow, or "*" for every certificate of the CA',
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serving else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    # We compare names ourselves, exactly and right after the handshake: an error can then say which names the
    # certificate has, and both directions obey one rule.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if serving:
        # unread tickets turn the peer's close into a reset that swallows our last bytes
        context.num_tickets = 0
    for path in (credentials.ca, credentials.cert, credentials.key):
        _check_file(path, secret=path == credentials.key)
    try:
        context.load_verify_locations(cafile=credentials.ca)
    except ssl.SSLError as error:
        raise UsageError(
            f"{credentials.ca} holds no certificate of a CA",
            remedy="copy ca.pem from where `ferry pki init` ran",
        ) from error
    try:
        context.load_cert_chain(credentials.cert, credentials.key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"the key {credentials.key} does not belong to the certificate {credentials.cert}"
        else:
            problem = f"{credentials.cert} and {credentials.key} are not a certificate and a key in PEM form"
        raise UsageError(problem, remedy="issue both anew: `ferry pki issue`") from error
    return context


def _no_password() -> str:
    # OpenSSL would ask on the terminal, and a daemon would hang there
    raise UsageError(
        "the private key is encrypted", remedy="use a key without a password, in a file of mode 0600"
    )


def _check_file(path: Path, *, secret: bool) -> None:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}",
            remedy="make certificates with `ferry pki init` and `ferry pki issue`",
        ) from error
    if secret and mode & 0o007:
        raise UsageError(
            f"every user of this host can read the private key {path}", remedy=f"chmod 600 {path}"
        )


def _wrap(sock: socket.socket, credentials: Credentials, *, serving: bool, label: str) -> ssl.SSLSocket:
    try:
        return _context(credentials, serving=serving).wrap_socket(
            sock, server_side=serving, do_handshake_on_connect=False
        )
    except OSError as error:  # the peer has gone already
        raise tls_errors.explain(error, label) from error
    finally:
        sock.close()  # if it was wrapped it is only a shell now


def _handshake(tls: ssl.SSLSocket, deadline: Deadline, label: str) -> None:
    tls.settimeout(deadline.left())
    tls.do_handshake()
    # An SSLSocket that lost its TLS sends in the clear without a word; never rely on it having one.
    if tls.version() != "TLSv1.3":
        raise TransportError(f"the connection with {label} is not TLS 1.3", remedy="report this as a bug")


def _names(tls: ssl.SSLSocket) -> list[str]:
    certificate = tls.getpeercert() or {}
    entries: Iterable[tuple[str, str]] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    return [normalise(value) for kind, value in entries if kind in ("DNS", "IP Address")]


def _not_allowed(names: list[str], credentials: Credentials) -> TransportError:
    return TransportError(
        f"the name {_list(names)} is not allowed (allowed: {_list(sorted(credentials.allow))})",
        remedy="if that host may take part, add its name to the list of allowed hosts here",
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "no name at all"


def _send(tls: ssl.SSLSocket, data: bytes, deadline: Deadline) -> None:
    tls.settimeout(deadline.left())
    tls.sendall(data)


def _receive(tls: ssl.SSLSocket, size: int, deadline: Deadline) -> bytes:
    data = b""
    while len(data) < size:
        tls.settimeout(deadline.left())
        chunk = tls.recv(size - len(data))
        if not chunk:
            raise ConnectionResetError("closed")
        data += chunk
    return data


def _linger(tls: ssl.SSLSocket) -> None:
    """Let the peer read why it is refused: to close with bytes of it unread would send a reset that overtakes our alert."""
    deadline, seen = Deadline(_LINGER_SECONDS), 0
    with contextlib.suppress(OSError):
        socket.socket.shutdown(tls, socket.SHUT_WR)
        while seen < _LINGER_BYTES:
            tls.settimeout(deadline.left())
            chunk = socket.socket.recv(tls, 4096)
            if not chunk:
                return
            seen += len(chunk)
