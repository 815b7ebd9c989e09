"""First contact: how a device that holds a one-time token becomes a member.

    device ─ Enrol: its keys, sealed to the server under the token ─► server
    device ◄─ Welcome: certificate and fleet key, sealed and signed ─ server

The token is the pre-shared key of an HPKE exchange (RFC 9180, AuthPSK), so only its
holder can enrol, and only under the name the token was made for. It stays the
device's pre-shared key afterwards. Both halves of each message are in this file.
"""

import json
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from broker_bridge.errors import PeerError
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import (
    KemKey,
    SignKey,
    exchange_from,
    exchange_to,
    open_message,
    seal_message,
    verify,
)
from broker_bridge.wire.messages import Configured, Enrol, EnrolSecret, ServerIdentity, Welcome
from broker_bridge.wire.topics import is_name

__all__ = [
    "SYSTEM_CA",
    "TEXT_CHARS_MAX",
    "Bundle",
    "Contact",
    "Credentials",
    "Text",
    "accept",
    "open_welcome",
    "request",
    "server_identity",
    "sign_server_identity",
    "welcome",
]


SYSTEM_CA = "system"  # in the place of PEM: the CAs that the device's own system trusts


TEXT_CHARS_MAX = 16_000  # in UTF-8 that fits where MQTT has room for 65,535 bytes (5.0 §1.5.4)
Text = Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]


class Credentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device shows to a broker that midge did not set up. `repr` shows no secret."""

    username: Text = ""
    password: Text = ""
    certificate_pem: str = ""
    key_pem: str = ""
    client_id: Text = ""  # a pattern, see `envelope.client_id`; empty: midge's own

    @property
    def says_who(self) -> bool:
        """Whether the device is somebody else to this broker than to midge's own."""
        return bool(self.username or self.certificate_pem)

    def __repr__(self) -> str:
        return f"Credentials({self.username!r})"


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The one file that `midge device add` hands to a device. It holds a secret."""

    midge_bundle: int = 1
    federation: str
    device: str
    broker_host: str
    broker_port: Annotated[int, Meta(ge=1, le=65_535)]
    root_public: str  # hex; pinned by the device from now on
    server_identity: str  # hex of the signed ServerIdentity
    token: str  # hex, 32 bytes, for one enrolment
    token_expires: str  # for people
    ca_pem: str  # or SYSTEM_CA
    bootstrap_certificate_pem: str  # gets into the broker to enrol, for as long as the token lives
    bootstrap_key_pem: str
    # Absent for midge's own broker, so that a device of an older version reads the bundle.
    broker: Credentials | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if not (is_name(self.federation) and is_name(self.device)):
            raise ValueError("the names of federation and device must be levels of a topic")

    def __repr__(self) -> str:
        return f"Bundle({self.federation}/{self.device})"

    def encode(self) -> bytes:
        """Return the file's bytes: JSON that a person can read."""
        return json.dumps(msgspec.to_builtins(self), indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> "Bundle":
        """Read the file's bytes. Raises PeerError `bad_bundle`."""
        try:
            bundle = msgspec.json.decode(data, type=cls)
            sizes = len(bytes.fromhex(bundle.token)), len(bytes.fromhex(bundle.root_public))
            bytes.fromhex(bundle.server_identity)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PeerError("bad_bundle", f"this is not a device bundle: {error}") from None
        if bundle.midge_bundle != 1 or sizes != (32, 32):
            raise PeerError("bad_bundle", "this bundle was made by another version of midge")
        return bundle


def sign_server_identity(root: SignKey, identity: ServerIdentity) -> bytes:
    """Sign the server's public keys with the federation's root."""
    return messages.signed(root, "server-identity", identity.federation, identity)


def server_identity(root_public: bytes, federation: str, signed: bytes) -> ServerIdentity:
    """Verify and read them. Raises PeerError."""
    identity: ServerIdentity = messages.opened(
        root_public, "server-identity", federation, signed, ServerIdentity
    )
    if identity.federation != federation:
        raise PeerError("bad_signature", "the server's identity is for another federation")
    return identity


@dataclass(frozen=True)
class Contact:
    """The two ends of an enrolment and the token they share."""

    federation: str
    device: str
    token: bytes

    @property
    def scope(self) -> str:
        """What signatures between server and this device are bound to."""
        return f"{self.federation}/{self.device}"

    @property
    def psk_id(self) -> bytes:
        """The HPKE `psk_id`."""
        return f"midge v1 {self.scope}".encode()

    def __repr__(self) -> str:
        return f"Contact({self.scope})"


def request(
    contact: Contact,
    *,
    sign: SignKey,
    kem: KemKey,
    tls_public: bytes,
    server_kem: bytes,
    ephemeral: KemKey,
    software: str,
) -> Enrol:
    """The device's first message."""
    exchange = exchange_to(
        server_kem, ephemeral=ephemeral, sender=kem, info=b"midge v1 enrol", psk=contact.token,
        psk_id=contact.psk_id,
    )  # fmt: skip
    secret = EnrolSecret(
        sign_public=sign.public,
        tls_public=tls_public,
        proof=sign.sign(f"enrol {contact.scope}", kem.public),
        software=software,
    )
    sealed = seal_message(exchange, b"midge v1 enrol", messages.encode(secret))
    return Enrol(device=contact.device, kem_public=kem.public, enc=exchange.enc, sealed=sealed)


def accept(contact: Contact, enrol: Enrol, *, server_kem: KemKey) -> EnrolSecret:
    """Open a device's first message with the token made for it.

    Raises PeerError: `bad_seal` for another token, `bad_signature` for keys that are not
    the sender's own.
    """
    exchange = exchange_from(
        enrol.enc, receiver=server_kem, sender=enrol.kem_public, info=b"midge v1 enrol",
        psk=contact.token, psk_id=contact.psk_id,
    )  # fmt: skip
    opened = open_message(exchange, b"midge v1 enrol", enrol.sealed)
    secret: EnrolSecret = messages.decode(opened, EnrolSecret)
    if verify(secret.sign_public, f"enrol {contact.scope}", secret.proof) != enrol.kem_public:
        raise PeerError("bad_signature", "the device's keys do not belong together")
    return secret


def welcome(
    contact: Contact,
    configured: Configured,
    *,
    device_kem: bytes,
    server_kem: KemKey,
    ephemeral: KemKey,
    nonce: bytes = b"",
) -> Welcome:
    """The server's answer, for this device's eyes only.

    `nonce`: of the `Renew` that it answers; an answer to one request opens for no other, so
    an old one cannot take a device back to an old key.
    """
    exchange = exchange_to(
        device_kem, ephemeral=ephemeral, sender=server_kem, info=_info(nonce),
        psk=contact.token, psk_id=contact.psk_id,
    )  # fmt: skip
    sealed = seal_message(exchange, b"midge v1 welcome", messages.encode(configured))
    return Welcome(enc=exchange.enc, sealed=sealed)


def _info(nonce: bytes) -> bytes:
    return b"midge v1 renewed" + nonce if nonce else b"midge v1 welcome"


def open_welcome(
    contact: Contact, answer: Welcome, *, kem: KemKey, server_kem: bytes, nonce: bytes = b""
) -> Configured:
    """Open the server's answer to an `Enrol`, or to the `Renew` with this `nonce`.

    Raises PeerError `bad_seal`.
    """
    exchange = exchange_from(
        answer.enc, receiver=kem, sender=server_kem, info=_info(nonce),
        psk=contact.token, psk_id=contact.psk_id,
    )  # fmt: skip
    opened = open_message(exchange, b"midge v1 welcome", answer.sealed)
    configured: Configured = messages.decode(opened, Configured)
    return configured
