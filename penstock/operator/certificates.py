"""Makes certificate authorities and certificates. Keys are P-256 (ECDSA).

Nothing here is sent or logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 90
_SKEW = timedelta(hours=1)  # tolerated error of the clocks of processes that check a certificate


class Pair(msgspec.Struct, frozen=True):
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def new_authority(name: str, now: datetime) -> Pair:
    """A self-signed authority, which signs certificates and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    builder = (
        _builder(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    return _pair(builder.sign(key, hashes.SHA256()), key)


def new_certificate(authority: Pair, name: str, hosts: Sequence[str], now: datetime) -> Pair:
    """A certificate signed by `authority`: for a server with these host names, or for a client if `hosts`
    is empty."""
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    issuer_key = serialization.load_pem_private_key(authority.key, None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(_name(name), issuer.subject, key.public_key(), now, CERTIFICATE_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    if hosts:
        names = [x509.DNSName(host) for host in hosts]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _pair(builder.sign(issuer_key, hashes.SHA256()), key)


def is_due(certificate: bytes, now: datetime) -> bool:
    """Whether a certificate should be renewed: a third of its lifetime or less is left, or it is
    unreadable."""
    return now >= due_at(certificate)


def due_at(certificate: bytes) -> datetime:
    """When a certificate should be renewed: after two thirds of its lifetime. Long ago if it is
    unreadable."""
    try:
        found = x509.load_pem_x509_certificate(certificate)
    except ValueError:
        return datetime.fromisoformat("1970-01-01T00:00:00+00:00")
    life = found.not_valid_after_utc - found.not_valid_before_utc
    return found.not_valid_before_utc + life * 2 / 3


def made_at(certificate: bytes) -> datetime:
    """When a certificate was made. Raises ValueError if it is unreadable."""
    return x509.load_pem_x509_certificate(certificate).not_valid_before_utc + _SKEW


def is_signed_by(certificate: bytes, authority: bytes) -> bool:
    """Whether `authority` signed the certificate. False if one of them is unreadable."""
    try:
        signed = x509.load_pem_x509_certificate(certificate)
        signed.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def bundle(certificates: Iterable[bytes], now: datetime) -> bytes:
    """The certificates that are still valid, each once, in the given order."""
    kept: dict[bytes, None] = {}
    for text in certificates:
        try:
            found = x509.load_pem_x509_certificates(text)
        except ValueError:
            continue
        for one in found:
            if one.not_valid_after_utc > now:
                kept[one.public_bytes(serialization.Encoding.PEM)] = None
    return b"".join(kept)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
