"""Seal and open, sign and verify: the only file that touches a cryptographic library.

What is here is RFC 9180 (HPKE) with DHKEM(X25519, HKDF-SHA256) and HKDF-SHA256 in
the modes PSK, Auth and AuthPSK, used for its exporter and for single messages;
XChaCha20-Poly1305 for chunks; Ed25519 for signatures. tests/vectors holds the
RFC's own test vectors, and another implementation opens what we seal.

A key seals one thing once: `ChunkKey` takes the chunk's index as its nonce, so the
caller makes a new key (a new HPKE context) for each attempt. A stored attempt is
stored as ciphertext and sent again byte for byte, never sealed again.

Randomness comes in as an argument wherever a core must be replayable; `new_*`
draw it from the operating system.
"""

import hashlib
import hmac
from dataclasses import dataclass

import nacl.bindings
import nacl.exceptions
import nacl.public
import nacl.pwhash
import nacl.signing
import nacl.utils

from broker_bridge.errors import PeerError

__all__ = [
    "AEAD_TAG_BYTES",
    "CLIENT_ID",
    "KEY_BYTES",
    "SIGNATURE_BYTES",
    "ChunkKey",
    "Exchange",
    "KemKey",
    "SignKey",
    "blob_key",
    "client_id",
    "domain",
    "exchange_from",
    "exchange_to",
    "fingerprint",
    "open_message",
    "passphrase_key",
    "random_bytes",
    "seal_message",
    "sha256",
    "verify",
]

KEY_BYTES = 32
AEAD_TAG_BYTES = nacl.bindings.crypto_aead_xchacha20poly1305_ietf_ABYTES
_NONCE_BYTES = nacl.bindings.crypto_aead_xchacha20poly1305_ietf_NPUBBYTES
SIGNATURE_BYTES = 64

random_bytes = nacl.utils.random


def sha256(data: bytes) -> bytes:
    """SHA-256 of `data`, 32 bytes."""
    return hashlib.sha256(data).digest()


def fingerprint(public: bytes) -> str:
    """A public key as 16 hex digits that two people can compare: `15db-5a0a-96ec-1f0b`.

    64 bits: nobody makes so many keys to find one that looks like another's.
    """
    digits = sha256(public)[:8].hex()
    return "-".join(digits[start : start + 4] for start in range(0, 16, 4))


CLIENT_ID = "{name}-{random}"


def client_id(name: str, seed: bytes, pattern: str = CLIENT_ID) -> str:
    """An MQTT client id that stays the same and that nobody without `seed` can name.

    A broker ends the older of two connections with one client id, whatever their
    certificates: with a guessable id any member could cut off any other. `pattern`: for a
    broker with rules of its own about ids.
    """
    random = sha256(b"midge v1 client id" + seed)[:6].hex()
    return pattern.replace("{name}", name).replace("{random}", random)


# ── Signatures ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SignKey:
    """An Ed25519 key pair. `repr` shows no secret."""

    _key: nacl.signing.SigningKey

    @classmethod
    def from_seed(cls, seed: bytes) -> "SignKey":
        """Make the key pair of a 32-byte seed."""
        return cls(nacl.signing.SigningKey(seed))

    @property
    def seed(self) -> bytes:
        """The secret: write it only to a file that its owner alone may read."""
        return bytes(self._key)

    @property
    def public(self) -> bytes:
        """The 32 bytes that others verify with."""
        return bytes(self._key.verify_key)

    def sign(self, kind: str, payload: bytes) -> bytes:
        """Return signature ‖ payload. `kind` says what is signed, so that no other use fits."""
        return self._key.sign(domain(kind) + payload).signature + payload

    def __repr__(self) -> str:
        return f"SignKey({fingerprint(self.public)})"


def verify(public: bytes, kind: str, signed: bytes) -> bytes:
    """Return the payload of what `SignKey.sign` made. Raises PeerError `bad_signature`."""
    if len(signed) < SIGNATURE_BYTES:
        raise PeerError("bad_signature", f"a {kind} message is cut short")
    signature, payload = signed[:SIGNATURE_BYTES], signed[SIGNATURE_BYTES:]
    try:
        nacl.signing.VerifyKey(public).verify(domain(kind) + payload, signature)
    except (nacl.exceptions.CryptoError, RuntimeError, ValueError):
        raise PeerError("bad_signature", f"the signature of a {kind} message is wrong") from None
    return payload


