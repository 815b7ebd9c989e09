"""What lies on the broker for everyone: presence, identity, task, model, announcement, summary.

All of it is retained, and all of it can be laid out again from here for a broker that forgot
it. Nobody relies on its being there: a device that misses something asks for it.
"""

import logging
import time
from collections.abc import Callable
from typing import Literal

from broker_bridge.errors import LinkError, PeerError
from broker_bridge.link.base import Link
from broker_bridge.wire import blobs, messages
from broker_bridge.wire.messages import Announcement, Blob, NeedBlob, ServerPresence
from broker_bridge.wire.topics import Topics
from server.ledger import Ledger

__all__ = ["Noticeboard"]

log = logging.getLogger("midge.server")

_REPEAT_BLOB_S = 5.0  # a blob that many devices miss is retained again once, not for each
Kind = Literal["task", "model"]


class Noticeboard:
    """One federation's retained messages. `open_round` says how the open round announced them."""

    def __init__(
        self,
        link: Link,
        ledger: Ledger,
        topics: Topics,
        *,
        open_round: Callable[[], Announcement | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.announced: bytes | None = None  # signed, of the round that is open or was last
        self.summary: bytes | None = None  # what `metrics` says
        self.is_laid_out = False
        self._link = link
        self._ledger = ledger
        self._topics = topics
        self._open_round = open_round
        self._clock = clock
        self._chunks: dict[Kind, int] = {}  # how many lie there
        self._at_s: dict[Kind, float] = {}
        self._sealed_under: dict[Kind, bytes] = {}  # the fleet key

    def lay_out(self, *, blobs_too: bool) -> None:
        """Retain everything that should lie there: a broker without our session may have nothing.

        The announcement comes last. A device that hears it again asks at once for what it
        still waits for: by then task and model are there, and so are our subscriptions.
        """
        self.show_presence("online")  # our last will may have said otherwise
        self.identify()
        if blobs_too:
            self.is_laid_out = True
            self.retain("task", "model")
        if self.summary is not None:
            self.summarise(self.summary)
        if self.announced is not None:
            self.announce(self.announced)

    def show_presence(self, state: Literal["online", "offline"]) -> None:
        """Say whether the server is there."""
        data = messages.encode_json(ServerPresence(state=state))
        self.publish(self._topics.srv, data, retain=True)
        log.info("the server is %s", state)

    def identify(self) -> None:
        """Say who the server is, as the root signed it."""
        self.publish(self._topics.identity, self._ledger.keys.identity, retain=True)

    def announce(self, signed: bytes) -> None:
        """Say that a round is open, or closed."""
        self.announced = signed
        self.publish(self._topics.round, signed, retain=True)

    def summarise(self, summary: bytes) -> None:
        """Say what came of the last round."""
        self.summary = summary
        self.publish(self._topics.metrics, summary, retain=True)

    def retain(self, *kinds: Kind) -> None:
        """Lay the task or the model out, and clear what an older one left behind."""
        task = self._ledger.task
        if task is None:
            return
        for kind in kinds:
            content = task.plan_bytes if kind == "task" else self._ledger.model_bytes
            self._retain(kind, content)

    def _retain(self, kind: Kind, content: bytes) -> None:
        topic = self._topics.task if kind == "task" else self._topics.model
        self._sealed_under[kind] = key = self._ledger.fleet_key
        count = 0
        chunks = blobs.seal_blob(content, self._blob(kind), fleet_key=key)
        for count, chunk in enumerate(chunks, start=1):
            self.publish(topic(count - 1), chunk, retain=True)
        for index in range(count, self._chunks.get(kind, count)):
            self.publish(topic(index), b"", retain=True)
        self._chunks[kind] = count
        self._at_s[kind] = self._clock()

    def reseal(self) -> None:
        """Lay out again what is sealed under another fleet key than the present one."""
        for kind, key in list(self._sealed_under.items()):
            if key != self._ledger.fleet_key:
                self.retain(kind)

    def repeat(self, need: NeedBlob) -> None:
        """Lay out again what a device misses. Raises PeerError for what is not the present one."""
        if self._ledger.task is None:
            raise PeerError("no_open_round", "there is no task to send")
        if self._blob(need.kind).digest != need.digest:
            raise PeerError("other_round", f"a {need.kind} that is not the present one")
        if self._clock() - self._at_s.get(need.kind, -_REPEAT_BLOB_S) >= _REPEAT_BLOB_S:
            self.retain(need.kind)

    def _blob(self, kind: Kind) -> Blob:
        """How it is cut: as the open round announced it, whatever the broker takes by now."""
        say = self._ledger.announcer
        fresh = say.task_blob() if kind == "task" else say.model_blob()
        this = self._open_round()
        announced = None if this is None else this.task if kind == "task" else this.model
        return announced if announced and announced.digest == fresh.digest else fresh

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish anything; what cannot be sent now is asked for again by who misses it."""
        try:
            self._link.publish(topic, payload, retain=retain)
        except LinkError as error:
            log.warning("not sent: %s", error)
