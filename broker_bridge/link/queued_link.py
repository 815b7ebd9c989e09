"""The owner's half of a Link whose network is served elsewhere: bounded queues, one lock.

Promises: nothing grows past its bound, whoever is slow. A full send queue is the
owner's to notice (`room`, `flush`, LinkError); when the receive queue is full,
`_may_read` is false, and the network half stops reading until the owner has caught up,
so the broker waits and nothing is lost. Knows no socket and no MQTT library.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from broker_bridge.errors import LinkError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Connected, Disconnected, LinkEvent, LinkLimits, Message
from broker_bridge.link.filters import check_filter, check_topic

__all__ = ["GOODBYE_S", "MIB", "QueuedLink", "packet_bytes"]

log = logging.getLogger(__name__)

MIB = 1024 * 1024
GOODBYE_S = 1.0  # what close() waits for acknowledgements
FRUITLESS_CONNECTIONS_MAX = 5


def packet_bytes(topic: str, payload: bytes, *, protocol: str) -> int:
    """Return the size of a QoS 1 PUBLISH without properties (MQTT 5.0, section 3.3)."""
    body = 2 + len(topic.encode()) + 2 + (1 if protocol == "5.0" else 0) + len(payload)
    length_field = 1 + (body > 127) + (body > 16_383) + (body > 2_097_151)
    return 1 + length_field + body


class QueuedLink:
    """Everything of `link.base.Link` but the network, which subclasses supply."""

    def __init__(
        self, *, protocol: str, receive_queue_bytes_max: int, send_queue_bytes_max: int
    ) -> None:
        self._receive_queue_bytes_max = receive_queue_bytes_max
        self._send_queue_bytes_max = send_queue_bytes_max
        self._limits = LinkLimits(LIMITS.packet_bytes_max, LIMITS.inflight_max, protocol)
        self.bytes_sent = 0  # topic and payload, repeats included
        self.bytes_received = 0
        self.dropped_messages = 0  # came in, but too large or with an impossible topic
        self.refused = 0  # publishes and subscriptions the broker would not have
        self.last_refused = ""  # the topic or filter of the last one
        self.connections = 0

        # One lock for all that both threads touch, but for three queues of which one thread only
        # takes the head, and the other only adds to the end: `_outgoing`, `_acks` and `_inbox`.
        self._changed = threading.Condition()
        self._outgoing: deque[Message] = deque()
        self._outgoing_bytes = 0
        self._inflight: dict[int, Message] = {}
        self._inbox: deque[Message] = deque()
        self._given_bytes = 0  # of payloads that ever were in the inbox: the network half's
        self._taken_bytes = 0  # of those that are not there any more: the owner's
        self._is_held_back = False  # the network half reads no more until the owner has caught up
        self._news: Connected | Disconnected | None = None
        self._news_lost_session = False
        self._acks: deque[int] = deque()
        self._filters: dict[str, bool] = {}  # filter -> confirmed by the broker
        self._to_subscribe: list[str] = []
        self._to_unsubscribe: list[str] = []
        self._subscribing: dict[int, list[str]] = {}
        self._answers = 0  # acknowledgements in this connection
        self._fruitless = 0  # connections in a row that ended without one
        self._connected = False
        self._woken = False
        self._closing_since: float | None = None
        self._crash: Exception | None = None
        # The network half's alone, until it hands them in.
        self._arrived: list[Message] = []
        self._arrived_bytes = 0
        self._answered: list[tuple[int, str | None]] = []
        # The owner's turn, or the network half's. It guards nothing, it only saves: two threads
        # that both want Python's lock hand it on, by a system call, several times for a message.
        self._turn = threading.Lock()
        self._is_together = False  # the owner's alone

    def _poke(self) -> None:
        """The owner queued something: have the network half look at the queues."""
        raise NotImplementedError

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is published and acknowledged inside may wait for its end. See `Link.together`."""
        with self._turn:
            self._is_together = True
            try:
                yield
            finally:
                self._is_together = False

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The network goes on while the owner waits for something else. See `Link.apart`."""
        if not self._is_together:
            yield
            return
        self._is_together = False  # who waits for the network in here has given the turn already
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
            self._is_together = True

    def _wait(self, for_what: Callable[[], bool], timeout_s: float) -> None:
        """The owner waits for the network, which has the turn meanwhile."""
        if timeout_s <= 0 or for_what():
            return
        with self.apart(), self._changed:
            self._changed.wait_for(for_what, timeout_s)

    @property
    def limits(self) -> LinkLimits:
        """The limits of the present (or last) connection."""
        return self._limits

    def room(self) -> int:
        """How many publishes would go out at once; 0 while there is no connection."""
        with self._changed:
            if not self._connected:
                return 0
            waiting = len(self._inflight) + len(self._outgoing)
            return max(0, self._limits.inflight_max - waiting)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Queue a publish and return at once. See `Link.publish`."""
        check_topic(topic)
        size = packet_bytes(topic, payload, protocol=self._limits.protocol)
        with self._changed:
            self._raise_crash()
            if self._closing_since is not None:
                raise LinkError(f"the link is closed; nothing was sent to {topic}")
            if size > self._limits.packet_bytes_max:
                raise LinkError(
                    f"{size} bytes for {topic} are more than the broker's limit of "
                    f"{self._limits.packet_bytes_max}; send smaller chunks"
                )
            full = len(self._outgoing) >= LIMITS.send_queue_messages_max
            if full or self._outgoing_bytes + size > self._send_queue_bytes_max:
                raise LinkError(
                    f"{len(self._outgoing)} publishes wait for the broker; "
                    "ask room() or flush() before sending more"
                )
            self._outgoing.append(Message(topic, payload, retain))
            self._outgoing_bytes += len(topic) + len(payload)
        self._poke()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged every publish; say whether it did."""
        self._wait(lambda: self._all_sent() or self._crash is not None, timeout_s)
        with self._changed:
            self._raise_crash()
            return self._all_sent()

    def subscribe(self, filters: Sequence[str]) -> None:
        """Ask for topics, now and after each reconnect; retained messages are sent again."""
        for each in filters:
            check_filter(each)
        with self._changed:
            self._raise_crash()
            for each in filters:
                self._filters[each] = False
                self._to_subscribe.append(each)
                if each in self._to_unsubscribe:
                    self._to_unsubscribe.remove(each)
        self._poke()

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Stop asking for topics."""
        with self._changed:
            self._raise_crash()
            for each in filters:
                self._filters.pop(each, None)
                self._to_unsubscribe.append(each)
            self._to_subscribe = [f for f in self._to_subscribe if f in self._filters]
        self._poke()

    def receive(self, timeout_s: float) -> LinkEvent | None:
        """Return the next message or change of the connection, or None after `timeout_s`.

        Changes come before messages. Several changes that nobody looked at become one:
        the present state, with `resumed` false if the session was lost on the way.
        """
        self._wait(self._something_to_tell, timeout_s)
        is_message_here = bool(self._inbox)  # before we look for changes: it is none that followed
        if self._woken or self._news is not None or self._crash is not None:
            with self._changed:
                self._raise_crash()
                if not self._woken:
                    return self._take_news()
                self._woken = False
                return None
        if not is_message_here:
            return None
        message = self._inbox.popleft()
        self._taken_bytes += len(message.payload)
        if self._is_held_back and self._may_read():
            self._is_held_back = False
            self._poke()
        return message

    def wake(self) -> None:
        """Make a waiting `receive` return None early. For another thread that has news."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def ack(self, message: Message) -> None:
        """Tell the broker that `message` needs no redelivery.

        A message of an earlier connection is left alone: its number may mean another
        message by now, and the broker sends it again anyway.
        """
        if message.token == 0:
            return  # QoS 0: nothing to acknowledge
        self._acks.append(message.token)  # in one step, so without the lock
        self._poke()

    def close(self) -> None:
        """Send what is queued if the broker is there (a second at most), say goodbye, and stop."""
        with self._changed:
            if self._closing_since is None:
                self._closing_since = time.monotonic()
            self._changed.notify_all()
        self._poke()

    # What follows is for the network half.

    def _up(self, limits: LinkLimits, *, resumed: bool) -> None:
        """A connection began. A session that was not resumed knows none of our filters."""
        with self._changed:
            self.connections += 1
            self._connected = True
            self._limits = limits
            if not resumed:
                self._news_lost_session = True
                self._filters = dict.fromkeys(self._filters, False)
            self._to_subscribe = [each for each, known in self._filters.items() if not known]
            self._news = Connected(limits, resumed)
            self._changed.notify_all()

    def _down(self, reason: str) -> None:
        """The connection ended, or one that was tried came to nothing."""
        with self._changed:
            self._connected = False
            self._news = Disconnected(reason)
            self._changed.notify_all()

    def _take_back(self) -> None:
        """After a connection: what was not acknowledged goes to the head of the queue.

        MQTT 3.1.1 does not say how large a packet may be: a broker that finds one too large
        hangs up, and would do so for ever. So when several connections in a row ended without
        one acknowledgement, the largest packet that was on its way each time is given up. MQTT 5
        does say it, and there it is the line that is bad.
        """
        with self._changed:
            self._fruitless = self._fruitless + 1 if self._inflight and not self._answers else 0
            self._answers = 0
            if self._fruitless >= FRUITLESS_CONNECTIONS_MAX and self._limits.protocol != "5.0":
                worst = max(self._inflight, key=lambda each: len(self._inflight[each].payload))
                self._refuse(self._inflight.pop(worst).topic, "every connection ended with it")
                self._fruitless = 0
            for message in reversed(self._inflight.values()):
                self._outgoing.appendleft(message)
                self._outgoing_bytes += len(message.topic) + len(message.payload)
            self._inflight.clear()
            self._acks.clear()
            self._subscribing.clear()

    def _take_acks(self) -> list[int]:
        """The packet ids that the owner acknowledged, those of earlier connections left out."""
        taken = [divmod(self._acks.popleft(), 1 << 16) for _ in range(len(self._acks))]
        return [packet_id for connection, packet_id in taken if connection == self.connections]

    def take(self, topic: str, payload: bytes, *, retained: bool, packet_id: int) -> None:
        """A message came; `packet_id` is 0 for QoS 0. The owner hears of it at `_hand_in`."""
        token = (self.connections << 16) + packet_id if packet_id else 0
        self._arrived.append(Message(topic, payload, retained, token))
        self._arrived_bytes += len(payload)
        self.bytes_received += len(topic) + len(payload)

    def may_take(self) -> bool:
        """Whether there is room for one more message, those that came just now counted."""
        return (
            len(self._inbox) + len(self._arrived) < LIMITS.receive_queue_messages_max
            and self._given_bytes - self._taken_bytes + self._arrived_bytes
            < self._receive_queue_bytes_max
        )

    def answered(self, packet_id: int, *, refusal: str | None) -> None:
        """The broker answered a publish. It counts from `_hand_in` on."""
        self._answered.append((packet_id, refusal))

    def _hand_in(self) -> None:
        """Tell the owner what one turn of the network brought: one lock, one wake-up."""
        if not self._arrived and not self._answered:
            return
        with self._changed:
            self._answers += len(self._answered)
            for packet_id, refusal in self._answered:
                message = self._inflight.pop(packet_id, None)
                if message is not None and refusal is not None:
                    self._refuse(message.topic, refusal)
            self._given_bytes += self._arrived_bytes
            self._inbox.extend(self._arrived)
            if self._arrived or self._all_sent():  # nobody waits for less
                self._changed.notify_all()
        self._arrived.clear()
        self._arrived_bytes = 0
        self._answered.clear()

    def _subscribed(self, packet_id: int, refusals: Sequence[str | None]) -> None:
        """The broker answered a subscription, filter by filter."""
        with self._changed:
            filters = self._subscribing.pop(packet_id, [])
            for each, refusal in zip(filters, refusals, strict=False):
                if refusal is not None:
                    self._refuse(each, refusal)
                elif each in self._filters:
                    self._filters[each] = True

    def _refuse(self, topic: str, why: str) -> None:
        self.refused += 1
        self.last_refused = topic
        log.warning("the broker refused %s: %s", topic, why)

    def _something_to_tell(self) -> bool:
        return bool(self._woken or self._news or self._inbox or self._crash)

    def _take_news(self) -> LinkEvent | None:
        news, self._news = self._news, None
        if isinstance(news, Connected):
            news = Connected(news.limits, news.resumed and not self._news_lost_session)
            self._news_lost_session = False
        return news

    def _all_sent(self) -> bool:
        return not self._outgoing and not self._inflight

    def _reads_on(self) -> bool:
        """Whether to go on reading; if not, `receive` pokes once the owner has caught up."""
        self._is_held_back = not self._may_read()
        if self._is_held_back and self._may_read():  # he did so meanwhile, and saw nothing yet
            self._is_held_back = False
        return not self._is_held_back

    def _may_read(self) -> bool:
        return (
            len(self._inbox) < LIMITS.receive_queue_messages_max
            and self._given_bytes - self._taken_bytes < self._receive_queue_bytes_max
        )

    def _raise_crash(self) -> None:
        if self._crash is not None:
            raise self._crash

    def _crashed(self, error: Exception) -> None:
        """The network half found a bug of ours: the owner sees it at his next call."""
        with self._changed:
            self._crash = error
            self._changed.notify_all()