def domain(kind: str) -> bytes:
    """What goes before a payload of this `kind` where it is signed: it ends in a zero byte, and
    no kind has one, so no two pairs of kind and payload read alike."""
    return b"midge v1 " + kind.encode("ascii") + b"\x00"


# ── RFC 9180: DHKEM(X25519, HKDF-SHA256) and the key schedule ───────────────────────────


@dataclass(frozen=True)
class KemKey:
    """An X25519 key pair. `repr` shows no secret."""

    _secret: bytes

    @classmethod
    def from_seed(cls, seed: bytes) -> "KemKey":
        """Make the key pair whose private key is these 32 bytes."""
        if len(seed) != KEY_BYTES:
            raise ValueError("an X25519 key is 32 bytes")
        return cls(seed)

    @property
    def seed(self) -> bytes:
        """The secret: write it only to a file that its owner alone may read."""
        return self._secret

    @property
    def public(self) -> bytes:
        """The 32 bytes that others seal to."""
        return nacl.bindings.crypto_scalarmult_base(self._secret)

    def shared(self, public: bytes) -> bytes:
        """X25519. Raises PeerError `bad_key` for a point that gives no secret (low order)."""
        if len(public) != KEY_BYTES:  # the binding reads 32 bytes, whatever it is given
            raise PeerError("bad_key", "a public key of the wrong length")
        try:
            return nacl.bindings.crypto_scalarmult(self._secret, public)
        except (nacl.exceptions.CryptoError, RuntimeError, ValueError, TypeError):
            # libsodium reports a low-order point as RuntimeError
            raise PeerError("bad_key", "a public key that must not be used") from None

    def __repr__(self) -> str:
        return f"KemKey({fingerprint(self.public)})"


_KEM_SUITE = b"KEM" + (0x0020).to_bytes(2, "big")
_MODES = {(False, False): 0, (False, True): 1, (True, False): 2, (True, True): 3}

# RFC 9180 §7.3: an export-only AEAD. Chunks are sealed with XChaCha20-Poly1305 under an
# exported key, because HPKE's own contexts must be opened in order and MQTT has none.
EXPORT_ONLY = 0xFFFF


def _hkdf_extract(salt: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), ikm, "sha256")


def _hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    out, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        out += block
    return out[:length]


def _extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    """RFC 9180 §4, LabeledExtract."""
    return _hkdf_extract(salt, b"HPKE-v1" + suite + label + ikm)


def _expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    """RFC 9180 §4, LabeledExpand."""
    return _hkdf_expand(key, length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info, length)


def _kem_secret(shared: bytes, context: bytes) -> bytes:
    """RFC 9180 §4.1, ExtractAndExpand."""
    key = _extract(_KEM_SUITE, b"", b"eae_prk", shared)
    return _expand(_KEM_SUITE, key, b"shared_secret", context, KEY_BYTES)


@dataclass(frozen=True)
class Exchange:
    """An HPKE context used through its exporter (RFC 9180 §5.3)."""

    enc: bytes
    _suite: bytes
    _exporter_secret: bytes

    def export(self, context: bytes, length: int = KEY_BYTES) -> bytes:
        """Return `length` bytes that both ends can compute, different for each `context`."""
        return _expand(self._suite, self._exporter_secret, b"sec", context, length)

    def __repr__(self) -> str:
        return f"Exchange({self.enc[:4].hex()}…)"


def _key_schedule(
    enc: bytes, secret: bytes, *, auth: bool, info: bytes, psk: bytes, psk_id: bytes, aead: int
) -> Exchange:
    """RFC 9180 §5.1, KeySchedule."""
    if bool(psk) != bool(psk_id):
        raise ValueError("a PSK and its id come together")
    suite = b"HPKE" + b"".join(n.to_bytes(2, "big") for n in (0x0020, 0x0001, aead))
    context = bytes([_MODES[auth, bool(psk)]])
    context += _extract(suite, b"", b"psk_id_hash", psk_id)
    context += _extract(suite, b"", b"info_hash", info)
    key = _extract(suite, secret, b"secret", psk)
    return Exchange(enc, suite, _expand(suite, key, b"exp", context, KEY_BYTES))


