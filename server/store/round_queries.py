"""What the database knows of runs, rounds and models.

The rules that must hold whatever the caller does are kept here and, where SQL can say
them, by the schema too: one open round, round numbers that only grow. Breaking one of them
is a bug of ours (ValueError).
"""

from dataclasses import asdict
from typing import Any

from sqlalchemy import Select, func, insert, select

from server.store import schema
from server.store.receipt_queries import ReceiptQueries
from server.store.rows import Model, Round, RoundStatus, Run, RunStatus

__all__ = ["RoundQueries"]

_FLOOR = "numbers_above"


class RoundQueries(ReceiptQueries):
    """Runs, rounds, models; and receipts, from which the end of a round takes who was seen."""

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
