"""Adding devices, and letting them in: one-time tokens, bundles, and the answer to `Enrol`.

A token enrols one device, under its name, once. The same keys asking again get the same
answer, so a lost answer costs nothing; other keys with a used token are refused. Keys that
were ever revoked are refused whatever the database says: see roster.py.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from msgspec import UNSET

from broker_bridge.disk import write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.link.access import ca_pem, credentials
from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.enrolment import Bundle, Contact, Credentials
from broker_bridge.wire.envelope import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    KemKey,
    fingerprint,
    random_bytes,
)
from broker_bridge.wire.messages import (
    Announcement,
    Configured,
    Enrol,
    EnrolSecret,
    FleetKey,
    Refused,
    Welcome,
)
from broker_bridge.wire.topics import RESERVED
from server.config import Broker
from server.fleet.authority import CLIENT_DAYS, Authority, Issued, check_device_name
from server.fleet.certificates import CertificateFacts, read_certificate
from server.fleet.home import Home
from server.fleet.keys import ServerKeys
from server.fleet.roster import Roster
from server.store.database import Database
from server.store.rows import Certificate, Device, Token

__all__ = ["Registrar", "add_device", "broker_login", "check_free", "check_name", "ends_soon"]

log = logging.getLogger("midge.server")

TOKEN_HOURS = 24
HOURS_MAX = 24 * 365
_BEHIND_DAYS = 365  # a clock that was wrong by more, when the CA was made or is now
RENEW_DAYS = 60  # before its end a certificate is renewed; earlier if it lives but briefly
_GONE = ("revoked", "removed")
_T = TypeVar("_T")


def add_device(
    home: Home,
    db: Database,
    name: str,
    *,
    broker: Broker,
    now: float,
    hours: float = TOKEN_HOURS,
    by_hand: bool = False,
) -> Path:
    """Make a one-time token for a new device and write its bundle; return the bundle's path.

    A device that was added and has not enrolled gets a new token: the old one is void.
    `by_hand`: whoever comes with it waits until a person has accepted him.
    `broker`: where it finds the broker, and what gets it in there, if that is not midge's own.
    Raises LocalError for a name that cannot be used or is enrolled already, and for files that
    are not as they should be.
    """
    check_name(name, hours)
    keys, authority = home.keys(), home.authority()
    foreign, ca = broker_login(home, broker, name)
    token = Token(
        device=name, secret=random_bytes(KEY_BYTES), created_at=now, expires_at=now + hours * 3600,
        by_hand=by_hand,
    )  # fmt: skip
    issued = Issued(b"", b"")
    if foreign is None or not foreign.says_who:
        issued = _for_as_long_as(token, authority)
    with db.transaction() as tx:
        check_free(tx.device(name), name)
        tx.put_token(token)
        if issued.certificate:
            tx.add_certificate(_noted(name, issued.certificate))
    path = home.bundle(name)
    write_atomic(path, _bundle(keys, token, broker, ca, issued, foreign).encode())
    return path


def _for_as_long_as(token: Token, authority: Authority) -> Issued:
    """What lets a bundle into the broker while its token lives, rounded up to days."""
    moment = datetime.fromtimestamp(token.created_at, UTC)
    days = max(1, -(-round(token.expires_at - token.created_at) // 86_400))
    return authority.issue_with_new_key(token.device, now=moment, days=days)


def _bundle(
    keys: ServerKeys, token: Token, broker: Broker, ca: str, issued: Issued,
    foreign: Credentials | None,
) -> Bundle:  # fmt: skip
    """All that a device needs to find the broker, to get in, to know the server, and to enrol."""
    expires = datetime.fromtimestamp(token.expires_at, UTC)
    return Bundle(
        federation=keys.federation,
        device=token.device,
        broker_host=broker.host,
        broker_port=broker.port,
        root_public=keys.root_public.hex(),
        server_identity=keys.identity.hex(),
        token=token.secret.hex(),
        token_expires=expires.isoformat(timespec="minutes"),
        ca_pem=ca,
        bootstrap_certificate_pem=issued.certificate.decode(),
        bootstrap_key_pem=issued.key.decode(),
        broker=foreign or UNSET,
    )


def broker_login(home: Home, broker: Broker, name: str) -> tuple[Credentials | None, str]:
    """What the device `name` shows to the broker, None for midge's own; and the broker's CA, as
    in a bundle. Raises LocalError.
    """
    login = broker.login("broker.devices")
    if broker.says_who and not login.says_who:
        raise LocalError(
            "the broker in midge.toml wants a login of the server, and none is there for devices; "
            "say under [broker.devices] what they show, or --broker-username here"
        )
    ca = ca_pem(login.ca, home.folder, own=home.authority().certificate.decode())
    return credentials(login, name, home.folder), ca


def check_name(name: str, hours: float) -> None:
    """Raise LocalError for what can be no device's name, and for hours that make no sense."""
    check_device_name(name)
    if not 0 < hours <= HOURS_MAX:
        raise LocalError(f"a token cannot live {hours:g} hours; say more than 0, up to {HOURS_MAX}")
    if name in RESERVED:
        raise LocalError(f"{name!r} is a name of midge itself; choose another")


