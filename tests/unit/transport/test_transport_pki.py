"""The private CA: its certificates, its files, and what it refuses."""

from __future__ import annotations

import ipaddress
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from migrate.errors import UsageError
from migrate.transport import pki


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_certificate_carries_its_names_and_may_be_used_by_both_sides(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab")
    issued = pki.issue(tmp_path, "HostB.example", ["192.0.2.7", "2001:DB8::7", "hostb.example"], days=30)
    certificate = read(issued.directory / "cert.pem")

    assert issued.directory == tmp_path / "hostb.example"
    assert issued.names == ("hostb.example", "192.0.2.7", "2001:db8::7")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hostb.example"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("192.0.2.7"),
        ipaddress.ip_address("2001:db8::7"),
    ]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert timedelta(days=29) < issued.expires - datetime.now(UTC) <= timedelta(days=30)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)


def test_the_ca_signs_hosts_and_no_other_ca(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab")
    ca = read(tmp_path / "ca.pem")
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature


def test_openssl_accepts_the_chain_by_its_strict_rules(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab")
    pki.issue(tmp_path, "hostb")
    for purpose in ("sslserver", "sslclient"):
        command = [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            "ca.pem",
            "hostb/cert.pem",
        ]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_keys_are_readable_by_their_owner_only_and_nothing_else_is_left(tmp_path: Path) -> None:
    pki.init(tmp_path / "pki", "lab")
    pki.issue(tmp_path / "pki", "hostb")
    files = {
        str(path.relative_to(tmp_path / "pki")): path.stat().st_mode & 0o777
        for path in tmp_path.rglob("*.pem")
    }
    assert files == {
        "ca.pem": 0o644,
        "ca-key.pem": 0o600,
        "hostb/ca.pem": 0o644,
        "hostb/cert.pem": 0o644,
        "hostb/key.pem": 0o600,
    }
    assert not list(tmp_path.rglob(".new-*"))


def test_what_is_there_is_overwritten_only_by_force(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab")
    pki.issue(tmp_path, "hostb")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}

    with pytest.raises(UsageError, match=r"ca-key\.pem is there already"):
        pki.init(tmp_path, "lab")
    with pytest.raises(UsageError, match="is there already"):
        pki.issue(tmp_path, "hostb")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pem")} == before

    pki.issue(tmp_path, "hostb", force=True)
    assert (tmp_path / "hostb/key.pem").read_bytes() != before[tmp_path / "hostb/key.pem"]
    pki.init(tmp_path, "lab", force=True)
    assert (tmp_path / "ca.pem").read_bytes() != before[tmp_path / "ca.pem"]


def test_a_lone_key_is_not_overwritten_either(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab")
    (tmp_path / "hostb").mkdir()
    (tmp_path / "hostb/key.pem").write_text("precious")
    with pytest.raises(UsageError, match=r"key\.pem is there already"):
        pki.issue(tmp_path, "hostb")
    assert (tmp_path / "hostb/key.pem").read_text() == "precious"
    assert not (tmp_path / "hostb/cert.pem").exists()


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "*", "*.example", ".hidden", "a b", "-a", "ho\nst"]
)
def test_a_name_that_no_host_has_is_refused_and_leaves_no_file(tmp_path: Path, name: str) -> None:
    pki.init(tmp_path, "lab")
    with pytest.raises(UsageError):
        pki.issue(tmp_path, name)
    with pytest.raises(UsageError):
        pki.issue(tmp_path, "hostb", [name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca-key.pem", "ca.pem"]


def test_a_certificate_does_not_outlive_its_ca(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab", now=datetime.now(UTC) - timedelta(days=pki.CA_DAYS - 10))
    issued = pki.issue(tmp_path, "hostb", days=365)
    assert issued.expires == read(tmp_path / "ca.pem").not_valid_after_utc


def test_an_expired_ca_issues_nothing(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab", now=datetime.now(UTC) - timedelta(days=pki.CA_DAYS + 10))
    with pytest.raises(UsageError, match="has expired"):
        pki.issue(tmp_path, "hostb")


def test_without_a_ca_the_error_says_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ferry pki init"):
        pki.issue(tmp_path / "nowhere", "hostb")


def test_a_key_of_another_ca_is_noticed_before_it_signs(tmp_path: Path) -> None:
    pki.init(tmp_path / "a", "lab")
    pki.init(tmp_path / "b", "lab")
    (tmp_path / "a/ca-key.pem").write_bytes((tmp_path / "b/ca-key.pem").read_bytes())
    with pytest.raises(UsageError, match="do not belong together"):
        pki.issue(tmp_path / "a", "hostb")


def test_issued_files_load_as_credentials(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab")
    directory = pki.issue(tmp_path, "hostb").directory
    credentials = pki.load(directory, ["hosta"])
    assert credentials.allow == {"hosta"}
    credentials.check(serving=True)


def test_a_server_without_an_allow_list_is_a_usage_error(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab")
    with pytest.raises(UsageError, match="no list of hosts"):
        pki.load(pki.issue(tmp_path, "hostb").directory).check(serving=True)


@pytest.mark.parametrize("missing", ["ca.pem", "cert.pem", "key.pem"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    pki.init(tmp_path, "lab")
    directory = pki.issue(tmp_path, "hostb").directory
    (directory / missing).unlink()
    with pytest.raises(UsageError, match=missing):
        pki.load(directory)


def test_damaged_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab")
    b, c = (pki.issue(tmp_path, name).directory for name in ("hostb", "hostc"))
    good = (b / "key.pem").read_bytes()

    (b / "key.pem").write_bytes((c / "key.pem").read_bytes())
    with pytest.raises(UsageError, match="does not belong to the certificate"):
        pki.load(b)
    (b / "key.pem").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="PEM"):
        pki.load(b)
    (b / "key.pem").write_bytes(good)
    (b / "key.pem").chmod(0o604)
    with pytest.raises(UsageError, match="chmod 600"):
        pki.load(b)
    (b / "key.pem").chmod(0o640)
    (b / "ca.pem").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="no certificate of a CA"):
        pki.load(b)


def test_an_encrypted_key_is_refused_and_no_password_is_asked_on_the_terminal(tmp_path: Path) -> None:
    pki.init(tmp_path, "lab")
    directory = pki.issue(tmp_path, "hostb").directory
    command = ["openssl", "pkcs8", "-topk8", "-in", "key.pem", "-out", "new.pem", "-passout", "pass:secret"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    (directory / "new.pem").replace(directory / "key.pem")
    (directory / "key.pem").chmod(0o600)
    with pytest.raises(UsageError, match="encrypted"):
        pki.load(directory)
