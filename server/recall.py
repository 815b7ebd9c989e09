"""What a server said of the rounds that are over, for a broker that forgot it.

A server that starts with no open round would otherwise have nothing to lay on an empty
broker until the next round opens: no task, no model, no end of the last round, no metrics.
Nothing here is needed for a run, so what cannot be read is said, and left.
"""

import logging
from dataclasses import dataclass

import msgspec

from broker_bridge.errors import LocalError
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Announcement, RoundSummary
from server.announcer import Announcer
from server.lineage import Lineage, TaskFiles
from server.store import rows
from server.store.database import Database

__all__ = ["Recalled", "recall"]

log = logging.getLogger("midge.server")


@dataclass(frozen=True)
class Recalled:
    """The end of the newest round, signed, and how it went."""

    signed: bytes
    summary: RoundSummary


def recall(db: Database, files: TaskFiles, line: Lineage, announcer: Announcer) -> Recalled | None:
    """The newest round that is over, if it was of the task at hand.

    With no task at hand, the last run's task and newest model are taken up first.
    """
    with db.reading() as tx:
        ended, run = tx.newest_ended_round(), tx.latest_run()
        model = None if run is None else tx.latest_model(run.task_digest)
    if ended is None or run is None or model is None or ended.run_id != run.id:
        return None
    try:
        if line.task is None:
            task = files.load(files.named(run.task_name))
            if task.plan.digest == run.task_digest:
                line.use(task, model)
        if line.task is None or line.task.plan.digest != run.task_digest:
            log.warning("the task file %r was changed since run %d", run.task_name, run.id)
            return None
    except LocalError as error:
        log.warning("the last run's model is not laid out: %s", error)
        return None
    opened: Announcement = messages.decode(announcer.payload(ended.announcement), Announcement)
    return Recalled(announcer.ending(opened), _summary(ended))


def _summary(ended: rows.Round) -> RoundSummary:
    summary = msgspec.json.decode(ended.summary_json, type=RoundSummary)
    version = summary.model_version if ended.model_after is None else ended.model_after
    return msgspec.structs.replace(summary, model_version=version)
