"""A broker and its clients in one process, as unreliable as its seed says.

Promises what `link.base` promises, with retained messages, last wills, persistent
sessions and back-pressure as a real broker has them, and the same behaviour for the
same seed and the same calls. There are no threads and no clock: time moves when a
`receive` waits, or when `advance` is called, so an hour of retries takes no time.

Trouble strikes deliveries: a message is accepted from its publisher and then, for each
subscriber apart, lost, repeated, delayed or overtaken. Does not check rights (ACL).
"""

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from broker_bridge.errors import LinkError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Connected, Disconnected, LinkEvent, LinkLimits, Message
from broker_bridge.link.filters import check_filter, check_topic, matches

__all__ = ["MemoryBroker", "MemoryLink"]

_OVERTAKES_MAX = 8  # how many places a message may jump ahead
_QUEUE_MESSAGES_MAX = 1_000_000


@dataclass
class _Session:
    """What the broker keeps for one client id, connected or not."""

    will: Message | None
    session_s: float
    filters: dict[str, None] = field(default_factory=dict)
    waiting: list[tuple[float, float, int, Message]] = field(default_factory=list)  # a heap
    unacknowledged: OrderedDict[int, Message] = field(default_factory=OrderedDict)
    last_due_s: float = 0.0
    away_since_s: float = 0.0
    link: "MemoryLink | None" = None


