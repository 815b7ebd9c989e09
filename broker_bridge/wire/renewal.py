"""New keys for a device that has some: signed by the old, and each by itself.

    device ─ Renew: what I have, perhaps new keys ─► server
    device ◄─ Welcome: what is newer, sealed to the keys that hold from now on ─ server

`Renew` is signed by the device's present key, which is the right to replace it; the new keys
show in `RenewKeys` that the sender holds them, too. The new key for sealing cannot sign: it
shows itself by opening the answer. Both halves of `RenewKeys` are in this file; `Welcome` is
in `enrolment`, bound to the nonce of the `Renew` that it answers.
"""

from broker_bridge.errors import PeerError
from broker_bridge.wire.envelope import SIGNATURE_BYTES, SignKey, verify
from broker_bridge.wire.messages import RenewKeys

__all__ = ["NONCE_BYTES", "accept_keys", "offer_keys"]

NONCE_BYTES = 16


def offer_keys(scope: str, *, sign: SignKey, kem_public: bytes, tls: SignKey) -> RenewKeys:
    """The device's half: new keys for `scope`, which is `federation/device`."""
    said = sign.public + kem_public + tls.public
    return RenewKeys(
        sign_public=sign.public,
        kem_public=kem_public,
        tls_public=tls.public,
        sign_proof=sign.sign(f"renew-sign {scope}", said)[:SIGNATURE_BYTES],
        tls_proof=tls.sign(f"renew-tls {scope}", said)[:SIGNATURE_BYTES],
    )


def accept_keys(scope: str, keys: RenewKeys) -> None:
    """The server's half. Raises PeerError `bad_signature` for keys that are not the sender's own,
    `same_key` for one key in two places."""
    said = keys.sign_public + keys.kem_public + keys.tls_public
    verify(keys.sign_public, f"renew-sign {scope}", keys.sign_proof + said)
    verify(keys.tls_public, f"renew-tls {scope}", keys.tls_proof + said)
    if keys.sign_public == keys.tls_public:
        raise PeerError("same_key", "one key is given for two uses")
