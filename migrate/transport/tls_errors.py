"""What OpenSSL says, in words for a person: one table for what we found wrong, one for what the peer found wrong."""

from __future__ import annotations

import ssl

from migrate.errors import ChannelClosed, TransportError

_ONE_CA = (
    "both hosts need certificates of one CA: compare their ca.pem, then use `ferry pki issue` with that CA"
)
_RENEW = "issue a new one with `ferry pki issue`, and compare the clocks of both hosts"
_SAME_RELEASE = "is it a vmferry's port? install the same version on both hosts"

#: OpenSSL's X509_V_ERR_* (x509_vfy.h): why *we* refuse the peer's certificate.
_REFUSED_BY_US: dict[int, tuple[str, str]] = {
    7: ("the certificate of {peer} is from another CA", _ONE_CA),
    9: ("the certificate of {peer} is not valid yet", "compare the clocks of both hosts"),
    10: ("the certificate of {peer} has expired", _RENEW),
    18: ("the certificate of {peer} is from another CA (it signed itself)", _ONE_CA),
    19: ("the certificate of {peer} is from another CA", _ONE_CA),
    20: ("the certificate of {peer} is from another CA", _ONE_CA),
    21: ("the certificate of {peer} is from another CA", _ONE_CA),
    26: (
        "the certificate of {peer} is not meant for this use",
        "issue it with `ferry pki issue` (serverAuth and clientAuth)",
    ),
}

#: Reasons of alerts (RFC 8446 §6.2, as OpenSSL spells them): why the *peer* refuses us.
_REFUSED_BY_PEER: dict[str, tuple[str, str]] = {
    "TLSV1_ALERT_UNKNOWN_CA": ("{peer} refuses our certificate: it is from another CA", _ONE_CA),
    "TLSV1_ALERT_DECRYPT_ERROR": ("{peer} refuses our certificate: it is from another CA", _ONE_CA),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": ("{peer} refuses our certificate: it has expired", _RENEW),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        "{peer} refuses our certificate (not valid yet, or damaged)",
        "look at its log, and compare the clocks of both hosts",
    ),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": ("{peer} refuses our certificate: it was revoked", _RENEW),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": ("{peer} refuses our certificate", "look at its log"),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": (
        "{peer} refuses our certificate: it is not meant for this use",
        "issue it with `ferry pki issue` (serverAuth and clientAuth)",
    ),
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": ("{peer} wants a certificate and we sent none", _ONE_CA),
    "TLSV1_ALERT_PROTOCOL_VERSION": ("{peer} does not speak TLS 1.3", _SAME_RELEASE),
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": ("{peer} sent no certificate", "give it one: `ferry pki issue`"),
    "UNSUPPORTED_PROTOCOL": ("{peer} does not speak TLS 1.3", _SAME_RELEASE),
    "NO_PROTOCOLS_AVAILABLE": ("{peer} does not speak TLS 1.3", _SAME_RELEASE),
    "WRONG_VERSION_NUMBER": ("{peer} does not speak TLS", _SAME_RELEASE),
    "HTTP_REQUEST": ("{peer} does not speak TLS but HTTP", _SAME_RELEASE),
    "PACKET_LENGTH_TOO_LONG": ("{peer} does not speak TLS", _SAME_RELEASE),
    "RECORD_LAYER_FAILURE": ("{peer} does not speak TLS", _SAME_RELEASE),
}


def explain(error: OSError, peer: str) -> TransportError:
    """One clear line for a failed handshake; `ChannelClosed` where the peer went away.

    :param peer: how the text names the peer.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        problem, remedy = _REFUSED_BY_US.get(
            error.verify_code,
            (
                f"the certificate of {{peer}} is not valid: {error.verify_message}",
                "issue it anew: `ferry pki issue`",
            ),
        )
        return TransportError(problem.format(peer=peer), remedy=remedy)
    if isinstance(error, TimeoutError):
        return TransportError(
            f"{peer} does not answer the TLS handshake in time",
            remedy="is it a vmferry's port, and is that host overloaded? look at its log",
        )
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) or not isinstance(error, ssl.SSLError):
        return ChannelClosed(
            f"{peer} closed the connection during the TLS handshake",
            remedy="its log says why: it may not know the session, or have refused our certificate",
        )
    problem, remedy = _REFUSED_BY_PEER.get(
        error.reason or "",
        (
            f"TLS with {{peer}} failed: {error.reason or 'no reason given'}",
            "look at the log of the other host",
        ),
    )
    return TransportError(problem.format(peer=peer), remedy=remedy)
