"""Adding devices, and letting them in: one-time tokens, bundles, and the answer to `Enrol`.

A token enrols one device, under its name, once. The same keys asking again get the same
answer, so a lost answer costs nothing; other keys with a used token are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from broker_bridge.disk import write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.enrolment import Bundle, Contact
from broker_bridge.wire.envelope import KEY_BYTES, KemKey, random_bytes
from broker_bridge.wire.messages import Configured, Enrol, EnrolSecret, Refused, Welcome
from broker_bridge.wire.topics import RESERVED
from server.config import Broker
from server.fleet.authority import check_device_name
from server.fleet.home import Home
from server.store.database import Database
from server.store.rows import Device, Token

__all__ = ["Registrar", "add_device"]

TOKEN_HOURS = 24
HOURS_MAX = 24 * 365


def add_device(
    home: Home, db: Database, name: str, *, broker: Broker, now: float, hours: float = TOKEN_HOURS
) -> Path:
    """Make a one-time token for a new device and write its bundle; return the bundle's path.

    A device that was added and has not enrolled gets a new token: the old one is void.
    Raises LocalError for a name that cannot be used or is enrolled already.
    """
    check_device_name(name)
    if not 0 < hours <= HOURS_MAX:
        raise LocalError(f"a token cannot live {hours:g} hours; say more than 0, up to {HOURS_MAX}")
    if name in RESERVED:
        raise LocalError(f"{name!r} is a name of midge itself; choose another")
    keys = home.keys()
    token = Token(
        device=name, secret=random_bytes(KEY_BYTES), created_at=now, expires_at=now + hours * 3600
    )
    with db.transaction() as tx:
        if tx.device(name) is not None:
            raise LocalError(f"a device {name!r} is enrolled already; choose another name")
        tx.put_token(token)
    moment = datetime.fromtimestamp(now, UTC)
    authority = home.authority()
    # The broker lets the bundle in for as long as the token lives, rounded up to days.
    issued = authority.issue_with_new_key(name, now=moment, days=max(1, -(-int(hours) // 24)))
    bundle = Bundle(
        federation=keys.federation,
        device=name,
        broker_host=broker.host,
        broker_port=broker.port,
        root_public=keys.root_public.hex(),
        server_identity=keys.identity.hex(),
        token=token.secret.hex(),
        token_expires=datetime.fromtimestamp(token.expires_at, UTC).isoformat(timespec="minutes"),
        ca_pem=authority.certificate.decode(),
        bootstrap_certificate_pem=issued.certificate.decode(),
        bootstrap_key_pem=issued.key.decode(),
    )
    path = home.bundle(name)
    write_atomic(path, bundle.encode())
    return path


@dataclass(frozen=True)
class Registrar:
    """Answers devices that ask to enrol. One per server."""

    home: Home
    db: Database
    clock: Callable[[], float]
    random: Callable[[int], bytes] = random_bytes

    def answer(self, device: str, payload: bytes) -> bytes:
        """The signed answer to an `Enrol` that came in on the topic of `device`.

        Raises PeerError for what deserves no answer: not an enrolment, or sealed under
        another token. Whoever holds the true token hears why it is refused.
        """
        enrol: Enrol = messages.decode(payload, Enrol)
        if enrol.device != device:
            raise PeerError("other_device", "an enrolment on another device's topic")
        keys = self.home.keys()
        with self.db.reading() as tx:
            token = tx.token(device)
        if token is None:
            raise PeerError("unknown_device", f"nobody added a device {device!r}")
        contact = Contact(keys.federation, device, token.secret)
        secret = enrolment.accept(contact, enrol, server_kem=keys.kem)
        try:
            answer: Welcome | Refused = self._enrol(contact, enrol, secret, token)
        except PeerError as error:
            answer = Refused(reason=str(error))
        return messages.signed(keys.sign, "cfg", contact.scope, answer)

    def _enrol(self, contact: Contact, enrol: Enrol, secret: EnrolSecret, token: Token) -> Welcome:
        now = self.clock()
        new = Device(
            name=contact.device,
            sign_public=secret.sign_public,
            kem_public=enrol.kem_public,
            tls_public=secret.tls_public,
            psk=token.secret,
            software=secret.software,
            enrolled_at=now,
            last_seen=now,
        )
        with self.db.transaction() as tx:
            present = tx.device(contact.device)
            if present is None:
                if now > token.expires_at:
                    raise PeerError(
                        "expired_token",
                        "the one-time token has expired; make a new bundle with "
                        f"`midge device add {contact.device}`",
                    )
                tx.use_token(contact.device, now)
                tx.add_device(new)
            elif (present.sign_public, present.kem_public, present.tls_public) != (
                new.sign_public,
                new.kem_public,
                new.tls_public,
            ):
                raise PeerError(
                    "used_token",
                    "this token was used by other keys; if that was not you, revoke the device",
                )
            elif present.status == "revoked":  # or it would get the fleet key that shuts it out
                raise PeerError("revoked_device", f"the device {contact.device!r} was revoked")
        return self._welcome(contact, new)

    def _welcome(self, contact: Contact, device: Device) -> Welcome:
        keys = self.home.keys()
        moment = datetime.fromtimestamp(self.clock(), UTC)
        certificate = self.home.authority().issue_for_public_key(
            device.tls_public, device.name, now=moment
        )
        configured = Configured(
            device=device.name,
            certificate_pem=certificate.decode(),
            fleet_epoch=keys.fleet_epoch,
            fleet_key=keys.fleet_key,
        )
        return enrolment.welcome(
            contact,
            configured,
            device_kem=device.kem_public,
            server_kem=keys.kem,
            ephemeral=KemKey.from_seed(self.random(KEY_BYTES)),
        )
