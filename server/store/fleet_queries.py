"""What the database knows of the server as a whole, its devices, and its operators' requests."""

from dataclasses import asdict
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, update

from server.store import schema
from server.store.queries import Queries
from server.store.rows import Certificate, Device, DeviceStatus, Token, Wanted

__all__ = ["REQUESTS_KEPT_MAX", "FleetQueries"]

REQUESTS_KEPT_MAX = 1000


_DEVICE = select(schema.devices).where(schema.devices.c.name == bindparam("of"))  # made once


class FleetQueries(Queries):
    """Meta, devices, tokens, requests, rejects."""

    # ── What belongs to the server as a whole ───────────────────────────────────────────

    def meta(self, key: str) -> str | None:
        """A value that `set_meta` stored."""
        value: str | None = self._sql.scalar(
            select(schema.meta.c.value).where(schema.meta.c.key == key)
        )
        return value

    def set_meta(self, key: str, value: str) -> None:
        """Store a small value that is not worth a table."""
        self._put(schema.meta, {"key": key}, {"value": value})

    def next_boot(self) -> int:
        """Count one more start of the server; the first is 1."""
        boot = int(self.meta("boot") or 0) + 1
        self.set_meta("boot", str(boot))
        return boot

    def fleet_epoch(self) -> int:
        """Which fleet key is in use; 0 until one was made."""
        return int(self.meta("fleet_epoch") or 0)

    def set_fleet_epoch(self, epoch: int) -> None:
        """Go to another fleet key. Epochs only grow."""
        if epoch < self.fleet_epoch():
            raise ValueError("a fleet epoch never goes back")
        self.set_meta("fleet_epoch", str(epoch))

    def fleet_changes(self) -> int:
        """How often a command has changed who belongs to the fleet; a running server asks."""
        return int(self.meta("fleet_changes") or 0)

    def count_fleet_change(self) -> None:
        """Tell a running server to look again: whom it knows, and its keys."""
        self.set_meta("fleet_changes", str(self.fleet_changes() + 1))

    # ── Devices and tokens ──────────────────────────────────────────────────────────────

    def add_device(self, device: Device) -> None:
        """Enrol a device, or enrol it anew: then every field is replaced."""
        values = asdict(device)
        self._put(schema.devices, {"name": values.pop("name")}, values)

    def device(self, name: str) -> Device | None:
        """The device of this name."""
        return self._one(Device, _DEVICE, {"of": name})

    def devices(
        self, *, after: str = "", limit: int = 100, status: DeviceStatus | None = None
    ) -> list[Device]:
        """A page of devices by name; the next one starts `after` the last name of this one.

        Without `status`: all but the removed ones.
        """
        c = schema.devices.c
        query = select(schema.devices).where(c.name > after).order_by(c.name).limit(limit)
        query = query.where(c.status != "removed" if status is None else c.status == status)
        return self._all(Device, query)

    def device_counts(self) -> dict[DeviceStatus, int]:
        """How many devices have which status."""
        return self._counts(schema.devices.c.status)

    def shut_out(self) -> dict[str, DeviceStatus]:
        """Every device that may not take part though it was let in once, and why."""
        c = schema.devices.c
        query = select(c.name, c.status).where(c.status.in_(("suspended", "revoked", "removed")))
        return {row[0]: row[1] for row in self._sql.execute(query)}

    def set_device_status(self, name: str, status: DeviceStatus) -> None:
        """Suspend, revoke or restore a device."""
        self._change(schema.devices, {"name": name}, {"status": status})

    def set_device_wanted(self, name: str, wanted: Wanted) -> None:
        """Note what to ask a device for when it is next heard of; "" for nothing."""
        self._change(schema.devices, {"name": name}, {"wanted": wanted})

    def add_certificate(self, certificate: Certificate) -> None:
        """Note a certificate before it is handed out: only what is noted can be revoked.

        It is the newest of its device, if there is one of that name already.
        """
        values = asdict(certificate)
        self._put(schema.certificates, {"serial": values.pop("serial")}, values)
        newest = {
            "certificate_serial": certificate.serial, "certified_until": certificate.until,
        }  # fmt: skip
        query = update(schema.devices).where(schema.devices.c.name == certificate.device)
        self._sql.execute(query.values(newest))

    def certificates(self, device: str) -> list[Certificate]:
        """Every certificate that was made for a name, the one that ends last at the end."""
        c = schema.certificates.c
        query = select(schema.certificates).where(c.device == device)
        return self._all(Certificate, query.order_by(c.until, c.serial))

    def device_seen(self, name: str, at: float, *, round: int | None = None) -> None:  # noqa: A002
        """Note that a device was heard of, and in which round it last took part."""
        values: dict[str, Any] = {"last_seen": at}
        if round is not None:
            values["last_round"] = round
        self._change(schema.devices, {"name": name}, values)

    def put_token(self, token: Token) -> None:
        """Give a device the right to enrol; a former token of that name is void."""
        values = asdict(token)
        self._put(schema.tokens, {"device": values.pop("device")}, values)

    def token(self, device: str) -> Token | None:
        """The token that was given for this name, used or not."""
        return self._one(Token, select(schema.tokens).where(schema.tokens.c.device == device))

    def use_token(self, device: str, at: float) -> bool:
        """Use a token up; False when there is none or it was used before."""
        c = schema.tokens.c
        query = update(schema.tokens).where(c.device == device, c.used_at.is_(None))
        return bool(self._sql.execute(query.values(used_at=at)).rowcount)

    def unused_tokens(self) -> list[Token]:
        """The rights to enrol that nobody has used, the expired ones too, by name."""
        c = schema.tokens.c
        query = select(schema.tokens).where(c.used_at.is_(None)).order_by(c.device)
        return self._all(Token, query)

    def drop_token(self, device: str) -> None:
        """Take back the right to enrol under this name, if it was given."""
        self._sql.execute(delete(schema.tokens).where(schema.tokens.c.device == device))

    def void_tokens(self, at: float) -> int:
        """Take back every right to enrol that was not used; say how many there were."""
        c = schema.tokens.c
        query = update(schema.tokens).where(c.used_at.is_(None), c.expires_at > at)
        return self._sql.execute(query.values(expires_at=at)).rowcount

    # ── Operators' requests, and what was refused ───────────────────────────────────────

    def reply_to(self, request_id: str) -> str | None:
        """The reply that was given to a request, if it is among the newest."""
        c = schema.requests.c
        reply: str | None = self._sql.scalar(select(c.reply).where(c.id == request_id))
        return reply

    def remember_reply(self, request_id: str, reply: str) -> None:
        """Keep a reply, to be given again; the newest REQUESTS_KEPT_MAX are kept."""
        result = self._sql.execute(insert(schema.requests).values(id=request_id, reply=reply))
        key = result.inserted_primary_key
        newest = int(key[0]) if key is not None else 0
        old = schema.requests.c.seq <= newest - REQUESTS_KEPT_MAX
        self._sql.execute(delete(schema.requests).where(old))

    def count_rejects(self, reason: str, by: int = 1) -> None:
        """Count messages that were dropped for this reason (PeerError.reason)."""
        c = schema.rejects.c
        query = update(schema.rejects).where(c.reason == reason).values(count=c.count + by)
        if not self._sql.execute(query).rowcount:
            self._sql.execute(insert(schema.rejects).values(reason=reason, count=by))

    def rejects(self) -> dict[str, int]:
        """How many messages were dropped, by reason."""
        c = schema.rejects.c
        return {row[0]: row[1] for row in self._sql.execute(select(c.reason, c.count))}
