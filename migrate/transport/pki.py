"""A private CA for a few hosts: `ferry pki init` and `ferry pki issue`. Not a public CA: no revocation lists, no requests.

    DIRECTORY/ca.pem  ca-key.pem           made once; the key stays where it was made
    DIRECTORY/NAME/ca.pem cert.pem key.pem to be copied to the host NAME

A host is kept out by taking its name from the others' lists of allowed hosts. ECDSA P-256 throughout; certificates follow
RFC 5280 strictly, as Python 3.13's VERIFY_X509_STRICT wants it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrate.errors import UsageError
from migrate.transport.tls import Credentials, load, normalise
from migrate.transport.uri import is_name

__all__ = ["Credentials", "Issued", "init", "issue", "load"]

CA_DAYS = 3650
DAYS = 365

#: Certificates are valid from a little before they were made: hosts' clocks differ.
_BACKDATED = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Issued:
    """What was made: the directory to copy, the names in the certificate, and its last moment (UTC)."""

    directory: Path
    names: tuple[str, ...]
    expires: datetime


def init(
    directory: Path, name: str = "vmferry CA", *, force: bool = False, now: datetime | None = None
) -> Issued:
    """Make a CA in `directory`, which is created.

    :param force: replace one that is there. Every certificate of it is worthless then.
    :raise UsageError: there is one already, or the directory cannot be written.
    """
    if not name.strip() or len(name) > 64 or not name.isprintable():
        raise UsageError(f"{name!r} cannot be a CA's name", remedy="use 1 to 64 printable characters")
    start = (now or datetime.now(UTC)) - _BACKDATED
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(subject, subject, key.public_key(), start, start + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_all(directory, {"ca-key.pem": _pem_key(key), "ca.pem": _pem(certificate)}, force=force)
    return Issued(directory, (name,), certificate.not_valid_after_utc)


def issue(
    directory: Path,
    name: str,
    extra_names: Sequence[str] = (),
    days: int = DAYS,
    *,
    force: bool = False,
    now: datetime | None = None,
) -> Issued:
    """Make a certificate for the host `name` with the CA in `directory`.

    :param name: DNS name or IP address, as others will write it after tls://; also the name of the new directory.
    :param extra_names: more names of the same host.
    :param days: how long it is valid, cut at the end of the CA itself.
    :raise UsageError: no CA, a name that cannot be one, or there is a certificate of this name already.
    """
    names = tuple(dict.fromkeys(normalise(each) for each in (name, *extra_names)))
    for each in names:
        if not is_name(each):
            raise UsageError(
                f"{each!r} is not a host's name or address",
                remedy="use names such as hostb.example or 192.0.2.7",
            )
    if not 1 <= days <= CA_DAYS:
        raise UsageError(f"{days} days is not a lifetime", remedy=f"use 1 to {CA_DAYS}")
    ca, ca_key = _load_ca(directory)
    start = max((now or datetime.now(UTC)) - _BACKDATED, ca.not_valid_before_utc)
    end = min(start + timedelta(days=days) + _BACKDATED, ca.not_valid_after_utc)
    if end <= start:
        raise UsageError(
            f"the CA in {directory} has expired", remedy="make a new one: `ferry pki init --force`"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    ca_identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(subject, ca.subject, key.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in names]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    target = directory / names[0]
    _write_all(
        target, {"key.pem": _pem_key(key), "cert.pem": _pem(certificate), "ca.pem": _pem(ca)}, force=force
    )
    return Issued(target, names, end)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _load_ca(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        ca = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "ca-key.pem").read_bytes(), password=None)
    except OSError as error:
        raise UsageError(
            f"there is no CA in {directory}: {error.filename}: {error.strerror}",
            remedy="make one first: `ferry pki init`",
        ) from error
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"the CA in {directory} cannot be read: {error}",
            remedy="restore its two files, or make a new CA elsewhere",
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise UsageError(
            f"the key and the certificate in {directory} do not belong together",
            remedy="restore both from one place",
        )
    return ca, key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_all(directory: Path, files: dict[str, bytes], *, force: bool) -> None:
    """Write files, each at once and whole; keys readable by their owner only. What is there stays unless `force`."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not force and (there := [name for name in files if os.path.lexists(directory / name)]):
            raise FileExistsError(None, "exists", str(directory / there[0]))
        for name, content in files.items():
            _write(directory / name, content, mode=0o600 if "key" in name else 0o644, force=force)
    except FileExistsError as error:
        raise UsageError(
            f"{error.filename2 or error.filename} is there already",
            remedy="use another directory or name, or --force to replace it",
        ) from error
    except OSError as error:
        raise UsageError(
            f"{error.filename or directory} cannot be written: {error.strerror}",
            remedy="use a directory that you may write",
        ) from error


def _write(path: Path, content: bytes, *, mode: int, force: bool) -> None:
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # made with mode 0600
    try:
        with open(fd, "wb") as file:
            file.write(content)
            os.fchmod(fd, mode)
            os.fsync(fd)
        if force:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike rename, fails if something is there
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
