"""Renewing what a device has: the answer to `Renew`, and asking for one in time.

A device that asks gets the newest fleet key, and a certificate when its own is near its end or
is not its newest one. New keys take the place of the old in one transaction: before it the old
ones hold, after it the new, and nothing is kept of the old. The same question again gets the
same answer, so a lost one costs nothing.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from broker_bridge.errors import PeerError
from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.enrolment import Contact
from broker_bridge.wire.envelope import KEY_BYTES, KemKey
from broker_bridge.wire.messages import Refused, Renew, Renewal, RenewKeys, Welcome
from broker_bridge.wire.renewal import accept_keys
from server.fleet.enrolment import Registrar, ends_soon
from server.store.rows import Device

__all__ = ["Renewals"]

log = logging.getLogger("midge.server")

_ASK_AGAIN_S = 5.0  # a device that shows itself again and again is asked no more often
_ASKED_MAX = 20_000


@dataclass
class Renewals:
    """Answers devices that renew, and asks those that should. One per server."""

    registrar: Registrar
    _asked: dict[str, float] = field(default_factory=dict)  # device, and when: monotonic

    # ── answering ───────────────────────────────────────────────────────────────────────

    def answer(self, name: str, payload: bytes, *, has_upload: bool) -> bytes:
        """The signed answer to a `Renew` of the device `name`.

        `has_upload`: its update lies in the open round, and a restart would open it again with
        the keys in the database: they stay until the round is over.
        Raises PeerError for what deserves no answer.
        """
        office = self.registrar
        keys, roster = office.keys(), office.roster()
        with office.db.reading() as tx:
            device = tx.device(name)
        if device is None:
            raise PeerError("unknown_device", f"no device {name!r} is enrolled")
        contact = Contact(keys.federation, name, device.psk)
        said: Renew = messages.opened(device.sign_public, "renew", contact.scope, payload, Renew)
        try:
            if roster.has_revoked((device.sign_public, device.kem_public, device.tls_public)):
                raise PeerError("revoked_device", f"the device {name!r} was revoked")
            office.check_status(device)
        except PeerError as error:
            return messages.signed(keys.sign, "cfg", contact.scope, Refused(reason=str(error)))
        if said.keys is not None:
            device = self._switch(contact, device, said.keys, has_upload=has_upload)
        answer = self._welcome(contact, device, said)
        return messages.signed(keys.sign, "cfg", contact.scope, answer)

    def _switch(
        self, contact: Contact, device: Device, keys: RenewKeys, *, has_upload: bool
    ) -> Device:
        """Put new keys in the place of the device's. Raises PeerError, and nothing changed."""
        if has_upload:
            raise PeerError("open_round", "new keys wait until the round with an update is over")
        accept_keys(contact.scope, keys)
        new = replace(
            device, sign_public=keys.sign_public, kem_public=keys.kem_public,
            tls_public=keys.tls_public, keys_since=self.registrar.clock(), wanted="",
        )  # fmt: skip
        mine = (new.sign_public, new.kem_public, new.tls_public)
        if self.registrar.roster().has_revoked(mine):
            raise PeerError("revoked_device", "these keys were revoked once")
        with self.registrar.db.transaction() as tx:
            present = tx.device(device.name)
            if present != device:  # a command came between: the device asks again
                raise PeerError("changed_device", f"{device.name!r} was changed just now")
            tx.add_device(new)
        log.info("%s has new keys", device.name)
        return new

    def _welcome(self, contact: Contact, device: Device, said: Renew) -> Welcome:
        office, keys = self.registrar, self.registrar.keys()
        pem, until = "", int(device.certified_until)
        if self._needs_certificate(device, said):
            try:
                pem, until = office.certificate_for(device)
            except PeerError as error:
                log.error("no certificate for %s: %s", device.name, error)
        configured = office.configured(device, pem, until if pem else said.certified_until)
        return enrolment.welcome(
            contact,
            configured,
            device_kem=device.kem_public,
            server_kem=keys.kem,
            ephemeral=KemKey.from_seed(office.random(KEY_BYTES)),
            nonce=said.nonce,
        )

    def _needs_certificate(self, device: Device, said: Renew) -> bool:
        has_newest = said.certified_until == int(device.certified_until)
        return said.keys is not None or not has_newest or self._ends_soon(device)

    # ── asking ──────────────────────────────────────────────────────────────────────────

    def request(self, device: Device, *, now_s: float, online: int) -> bytes | None:
        """A signed `Renewal` for this device, if it should renew and was not asked just now.

        `online`: how many may be asked at the same time; they are told to spread.
        """
        if device.wanted != "rotate" and not self._ends_soon(device):
            return None
        if now_s - self._asked.get(device.name, -_ASK_AGAIN_S) < _ASK_AGAIN_S:
            return None
        try:
            keys = self.registrar.keys()
        except PeerError:  # it is in the log; the device is asked later
            return None
        if len(self._asked) >= _ASKED_MAX:
            self._asked.clear()
        self._asked[device.name] = now_s
        request = Renewal(
            sign_public=device.sign_public,
            certified_until=int(device.certified_until),
            keys=device.wanted == "rotate",
            spread_s=online / 20,
        )
        return messages.signed(keys.sign, "cfg", f"{keys.federation}/{device.name}", request)

    def due(self) -> Iterator[Device]:
        """Every member that should renew, whoever is there."""
        after = ""
        while True:
            with self.registrar.db.reading() as tx:
                page = tx.devices(after=after, limit=500, status="enrolled")
            if not page:
                return
            yield from (d for d in page if d.wanted == "rotate" or self._ends_soon(d))
            after = page[-1].name

    def forget_asked(self) -> None:
        """A person may have asked for something just now: it is not too early to say so."""
        self._asked.clear()

    def _ends_soon(self, device: Device) -> bool:
        known = device.certified_until > 0
        return known and ends_soon(device.certified_until, self.registrar.clock())
