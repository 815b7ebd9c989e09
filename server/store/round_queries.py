"""What the database knows of runs, rounds, receipts and models.

The rules that must hold whatever the caller does are kept here and, where SQL can say
them, by the schema too: one open round, round numbers that only grow, a final receipt
that never changes, one accepted update per device and round. Breaking one of them is a
bug of ours (ValueError), but for the last, which a device can provoke (PeerError).
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from msgspec import structs
from sqlalchemy import (
    BindParameter,
    Select,
    bindparam,
    func,
    insert,
    literal_column,
    select,
    update,
)

from broker_bridge.errors import PeerError
from server.store import schema
from server.store.prepared import Prepared
from server.store.queries import Queries
from server.store.rows import Model, Receipt, ReceiptStatus, Round, RoundStatus, Run, RunStatus

__all__ = ["RoundQueries"]

_FLOOR = "numbers_above"


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


class RoundQueries(Queries):
    """Runs, rounds, receipts, models."""

    # ── Runs ────────────────────────────────────────────────────────────────────────────

    def add_run(self, run: Run) -> int:
        """Start a run; return its id. Only when there is no `current_run`."""
        if self.current_run() is not None:
            raise ValueError("one run at a time")
        values = asdict(run)
        del values["id"]
        result = self._sql.execute(insert(schema.runs).values(values))
        key = result.inserted_primary_key
        if key is None:
            raise ValueError("the database gave a run no id")
        return int(key[0])

    def run(self, run_id: int) -> Run | None:
        """The run of this id."""
        return self._one(Run, select(schema.runs).where(schema.runs.c.id == run_id))

    def current_run(self) -> Run | None:
        """The run that is open or paused, if there is one."""
        query = select(schema.runs).where(schema.runs.c.status.in_(("open", "paused")))
        return self._one(Run, query)

    def latest_run(self) -> Run | None:
        """The run that was started last, whatever became of it."""
        return self._one(Run, select(schema.runs).order_by(schema.runs.c.id.desc()).limit(1))

    def set_run_status(
        self, run_id: int, status: RunStatus, *, reason: str = "", ended_at: float | None = None
    ) -> None:
        """Pause, resume or end a run."""
        values = {"status": status, "reason": reason, "ended_at": ended_at}
        self._change(schema.runs, {"id": run_id}, values)

    def count_round_done(self, run_id: int) -> None:
        """One more round of this run is over."""
        done = schema.runs.c.rounds_done + 1
        self._change(schema.runs, {"id": run_id}, {"rounds_done": done})

    # ── Rounds ──────────────────────────────────────────────────────────────────────────

    def highest_round(self) -> int:
        """The highest round number ever opened, here or before a restore; 0 before the first."""
        return self._at_least_floor(select(func.max(schema.rounds.c.number)), 0)

    def open_round(self, new: Round) -> None:
        """Open a round. Its number is above `highest_round`, and no other is open."""
        if new.number <= self.highest_round():
            raise ValueError("round numbers only grow")
        if self.current_round() is not None:
            raise ValueError("one round at a time")
        self._sql.execute(insert(schema.rounds).values(asdict(new)))

    def round(self, number: int) -> Round | None:
        """The round of this number."""
        return self._one(Round, select(schema.rounds).where(schema.rounds.c.number == number))

    def current_round(self) -> Round | None:
        """The open round, if there is one."""
        return self._one(Round, select(schema.rounds).where(schema.rounds.c.status == "open"))

    def rounds_of(self, run_id: int) -> list[Round]:
        """The rounds of a run, oldest first."""
        c = schema.rounds.c
        return self._all(Round, select(schema.rounds).where(c.run_id == run_id).order_by(c.number))

    def newest_ended_round(self) -> Round | None:
        """The newest round that is over, of whatever run."""
        c = schema.rounds.c
        query = select(schema.rounds).where(c.status != "open").order_by(c.number.desc())
        return self._one(Round, query.limit(1))

    def abandoned_in_a_row(self, run_id: int) -> int:
        """How many rounds of a run were abandoned since the last one that made a model."""
        c = schema.rounds.c
        made = select(func.max(c.number)).where(c.run_id == run_id, c.status == "closed")
        since = self._sql.scalar(made) or 0
        query = select(func.count()).where(
            c.run_id == run_id, c.status == "abandoned", c.number > since
        )
        return int(self._sql.scalar(query) or 0)

    def close_round(
        self, number: int, *, model_after: int, closed_at: float, summary_json: str
    ) -> None:
        """The round made a model. Its key is gone with this commit (see Database.checkpoint)."""
        self._end_round(number, "closed", model_after, closed_at, summary_json)

    def abandon_round(self, number: int, *, closed_at: float, summary_json: str) -> None:
        """The round made no model; `summary_json` says why. Its key is gone too."""
        self._end_round(number, "abandoned", None, closed_at, summary_json)

    def _end_round(
        self,
        number: int,
        status: RoundStatus,
        model_after: int | None,
        closed_at: float,
        summary_json: str,
    ) -> None:
        values = {
            "status": status,
            "round_key": None,
            "fleet_key": None,
            "model_after": model_after,
            "closed_at": closed_at,
            "summary_json": summary_json,
        }
        self._change(schema.rounds, {"number": number, "status": "open"}, values)
        self._note_seen(number)

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
            func.coalesce(d.last_seen, 0.0) <= at,  # it may have enrolled anew since
        )
        self._sql.execute(query.values(last_seen=at, last_round=number))

    # ── Receipts ────────────────────────────────────────────────────────────────────────

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

    # ── Models ──────────────────────────────────────────────────────────────────────────

    def add_model(self, model: Model) -> None:
        """Note a version whose file is on the disk. Versions only grow."""
        if model.version <= self.highest_model():
            raise ValueError("model versions only grow")
        self._sql.execute(insert(schema.models).values(asdict(model)))

    def highest_model(self) -> int:
        """The highest version of any task; -1 before the first, so that versions start at 0."""
        return self._at_least_floor(select(func.max(schema.models.c.version)), -1)

    def model(self, version: int) -> Model | None:
        """The model of this version."""
        return self._one(Model, select(schema.models).where(schema.models.c.version == version))

    def latest_model(self, task_digest: bytes | None = None) -> Model | None:
        """The newest model, of this task if one is named."""
        query = select(schema.models).order_by(schema.models.c.version.desc()).limit(1)
        if task_digest is not None:
            query = query.where(schema.models.c.task_digest == task_digest)
        return self._one(Model, query)

    def newest_models(self) -> set[int]:
        """The newest version of each task."""
        c = schema.models.c
        return set(self._sql.scalars(select(func.max(c.version)).group_by(c.task_digest)))

    def models(self, *, below: int | None = None, limit: int = 100) -> list[Model]:
        """A page of models, newest first; the next one is `below` the last version of this one."""
        c = schema.models.c
        query = select(schema.models).order_by(c.version.desc()).limit(limit)
        return self._all(Model, query if below is None else query.where(c.version < below))

    def set_model_metrics(self, version: int, metrics_json: str) -> None:
        """Note how good a model turned out to be."""
        self._change(schema.models, {"version": version}, {"metrics_json": metrics_json})

    def set_round_summary(self, number: int, summary_json: str) -> None:
        """Note more of how a round ended than was known when it did."""
        self._change(schema.rounds, {"number": number}, {"summary_json": summary_json})

    # ── After a restore (decision 0080) ─────────────────────────────────────────────────

    def set_floor(self, number: int) -> None:
        """Rounds and models are numbered above `number` from now on. It only grows."""
        self._put(schema.meta, {"key": _FLOOR}, {"value": str(max(number, self._floor()))})

    def _floor(self) -> int:
        query = select(schema.meta.c.value).where(schema.meta.c.key == _FLOOR)
        return int(self._sql.scalar(query) or 0)

    def _at_least_floor(self, highest: Select[Any], before: int) -> int:
        found = self._sql.scalar(highest)
        return max(before if found is None else int(found), self._floor() or before)
