"""What the database knows of updates and what became of them: receipts.

The rules that must hold whatever the caller does are kept here and by the schema, too: a
final receipt never changes, and a device has one accepted update in a round. Breaking the
first is a bug of ours (ValueError); the last a device can provoke (PeerError).
"""

from collections.abc import Sequence
from functools import cache

from msgspec import structs
from sqlalchemy import BindParameter, bindparam, func, insert, literal_column, or_, select, update

from broker_bridge.errors import PeerError
from server.store import schema
from server.store.prepared import Prepared
from server.store.queries import Queries
from server.store.rows import Receipt, ReceiptStatus

__all__ = ["ReceiptQueries"]

# What every group of updates asks for.
_ADD_RECEIPT = Prepared(insert(schema.receipts))
# Not a parameter: SQLite then knows that the index of accepted ones is enough.
_IS_ACCEPTED = schema.receipts.c.status == literal_column("'accepted'")


@cache
def _accepted_among(count: int) -> Prepared:
    """Those of so many devices that have an accepted update in a round."""
    c = schema.receipts.c
    names: list[BindParameter[str]] = [bindparam(f"device{n}") for n in range(count)]
    return Prepared(
        select(c.device).where(c.round == bindparam("round"), _IS_ACCEPTED, c.device.in_(names))
    )


class ReceiptQueries(Queries):
    """Receipts, and when their devices were seen."""

    def add_receipt(self, receipt: Receipt) -> None:
        """Note an upload that was begun, or one that was refused at once."""
        if receipt.status == "accepted":
            self._refuse_second(receipt.round, receipt.device)
        self._sql.execute(insert(schema.receipts).values(structs.asdict(receipt)))

    def add_accepted(self, receipts: Sequence[Receipt]) -> None:
        """Note updates of one round that are on disk and in the sum.

        Raises PeerError `already_counted` when one of their devices has an accepted update.
        """
        if not receipts:
            return
        devices = [each.device for each in receipts]
        twice = len(set(devices)) < len(devices)
        if twice or self._any_accepted(receipts[0].round, devices):
            raise PeerError("already_counted", "a device already has an update in this round")
        _ADD_RECEIPT.each(self._sql, receipts)

    def _any_accepted(self, number: int, devices: list[str]) -> bool:
        # The last name is asked for again and again up to a power of two: few statements then
        # serve groups of every size.
        count = 1 << (len(devices) - 1).bit_length()
        names = devices + devices[-1:] * (count - len(devices))
        row = {f"device{n}": name for n, name in enumerate(names)}
        found = _accepted_among(count).one(self._sql, {"round": number, **row})
        return found.first() is not None

    def receipt(self, upload: bytes) -> Receipt | None:
        """What became of this upload."""
        return self._one(Receipt, select(schema.receipts).where(schema.receipts.c.upload == upload))

    def receipts(
        self, number: int, *, status: ReceiptStatus | None = None, device: str | None = None
    ) -> list[Receipt]:
        """The receipts of a round, by upload id: the same order at every reading."""
        c = schema.receipts.c
        query = select(schema.receipts).where(c.round == number).order_by(c.upload)
        if status is not None:
            query = query.where(c.status == status)
        if device is not None:
            query = query.where(c.device == device)
        return self._all(Receipt, query)

    def receipt_counts(self, number: int) -> dict[ReceiptStatus, int]:
        """How many uploads of a round have which status."""
        return self._counts(schema.receipts.c.status, schema.receipts.c.round == number)

    def rounds_by_device(self) -> dict[str, int]:
        """In how many rounds each device had an update accepted; those with none are left out."""
        c = schema.receipts.c
        return self._counts(c.device, c.status == "accepted")

    def seen_in(self, number: int) -> dict[str, float]:
        """When each device's update of this round was accepted; of an open round, the devices'
        own rows say so only after its end.
        """
        c = schema.receipts.c
        query = select(c.device, c.at).where(c.round == number, _IS_ACCEPTED)
        return {row[0]: row[1] for row in self._sql.execute(query)}

    def settle(self, upload: bytes, status: ReceiptStatus, *, at: float, reason: str = "") -> None:
        """Give the final answer on an upload that is `going`.

        Raises PeerError `already_counted` when another upload of this device was accepted
        in this round; then nothing has changed.
        """
        receipt = self.receipt(upload)
        if receipt is None or receipt.status != "going" or status == "going":
            raise ValueError("only an upload under way is settled, and only once")
        if status == "accepted":
            self._refuse_second(receipt.round, receipt.device)
        values = {"status": status, "reason": reason, "at": at}
        self._change(schema.receipts, {"upload": upload}, values)

    def withdraw(self, number: int, device: str, *, at: float, reason: str) -> list[Receipt]:
        """Take back what a device has in a round, accepted or under way; return what it was."""
        c = schema.receipts.c
        mine = (c.round == number, c.device == device, c.status.in_(("going", "accepted")))
        found = self._all(Receipt, select(schema.receipts).where(*mine).order_by(c.upload))
        self._note_seen(number, device)
        values = {"status": "withdrawn", "reason": reason, "at": at}
        self._sql.execute(update(schema.receipts).where(*mine).values(values))
        return found

    def gone_devices(self, number: int) -> list[str]:
        """Devices that are revoked or removed, and have something in this round all the same."""
        r, d = schema.receipts.c, schema.devices.c
        query = select(r.device).distinct().where(
            r.round == number, r.status.in_(("going", "accepted")), d.name == r.device,
            d.status.in_(("revoked", "removed")),
        )  # fmt: skip
        return list(self._sql.scalars(query.order_by(r.device)))

    def settle_rest(self, number: int, *, at: float, reason: str) -> int:
        """Make every upload of a round that is still going `late`; say how many."""
        c = schema.receipts.c
        query = update(schema.receipts).where(c.round == number, c.status == "going")
        return self._sql.execute(query.values(status="late", reason=reason, at=at)).rowcount

    def _refuse_second(self, number: int, device: str) -> None:
        if self.receipts(number, status="accepted", device=device):
            raise PeerError("already_counted", f"{device} already has an update in round {number}")

    def _note_seen(self, number: int, *devices: str) -> None:
        """Each device (or these) was last seen when its update of this round was accepted.

        Once for a round, not at every update: the devices are all over their table, and a
        page of it for each of them would be most of what a commit writes (decision 0133).
        """
        r, d = schema.receipts.c, schema.devices.c
        mine = (r.round == number, _IS_ACCEPTED)
        at = select(r.at).where(*mine, r.device == d.name).scalar_subquery()
        query = update(schema.devices).where(
            d.name.in_(devices or select(r.device).where(*mine)),
            # It may have enrolled anew since; one that took part before did not, and is noted
            # also when this machine's clock was set back.
            or_(func.coalesce(d.last_seen, 0.0) <= at, d.last_round > 0),
        )
        self._sql.execute(query.values(last_seen=at, last_round=number))
