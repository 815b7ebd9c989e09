"""The words of a renewal, as the device says and hears them. When to say them: `renewing.py`.

New keys are on the disk before the server hears of them. Which ones hold, the old or the new,
only the server knows until its answer is here: so every second question is signed by the
new ones. An answer opens under the keys that hold, and for one of our last questions only.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path

from broker_bridge.disk import Disk
from broker_bridge.errors import PeerError
from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.enrolment import Contact
from broker_bridge.wire.envelope import SignKey
from broker_bridge.wire.messages import Configured, Renew, Renewal, RenewKeys, Welcome
from broker_bridge.wire.renewal import NONCE_BYTES, offer_keys
from device_client import identity as identities
from device_client.identity import Identity, Keys

__all__ = ["Renewer", "is_meant"]

_QUESTIONS_MAX = 8  # whose answers are still taken


class Renewer:
    """Asks for what is newer, and understands the answer."""

    def __init__(
        self, folder: Path, *, disk: Disk, random: Callable[[int], bytes], software: str
    ) -> None:
        self._folder = folder
        self._disk = disk
        self._random = random
        self._software = software[:80]
        self._nonces: deque[bytes] = deque(maxlen=_QUESTIONS_MAX)

    def offered(self, identity: Identity) -> Keys | None:
        """New keys that the server has not confirmed yet. Raises LocalError."""
        return identities.offered_keys(self._folder, identity, disk=self._disk)

    def question(self, identity: Identity, *, keys: bool, attempt: int) -> bytes:
        """The signed `Renew`, with new `keys` or without. Raises LocalError."""
        offered = self.offered(identity)
        if keys and offered is None:
            offered = identities.renewing_keys(
                self._folder, identity, disk=self._disk, random=self._random
            )
        if offered is not None and attempt % 2 == 0:
            return self._signed(identity, offered.sign, None)  # if they hold already
        offer = _offer(identity.scope, offered) if keys and offered is not None else None
        return self._signed(identity, identity.keys.sign, offer)

    def _signed(self, identity: Identity, sign: SignKey, keys: RenewKeys | None) -> bytes:
        nonce = self._random(NONCE_BYTES)
        self._nonces.append(nonce)
        message = Renew(
            nonce=nonce, fleet_epoch=identity.fleet_epoch,
            certified_until=identity.certified_until, software=self._software, keys=keys,
        )  # fmt: skip
        return messages.signed(sign, "renew", identity.scope, message)

    def answer(self, identity: Identity, welcome: Welcome) -> Identity:
        """The identity that an answer gives us. Raises PeerError for one that is not ours, or is
        older than one that was taken."""
        contact = Contact(identity.federation, identity.device, identity.psk)
        offered = self.offered(identity)
        for keys in [identity.keys] if offered is None else [offered, identity.keys]:
            for nonce in reversed(self._nonces):
                found = _opened(contact, welcome, keys, identity.server_kem, nonce)
                if found is not None:
                    new = identities.renewed(identity, found, keys)
                    self._forget_before(nonce)
                    return new
        raise PeerError("stale_answer", "an answer to no question of ours")

    def _forget_before(self, nonce: bytes) -> None:
        """An answer to an older question would bring an older certificate back."""
        while self._nonces[0] != nonce:
            self._nonces.popleft()


def is_meant(identity: Identity, request: Renewal) -> bool:
    """Whether the server asks for what we still have: else it is an old request."""
    named = request.sign_public, request.certified_until
    return named == (identity.keys.sign.public, identity.certified_until)


def _offer(scope: str, keys: Keys) -> RenewKeys:
    tls = SignKey.from_seed(keys.tls_seed)
    return offer_keys(scope, sign=keys.sign, kem_public=keys.kem.public, tls=tls)


def _opened(
    contact: Contact, welcome: Welcome, keys: Keys, server_kem: bytes, nonce: bytes
) -> Configured | None:
    try:
        return enrolment.open_welcome(
            contact, welcome, kem=keys.kem, server_kem=server_kem, nonce=nonce
        )
    except PeerError:
        return None
