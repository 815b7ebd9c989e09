"""Certificates and keys as they are found: what they say, and whether they belong together.

Who only reads them holds no CA key; issuing is in `authority.py`. These two are the only files
that use `cryptography`. Everything is PEM bytes, and nothing here is believed because it could
be read: `is_issued_by` is what verifies.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broker_bridge.disk import write_atomic
from broker_bridge.errors import LocalError

__all__ = [
    "CertificateFacts",
    "belong_together",
    "extension",
    "holds",
    "is_issued_by",
    "is_key",
    "read_certificate",
    "read_key",
    "revocation_number",
    "write_private",
    "write_public",
]

_E = TypeVar("_E", bound=x509.ExtensionType)


@dataclass(frozen=True)
class CertificateFacts:
    """What a person asks of a certificate. Times are UTC."""

    name: str
    valid_from: datetime
    expires: datetime
    serial: int
    is_ca: bool
    hosts: tuple[str, ...]


def read_certificate(pem: bytes) -> CertificateFacts:
    """Return what `pem` says about itself; it is not verified. Raises LocalError if no PEM."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        constraints = extension(certificate, x509.BasicConstraints)
        alternatives = extension(certificate, x509.SubjectAlternativeName)
    except ValueError as error:
        raise LocalError(
            "this is not a certificate in PEM form; give the .pem or .crt file "
            "that came with the bundle"
        ) from error
    hosts = () if alternatives is None else tuple(str(each.value) for each in alternatives)
    return CertificateFacts(
        name=str(names[0].value) if names else "",
        valid_from=certificate.not_valid_before_utc,
        expires=certificate.not_valid_after_utc,
        serial=certificate.serial_number,
        is_ca=constraints is not None and constraints.ca,
        hosts=hosts,
    )


def is_key(pem: bytes) -> bool:
    """Whether this is a private key of any kind, also one that only a password opens."""
    try:
        serialization.load_pem_private_key(pem, password=None)
    except TypeError:  # it is encrypted
        return True
    except ValueError:
        return False
    return True


def read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """A private key of the kind that midge makes. Raises LocalError for any other."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise LocalError("this is no unencrypted private key in PEM form") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LocalError("this is no elliptic-curve key, as midge makes them")
    return key


def belong_together(certificate: bytes, key: bytes) -> bool:
    """Whether this is the certificate of this key. Raises LocalError for what cannot be read."""
    private = read_key(key)
    read_certificate(certificate)
    return x509.load_pem_x509_certificate(certificate).public_key() == private.public_key()


def is_issued_by(certificate: bytes, ca: bytes) -> bool:
    """Whether the CA (its certificate) signed `certificate`. Says nothing about its dates."""
    try:
        issuer = x509.load_pem_x509_certificate(ca)
        x509.load_pem_x509_certificate(certificate).verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def holds(pem: bytes, certificate: bytes) -> bool:
    """Whether `certificate` is among those in `pem`."""
    try:
        return x509.load_pem_x509_certificate(certificate) in x509.load_pem_x509_certificates(pem)
    except ValueError:
        return False


def revocation_number(pem: bytes, ca: bytes) -> int:
    """The number of a list of revoked certificates that this CA signed; -1 for anything else."""
    try:
        found = x509.load_pem_x509_crl(pem)
        number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        issuer = x509.load_pem_x509_certificate(ca).public_key()
    except (ValueError, x509.ExtensionNotFound):
        return -1
    is_ours = isinstance(issuer, ec.EllipticCurvePublicKey) and found.is_signature_valid(issuer)
    return number if is_ours else -1


def extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    """What a certificate says under this extension, if it says anything."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def write_private(path: Path, pem: bytes) -> None:
    """Write a key so that nobody but the owner can ever read it, whole or not at all."""
    write_atomic(path, pem, mode=0o600)


def write_public(path: Path, pem: bytes) -> None:
    """Write a certificate, whole or not at all."""
    write_atomic(path, pem, mode=0o644)