class MemoryBroker:
    """The broker. `loss`, `repeat` and `reorder` are probabilities, `delay` is in seconds."""

    def __init__(
        self,
        *,
        seed: int = 0,
        loss: float = 0.0,
        repeat: float = 0.0,
        delay: float = 0.0,
        reorder: float = 0.0,
        limits: LinkLimits | None = None,
        receive_max: int = 64,
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable on purpose, no secret
        self._loss, self._repeat, self._delay_s, self._reorder = loss, repeat, delay, reorder
        self.limits = limits or LinkLimits(LIMITS.packet_bytes_max, LIMITS.inflight_max)
        self.receive_max = receive_max
        self.now_s = 0.0
        self.lost = 0  # deliveries that never arrived, by `loss` or a full queue
        self.retained: dict[str, Message] = {}
        self._sessions: dict[str, _Session] = {}
        self.count = 0

    def connect(
        self, client_id: str, *, will: Message | None = None, session_s: float = 86_400
    ) -> "MemoryLink":
        """Return a link of `client_id`; an older one with that name is thrown out."""
        return MemoryLink(self, client_id, will=will, session_s=session_s)

    def advance(self, duration_s: float) -> None:
        """Let time pass."""
        self.now_s += duration_s

    def restart(self, *, keep: bool = True) -> None:
        """Cut everyone off; without `keep`, forget sessions, queues and retained messages too."""
        for session in list(self._sessions.values()):
            if session.link is not None:
                session.link.cut("the broker restarted", abruptly=False)  # it sends no wills
        if not keep:
            self._sessions.clear()
            self.retained.clear()

    # The rest is for MemoryLink.

    def attach(self, link: "MemoryLink", will: Message | None, session_s: float) -> bool:
        """Begin or resume the session of `link`; say whether it was resumed."""
        session = self._sessions.get(link.client_id)
        if session is not None and session.link not in (None, link):
            session.link.cut("another client connected with this name", for_good=True)
            session = self._sessions.get(link.client_id)
        if session is not None and self.now_s - session.away_since_s > session.session_s:
            session = None
        resumed = session is not None and session_s > 0
        if session is None or not resumed:
            session = self._sessions[link.client_id] = _Session(will, session_s)
        session.will, session.session_s, session.link = will, session_s, link
        for message in session.unacknowledged.values():  # in the order they first went,
            self.count += 1  # and before all that waits
            heapq.heappush(session.waiting, (-1.0, float(self.count), self.count, message))
        session.unacknowledged.clear()
        return resumed

    def detach(self, client_id: str, *, abruptly: bool) -> None:
        """End a connection; `abruptly` publishes the will."""
        session = self._sessions[client_id]
        session.link, session.away_since_s = None, self.now_s
        if abruptly and session.will is not None:
            self.route(session.will)
        if session.session_s == 0:
            self._sessions.pop(client_id, None)

    def route(self, message: Message) -> None:
        """Take a publish: keep it if it is to be retained, and hand it to whom it concerns."""
        if message.retained:
            if message.payload:
                self.retained[message.topic] = message
            else:
                self.retained.pop(message.topic, None)
        live = Message(message.topic, message.payload)
        for session in list(self._sessions.values()):
            if any(matches(each, message.topic) for each in session.filters):
                self._deliver(session, live)

    def subscribe(self, client_id: str, filters: Sequence[str]) -> None:
        """Add filters to a session, and send what is retained under them."""
        session = self._sessions[client_id]
        for each in filters:
            session.filters[each] = None
            for topic, message in list(self.retained.items()):
                if matches(each, topic):
                    self._deliver(session, message)

    def filters_of(self, client_id: str) -> list[str]:
        """What a session is subscribed to."""
        return list(self._sessions[client_id].filters)

    def unsubscribe(self, client_id: str, filters: Sequence[str]) -> None:
        """Take filters from a session."""
        for each in filters:
            self._sessions[client_id].filters.pop(each, None)

    def acknowledge(self, client_id: str, token: int) -> None:
        """Forget a delivery that needs no repeat."""
        self._sessions[client_id].unacknowledged.pop(token, None)

    def next_delivery(self, client_id: str, timeout_s: float) -> Message | None:
        """Return what is due for a client within `timeout_s`, letting that much time pass."""
        session = self._sessions[client_id]
        ends_s = self.now_s + timeout_s
        ready = session.waiting and len(session.unacknowledged) < self.receive_max
        if not ready or session.waiting[0][0] > ends_s:
            self.now_s = ends_s
            return None
        due_s, _, _, message = heapq.heappop(session.waiting)
        self.now_s = max(self.now_s, due_s)
        self.count += 1
        sent = Message(message.topic, message.payload, message.retained, self.count)
        session.unacknowledged[sent.token] = sent
        return sent

    def _deliver(self, session: _Session, message: Message) -> None:
        if self._random.random() < self._loss or len(session.waiting) >= _QUEUE_MESSAGES_MAX:
            self.lost += 1
            return
        for _ in range(2 if self._random.random() < self._repeat else 1):
            self.count += 1
            due_s = self.now_s + self._random.uniform(0.0, self._delay_s)
            place = float(self.count)
            if self._random.random() < self._reorder:
                place -= self._random.uniform(1.0, _OVERTAKES_MAX)
            else:
                due_s = session.last_due_s = max(due_s, session.last_due_s)
            heapq.heappush(session.waiting, (due_s, place, self.count, message))


class MemoryLink:
    """See `link.base.Link`. Made by `MemoryBroker.connect`."""

    def __init__(
        self, broker: MemoryBroker, client_id: str, *, will: Message | None, session_s: float
    ) -> None:
        self.client_id = client_id
        self.bytes_sent = self.bytes_received = self.dropped_messages = self.refused = 0
        self._broker, self._will, self._session_s = broker, will, session_s
        self._filters: dict[str, None] = {}
        self._given_up: list[str] = []  # unsubscribed while there was no connection
        self._outgoing: deque[Message] = deque()
        self._news: deque[LinkEvent] = deque()
        self._connected = self._closed = self._woken = False
        self._away_until_s = 0.0
        self._oldest_token = 0
        self._reconnect()

    @property
    def limits(self) -> LinkLimits:
        """The broker's limits."""
        return self._broker.limits

    def room(self) -> int:
        """How many publishes would go out at once; 0 while there is no connection."""
        return self.limits.inflight_max if self._connected else 0

    def together(self) -> AbstractContextManager[None]:
        """Nothing to save here: each goes out as it comes."""
        return nullcontext()

    def apart(self) -> AbstractContextManager[None]:
        """Nothing rests here meanwhile."""
        return nullcontext()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand a publish to the broker, or queue it while there is no connection."""
        check_topic(topic)
        if self._closed:
            raise LinkError(f"the link is closed; nothing was sent to {topic}")
        size = len(topic.encode()) + len(payload) + 8
        if size > self.limits.packet_bytes_max:
            raise LinkError(
                f"{size} bytes for {topic} are more than the broker's limit of "
                f"{self.limits.packet_bytes_max}; send smaller chunks"
            )
        if len(self._outgoing) >= LIMITS.send_queue_messages_max:
            raise LinkError(
                f"{len(self._outgoing)} publishes wait for the broker; "
                "ask room() or flush() before sending more"
            )
        self._outgoing.append(Message(topic, payload, retain))
        self._send()

    def flush(self, timeout_s: float) -> bool:
        """Say whether the broker has every publish, letting `timeout_s` pass if it has not."""
        if self._outgoing:
            self._broker.advance(timeout_s)
            self._try_again()
        return not self._outgoing

    def subscribe(self, filters: Sequence[str]) -> None:
        """Ask for topics, now and after each reconnect; retained messages are sent again."""
        for each in filters:
            check_filter(each)
        self._filters.update(dict.fromkeys(filters))
        self._given_up = [each for each in self._given_up if each not in self._filters]
        if self._connected:
            self._broker.subscribe(self.client_id, filters)

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Stop asking for topics."""
        for each in filters:
            self._filters.pop(each, None)
        if self._connected:
            self._broker.unsubscribe(self.client_id, filters)
        else:
            self._given_up.extend(filters)

    def receive(self, timeout_s: float) -> LinkEvent | None:
        """Return the next message or change; time passes if there is none."""
        if self._woken:
            self._woken = False
            return None
        if not self._news:
            self._try_again()
        if self._news:
            return self._news.popleft()
        if not self._connected:
            self._broker.advance(timeout_s)
            return None
        message = self._broker.next_delivery(self.client_id, timeout_s)
        if message is not None:
            self.bytes_received += len(message.topic) + len(message.payload)
        return message

    def wake(self) -> None:
        """Make the next `receive` return None."""
        self._woken = True

    def ack(self, message: Message) -> None:
        """Tell the broker that `message` needs no redelivery."""
        if self._connected and message.token > self._oldest_token:
            self._broker.acknowledge(self.client_id, message.token)

    def close(self) -> None:
        """Say goodbye: no will is published, the session stays for its time."""
        if self._connected:
            self._connected = False
            self._broker.detach(self.client_id, abruptly=False)
        self._closed = True

    def drop(self, *, away_s: float = 0.0) -> None:
        """Lose the connection without a word, so that the broker publishes the will.

        The next `receive` says Disconnected; the link is back `away_s` later. To play a
        power cut, throw the link away and connect again under its name.
        """
        self.cut("the connection was lost", away_s=away_s)

    def cut(
        self, reason: str, *, away_s: float = 0.0, abruptly: bool = True, for_good: bool = False
    ) -> None:
        """End the connection from outside. For the broker; tests use `drop`."""
        if self._connected:
            self._connected = False
            self._away_until_s = self._broker.now_s + away_s
            self._news.append(Disconnected(reason))
            self._broker.detach(self.client_id, abruptly=abruptly)
        self._closed = self._closed or for_good

    def _try_again(self) -> None:
        here = not self._connected and not self._closed
        if here and self._broker.now_s >= self._away_until_s:
            self._reconnect()

    def _reconnect(self) -> None:
        resumed = self._broker.attach(self, self._will, self._session_s)
        self._connected = True
        # What was handed out before is sent again under a new number.
        self._oldest_token = self._broker.count
        self._news.append(Connected(self.limits, resumed))
        known = self._broker.filters_of(self.client_id)
        self._broker.subscribe(self.client_id, [f for f in self._filters if f not in known])
        self._broker.unsubscribe(self.client_id, self._given_up)
        self._given_up.clear()
        self._send()

    def _send(self) -> None:
        while self._connected and self._outgoing:
            message = self._outgoing.popleft()
            self.bytes_sent += len(message.topic) + len(message.payload)
            self._broker.route(message)