def exchange_to(
    receiver: bytes,
    *,
    ephemeral: KemKey,
    sender: KemKey | None = None,
    info: bytes = b"",
    psk: bytes = b"",
    psk_id: bytes = b"",
    aead: int = EXPORT_ONLY,
) -> Exchange:
    """Start an exchange with the holder of `receiver` (RFC 9180 §5.1, SetupS).

    `ephemeral` is a fresh key for each call; `sender` authenticates us; `psk` mixes in
    a secret both already have. Raises PeerError `bad_key`.
    """
    enc = ephemeral.public
    shared, context = ephemeral.shared(receiver), enc + receiver
    if sender is not None:
        shared += sender.shared(receiver)
        context += sender.public
    return _key_schedule(
        enc, _kem_secret(shared, context), auth=sender is not None, info=info, psk=psk,
        psk_id=psk_id, aead=aead,
    )  # fmt: skip


def exchange_from(
    enc: bytes,
    *,
    receiver: KemKey,
    sender: bytes | None = None,
    info: bytes = b"",
    psk: bytes = b"",
    psk_id: bytes = b"",
    aead: int = EXPORT_ONLY,
) -> Exchange:
    """The other end of `exchange_to` (RFC 9180 §5.1, SetupR). Raises PeerError `bad_key`."""
    shared, context = receiver.shared(enc), enc + receiver.public
    if sender is not None:
        shared += receiver.shared(sender)
        context += sender
    return _key_schedule(
        enc, _kem_secret(shared, context), auth=sender is not None, info=info, psk=psk,
        psk_id=psk_id, aead=aead,
    )  # fmt: skip


# ── Sealing ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ChunkKey:
    """Seals the chunks of one message: XChaCha20-Poly1305, the index as nonce.

    The nonce is fixed by the index because a key is used for one message only.
    """

    _key: bytes

    def seal(self, index: int, body: bytes, header: bytes) -> bytes:
        """Return the ciphertext and tag of chunk `index`; `header` is bound to it."""
        return nacl.bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(
            body, header, _nonce(index), self._key
        )

    def open_(self, index: int, sealed: bytes, header: bytes) -> bytes:
        """Return the body of chunk `index`. Raises PeerError `bad_seal`."""
        try:
            return nacl.bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
                sealed, header, _nonce(index), self._key
            )
        except (nacl.exceptions.CryptoError, RuntimeError, ValueError):
            raise PeerError("bad_seal", "sealed bytes were altered or meant for another") from None

    def __repr__(self) -> str:
        return "ChunkKey(…)"


def _nonce(index: int) -> bytes:
    return index.to_bytes(_NONCE_BYTES, "little")


def seal_message(exchange: Exchange, purpose: bytes, message: bytes) -> bytes:
    """Seal the one message that `exchange` is for."""
    return ChunkKey(exchange.export(purpose)).seal(0, message, purpose)


def open_message(exchange: Exchange, purpose: bytes, sealed: bytes) -> bytes:
    """Open what `seal_message` sealed. Raises PeerError `bad_seal`."""
    return ChunkKey(exchange.export(purpose)).open_(0, sealed, purpose)


def blob_key(fleet_key: bytes, digest: bytes, body_bytes: int) -> ChunkKey:
    """The key under which a task or model with this SHA-256 `digest` travels to the fleet.

    Bound to the content and to how it is cut, so sealing the same bytes again gives the
    same chunks, and no index ever seals two different bodies under one key.
    """
    info = digest + body_bytes.to_bytes(8, "big")
    return ChunkKey(_hkdf_expand(_hkdf_extract(b"midge v1 blob", fleet_key), info, KEY_BYTES))


# ── A key from what a person remembers ──────────────────────────────────────────────────


def passphrase_key(passphrase: bytes, salt: bytes, *, passes: int, memory_bytes: int) -> bytes:
    """Return 32 bytes by Argon2id (RFC 9106, one lane), slow on purpose.

    `salt`: 16 fresh random bytes for each key. The two costs are public and belong beside it;
    whoever reads them from a file bounds them first. Raises ValueError for impossible ones.
    """
    return nacl.pwhash.argon2id.kdf(
        KEY_BYTES, passphrase, salt, opslimit=passes, memlimit=memory_bytes
    )
