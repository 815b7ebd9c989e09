"""A database that knows less than its devices saw: an old copy that was put back.

Rounds and models only grow, on each device too, so a server that counted on from an old copy
would be ignored, round after round. Whoever puts one back, `midge restore` or a server that
finds such a copy at its start, numbers above everything that can have been lost (decision 0080).

A copy is seen by the file of the highest round beside it, which is written before any device
hears of that round (decision 0140), and by the model files: they are written before the database
hears of them, and one at a time. A database whose log is lost is an old copy like any other.
"""

import logging

import msgspec

from broker_bridge.disk import DiskFullError
from broker_bridge.errors import LocalError
from broker_bridge.wire.messages import RoundSummary
from server.store.database import Database
from server.store.highest import HighestRound
from server.store.models import ModelFiles
from server.store.transaction import Transaction

__all__ = ["abandon_open", "floor_above", "settle_old_copy", "stop_here"]

log = logging.getLogger("midge.server")

_STEP = 1_000_000  # at least so far above the last known number, whatever the clock says


def floor_above(number: int, *, now_s: float) -> int:
    """A number that no round or model had, given the highest that is known of."""
    return max(number + _STEP, int(now_s * 1000))


def abandon_open(tx: Transaction, federation: str, *, now_s: float, reason: str) -> None:
    """End the open round of a copy: its updates are not there, and its key must not outlive it."""
    this, run = tx.current_round(), tx.current_run()
    if this is None or run is None:
        return
    summary = RoundSummary(
        federation=federation, run=run.id, round=this.number, state="abandoned",
        task=run.task_name, model_version=this.model_before, invited=0, joined=0, accepted=0,
        target=run.target, quorum=run.quorum, reason=reason,
    )  # fmt: skip
    text = msgspec.json.encode(summary).decode()
    tx.abandon_round(this.number, closed_at=now_s, summary_json=text)


def stop_here(db: Database, federation: str, *, now_s: float) -> None:
    """End the open run, where the server cannot: the disk lost what its round had promised.

    Whoever says so gives up the round's updates knowingly. Raises LocalError without a run.
    """
    reason = "stopped by the operator, without the server"
    with db.transaction() as tx:
        run = tx.current_run()
        if run is None:
            raise LocalError("no run is open; there is nothing to stop")
        abandon_open(tx, federation, now_s=now_s, reason=reason)
        tx.set_run_status(run.id, "stopped", reason=reason, ended_at=now_s)


def settle_old_copy(
    db: Database, models: ModelFiles, highest: HighestRound, federation: str, *, now_s: float
) -> None:
    """Number on above what devices saw, if the database is older than what lies beside it.

    Afterwards the file of the highest round knows at least what the database knows.
    """
    newest = max(models.versions(), default=-1)
    with db.reading() as tx:
        known = tx.highest_round()
        lacks = _lacks(tx, newest, highest.known)
    if lacks:
        log.warning(
            "%s is an old copy, or its log is lost: %s. What happened since is lost: revoke and "
            "add again whom you revoked and added; rounds go on above it", db.where, lacks,
        )  # fmt: skip
        with db.transaction() as tx:
            abandon_open(tx, federation, now_s=now_s, reason="the database is an old copy")
            tx.set_floor(floor_above(max(newest, known, highest.known), now_s=now_s))
            tx.void_tokens(now_s)  # one of them may have been used since
            known = tx.highest_round()
    try:
        highest.note(known)
    except DiskFullError as error:
        log.warning("%s (what is open goes on meanwhile)", error)


def _lacks(tx: Transaction, newest: int, highest: int) -> str:
    """What the database should know and does not; empty if it is no old copy."""
    known_round, known_model = tx.highest_round(), tx.highest_model()
    if highest > known_round:
        return f"it knows of no round above {known_round}, and round {highest} was opened"
    # A kill may have come between a model's file and its row; the first of all is number 1.
    if newest > max(known_model + 1, 1):
        return f"it knows of no model above {known_model}, and there is model {newest}"
    return ""
