"""The private certificate authority that lets clients into the broker, and nothing more.

Promises X.509 certificates that mosquitto and OpenSSL accept: one CA of our own, a
certificate for the broker that names its hosts, and one client certificate per
device, server and operator, whose common name is its MQTT user name. What these
certificates do not do: they never sign or open an update. A stolen CA lets a stranger
talk to the broker; it does not let him read or forge training.

What is read of a certificate without the CA's key is in `certificates.py`. Times come from the
caller; keys and serial numbers from the operating system's random source. All is PEM bytes.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker_bridge.errors import LocalError
from broker_bridge.limits import LIMITS
from server.fleet.certificates import (
    extension,
    is_issued_by,
    read_certificate,
    read_key,
    revocation_number,
)

__all__ = [
    "OPERATOR_NAME",
    "SERVER_NAME",
    "Authority",
    "Issued",
    "check_device_name",
]

SERVER_NAME = "midge-server"
OPERATOR_NAME = "midge-operator"
_RESERVED_PREFIX = "midge-"
CA_DAYS = 20 * 365
BROKER_DAYS = 825
CLIENT_DAYS = 825

# A device's clock may be behind ours, and a Raspberry Pi wakes up without one.
BACKDATE = timedelta(days=1)

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
PublicKey = ec.EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True)
class Issued:
    """A certificate and, where we made it, its private key. Both PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A CA certificate and its key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(
        cls, name: str, *, now: datetime, days: int = CA_DAYS, backdate: timedelta = BACKDATE,
        of_key: bytes = b"",
    ) -> "Authority":  # fmt: skip
        """Make a new CA (ECDSA P-256) called `name`. `now` is timezone-aware.

        `of_key`: the key of a CA whose certificate is lost. Under its old name it is the same CA
        to whoever has the lost certificate, and to what was certified under that.
        """
        key = _key(of_key)
        subject = _name(name)
        builder = (
            _builder(subject, subject, key.public_key(), now=now, days=days, backdate=backdate)
            # path_length 0: it may sign clients and brokers, and no further CA.
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, certificate: bytes, key: bytes) -> "Authority":
        """Read a CA back from PEM. Raises LocalError if the two do not belong together."""
        try:
            ca = x509.load_pem_x509_certificate(certificate)
            private = read_key(key)
        except (ValueError, LocalError) as error:
            raise LocalError(
                "the CA certificate or its key is not unencrypted PEM, or not of the kind that "
                "midge makes; restore both from your backup"
            ) from error
        if ca.public_key() != private.public_key():
            raise LocalError(
                "the CA key does not belong to the CA certificate; restore both from one backup"
            )
        return cls(ca, private)

    @property
    def certificate(self) -> bytes:
        """The CA certificate: public, goes to every broker and client."""
        return _pem(self._certificate)

    @property
    def key(self) -> bytes:
        """The CA's private key: stays on the operator's machine (`write_private`)."""
        return _pem_key(self._key)

    def issue_for_broker(
        self,
        hosts: Sequence[str],
        *,
        now: datetime,
        days: int = BROKER_DAYS,
        backdate: timedelta = BACKDATE,
        of_key: bytes = b"",
    ) -> Issued:
        """Issue the broker's certificate for `hosts`: DNS names and IP addresses.

        Clients check the name they dial against this list, so it must hold each of them.
        `of_key`: certify this key, and make no new one.
        """
        if not hosts:
            raise LocalError(
                "the broker's certificate must name a host; give the name or "
                "address under which devices reach the broker"
            )
        key = _key(of_key)
        names = x509.SubjectAlternativeName([_host(each) for each in hosts])
        builder = self._leaf(
            hosts[0][:64],
            key.public_key(),
            ExtendedKeyUsageOID.SERVER_AUTH,
            now=now,
            days=days,
            backdate=backdate,
        )
        builder = builder.add_extension(names, critical=False)
        return Issued(_pem(builder.sign(self._key, hashes.SHA256())), _pem_key(key))

    def issue_with_new_key(
        self,
        name: str,
        *,
        now: datetime,
        days: int = CLIENT_DAYS,
        backdate: timedelta = BACKDATE,
    ) -> Issued:
        """Issue a certificate for the device `name` with a key made here: its first bundle.

        `name` becomes the MQTT user name. Raises LocalError as `check_device_name` does.
        """
        check_device_name(name)
        return self._with_key(name, b"", now=now, days=days, backdate=backdate)

    def issue_for_server(
        self, *, now: datetime, days: int = CLIENT_DAYS, backdate: timedelta = BACKDATE,
        of_key: bytes = b"",
    ) -> Issued:  # fmt: skip
        """Issue the certificate that may do everything below midge/v1 on the broker.

        `of_key`: certify this key, and make no new one.
        """
        return self._with_key(SERVER_NAME, of_key, now=now, days=days, backdate=backdate)

    def issue_for_operator(
        self, *, now: datetime, days: int = CLIENT_DAYS, backdate: timedelta = BACKDATE,
        of_key: bytes = b"",
    ) -> Issued:  # fmt: skip
        """Issue the certificate that may command the server and watch.

        `of_key`: certify this key, and make no new one.
        """
        return self._with_key(OPERATOR_NAME, of_key, now=now, days=days, backdate=backdate)

    def issue_for_public_key(
        self,
        ed25519_public: bytes,
        name: str,
        *,
        now: datetime,
        days: int = CLIENT_DAYS,
        backdate: timedelta = BACKDATE,
    ) -> bytes:
        """Certify a key that the device made and keeps: 32 bytes of raw Ed25519.

        The caller must have checked that the device holds the private half, or a device
        could have another's key certified under its own name.
        """
        check_device_name(name)
        try:
            public = Ed25519PublicKey.from_public_bytes(ed25519_public)
        except ValueError as error:
            raise LocalError(
                f"an Ed25519 public key has 32 bytes, not {len(ed25519_public)}; "
                "enrol the device again"
            ) from error
        return self._client(name, public, now=now, days=days, backdate=backdate)

    def renew(
        self,
        certificate: bytes,
        *,
        now: datetime,
        days: int = CLIENT_DAYS,
        backdate: timedelta = BACKDATE,
    ) -> bytes:
        """Certify the same key for the same name and use again, from now on.

        One file changes and no key does, so there is no moment at which the two do not fit.
        Raises LocalError for a certificate that this CA did not issue.
        """
        if not self.issued(certificate):
            raise LocalError("the certificate is not from this fleet's CA; restore both")
        old = x509.load_pem_x509_certificate(certificate)
        facts = read_certificate(certificate)
        public = old.public_key()
        usage = extension(old, x509.ExtendedKeyUsage)
        if usage is None or not isinstance(public, ec.EllipticCurvePublicKey | Ed25519PublicKey):
            raise LocalError("the certificate is not one that midge issued")
        builder = self._leaf(
            facts.name, public, next(iter(usage)), now=now, days=days, backdate=backdate
        )
        names = extension(old, x509.SubjectAlternativeName)
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return _pem(builder.sign(self._key, hashes.SHA256()))

    def revocation_list(self, serials: Sequence[int], *, number: int) -> bytes:
        """Return the list (PEM) of certificates to turn away, for mosquitto's `crlfile`.

        Whole each time: a serial number left out is let in again. `number` grows with each
        list. OpenSSL lets nobody in on a list that has ended or has not begun, so its dates
        are the CA's and no clock is asked: it begins `number` seconds after the CA did, since
        of two lists OpenSSL believes the younger one.
        """
        begins = self._certificate.not_valid_before_utc + timedelta(seconds=number)
        revoked = (
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(begins).build()
            for serial in serials
        )
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(begins)
            .next_update(self._certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for each in revoked:
            builder = builder.add_revoked_certificate(each)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def revocation_number(self, pem: bytes) -> int:
        """The number of a list that this CA made; -1 for anything else."""
        return revocation_number(pem, self.certificate)

    def issued(self, certificate: bytes) -> bool:
        """Whether this CA signed `certificate` (PEM). Says nothing about its dates."""
        return is_issued_by(certificate, self.certificate)

    def _with_key(
        self, name: str, of_key: bytes, *, now: datetime, days: int, backdate: timedelta
    ) -> Issued:
        key = _key(of_key)
        certificate = self._client(name, key.public_key(), now=now, days=days, backdate=backdate)
        return Issued(certificate, _pem_key(key))

    def _client(
        self, name: str, public: PublicKey, *, now: datetime, days: int, backdate: timedelta
    ) -> bytes:
        builder = self._leaf(
            name, public, ExtendedKeyUsageOID.CLIENT_AUTH, now=now, days=days, backdate=backdate
        )
        return _pem(builder.sign(self._key, hashes.SHA256()))

    def _leaf(
        self,
        name: str,
        public: PublicKey,
        use: x509.ObjectIdentifier,
        *,
        now: datetime,
        days: int,
        backdate: timedelta,
    ) -> x509.CertificateBuilder:
        # One purpose each: a device's certificate cannot pose as a broker.
        ours = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            _builder(
                _name(name),
                self._certificate.subject,
                public,
                now=now,
                days=days,
                backdate=backdate,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(ours, critical=False)
        )


def check_device_name(name: str) -> None:
    """Raise LocalError if no device may be called `name`.

    The name becomes a level of topics and of ACL patterns: a "+", "#" or "/" in it would
    let its holder write where others do, and the names of the server and the operator
    carry their rights.
    """
    if not _NAME.fullmatch(name) or len(name) > LIMITS.name_chars_max:
        raise LocalError(
            f"{name!r} cannot be a device's name; use at most "
            f"{LIMITS.name_chars_max} of a-z, 0-9 and inner '-'"
        )
    if name.startswith(_RESERVED_PREFIX):
        raise LocalError(
            f"{name!r} cannot be a device's name: names that begin with "
            f"{_RESERVED_PREFIX!r} belong to the server and the operator"
        )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: PublicKey,
    *,
    now: datetime,
    days: int,
    backdate: timedelta,
) -> x509.CertificateBuilder:
    if now.tzinfo is None:
        raise ValueError("a time without a zone would be off by hours somewhere; pass UTC")
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - backdate)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise LocalError(f"{host!r} is neither a host name in ASCII nor an IP address") from error


def _key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """This one; a new one where there is none. Raises LocalError."""
    return read_key(pem) if pem else ec.generate_private_key(ec.SECP256R1())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