def check_free(present: Device | None, name: str) -> None:
    """Raise LocalError when a name is in use. `present`: whoever has it now."""
    if present is None or present.status == "removed":
        return
    if present.status == "revoked":
        raise LocalError(
            f"the device {name!r} was revoked; for a new board of this name: "
            f"`midge device replace {name}`"
        )
    raise LocalError(
        f"a device {name!r} is enrolled already; choose another name, or for a new board: "
        f"`midge device replace {name}`"
    )


def _noted(device: str, certificate: bytes) -> Certificate:
    facts = read_certificate(certificate)
    return Certificate(serial=f"{facts.serial:x}", device=device, until=facts.expires.timestamp())


@dataclass(frozen=True)
class Registrar:
    """Answers devices that ask to enrol. One per server."""

    home: Home
    db: Database
    clock: Callable[[], float]
    random: Callable[[int], bytes] = random_bytes

    def keys(self) -> ServerKeys:
        """The server's keys. Raises PeerError while they cannot be read: rounds go on."""
        return _or_later(self.home.keys, "no_keys")

    def roster(self) -> Roster:
        """Who was revoked. Raises PeerError while that cannot be read: rounds go on."""
        return _or_later(self.home.roster, "no_roster")

    def answer(self, device: str, payload: bytes) -> bytes:
        """The signed answer to an `Enrol` that came in on the topic of `device`.

        Raises PeerError for what deserves no answer: not an enrolment, or sealed under
        another token. Whoever holds the true token hears why it is refused.
        """
        enrol: Enrol = messages.decode(payload, Enrol)
        if enrol.device != device:
            raise PeerError("other_device", "an enrolment on another device's topic")
        keys = self.keys()
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
            status="waiting" if token.by_hand else "enrolled",
            enrolled_at=now,
            last_seen=now,
            keys_since=now,
        )
        mine = (new.sign_public, new.kem_public, new.tls_public)
        if self.roster().has_revoked(mine):
            raise _revoked(contact.device)
        with self.db.transaction() as tx:
            present = tx.device(contact.device)
            if present is None or (present.status in _GONE and token.used_at is None):
                if now > token.expires_at:
                    raise PeerError(
                        "expired_token",
                        "the one-time token has expired; make a new bundle with "
                        f"`midge device add {contact.device}`",
                    )
                tx.use_token(contact.device, now)
                tx.add_device(new)
            elif (present.sign_public, present.kem_public, present.tls_public) != mine:
                raise PeerError(
                    "used_token",
                    "this token was used by other keys; if that was not you, revoke the device",
                )
            else:
                new = present
        self.check_status(new)
        return self._welcome(contact, new)

    def check_status(self, device: Device) -> None:
        """Raise PeerError for those who must not get the fleet key."""
        if device.status == "waiting":
            shown = fingerprint(device.sign_public)
            raise PeerError(
                "waiting_device",
                f"{device.name} waits for a person; compare its fingerprint {shown}, then run "
                f"`midge device accept {device.name}`",
            )
        if device.status in _GONE:
            raise _revoked(device.name)
        if device.status == "suspended":
            raise PeerError("suspended_device", f"the device {device.name!r} is suspended")

    def _welcome(self, contact: Contact, device: Device) -> Welcome:
        keys = self.keys()
        pem, until = self.certificate_for(device)
        configured = self.configured(device, pem, until)
        return enrolment.welcome(
            contact,
            configured,
            device_kem=device.kem_public,
            server_kem=keys.kem,
            ephemeral=KemKey.from_seed(self.random(KEY_BYTES)),
        )

    def configured(self, device: Device, pem: str, until: int) -> Configured:
        """What is sealed for a member: the newest fleet key, and that of the open round."""
        keys = self.keys()
        with self.db.reading() as tx:
            this = tx.current_round()
        former = None
        if this is not None and this.fleet_key not in (None, keys.fleet_key):
            opened: Announcement = messages.decode(
                this.announcement[SIGNATURE_BYTES:], Announcement
            )
            former = FleetKey(epoch=opened.fleet_epoch, key=this.fleet_key or b"")
        return Configured(
            device=device.name,
            certificate_pem=pem,
            certified_until=until,
            issued_at=self.clock(),
            fleet_epoch=keys.fleet_epoch,
            fleet_key=keys.fleet_key,
            former=former,
        )

    def certificate_for(self, device: Device) -> tuple[str, int]:
        """The device's certificate and when it ends: the one that it has, or a new one if that
        ends soon. Raises PeerError while this machine's clock or CA is not as it should be.
        """
        now = datetime.fromtimestamp(self.clock(), UTC)
        _check_clock(now, read_certificate(_or_later(self.home.ca_certificate)))
        with self.db.reading() as tx:
            known = tx.certificates(device.name)
        for each in reversed(known):
            if each.tls_public == device.tls_public and not ends_soon(each.until, now.timestamp()):
                return each.pem, int(each.until)
        pem = _or_later(self.home.authority).issue_for_public_key(
            device.tls_public, device.name, now=now
        )
        new = replace(_noted(device.name, pem), tls_public=device.tls_public, pem=pem.decode())
        with self.db.transaction() as tx:  # before it is handed out: only then can it be revoked
            tx.add_certificate(new)
        return new.pem, int(new.until)


def _or_later(read: Callable[[], _T], reason: str = "no_ca") -> _T:
    """What is read of the CA or the keys. While it cannot be, a device waits, and rounds go on."""
    try:
        return read()
    except LocalError as error:
        log.error("no device can be certified: %s", error)
        raise PeerError(reason, "the server cannot certify anybody now; ask who runs it") from None


def ends_soon(until: float, now: float) -> bool:
    """Whether a client's certificate that ends at `until` should be renewed."""
    return until - now < min(RENEW_DAYS, CLIENT_DAYS / 4) * 86_400


def _check_clock(now: datetime, ca: CertificateFacts) -> None:
    """A certificate with dates that cannot be right would lock its device out."""
    if not ca.valid_from - timedelta(days=_BEHIND_DAYS) <= now < ca.expires:
        raise PeerError(
            "wrong_clock",
            f"the server's clock says {now:%Y-%m-%d}, and its CA is valid from "
            f"{ca.valid_from:%Y-%m-%d} to {ca.expires:%Y-%m-%d}; set that clock",
        )


def _revoked(name: str) -> PeerError:
    return PeerError("revoked_device", f"the device {name!r} was revoked")
