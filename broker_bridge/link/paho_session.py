"""One MQTT session with one broker, step by step; whoever owns the thread does the waiting.

Beside `paho_client.py` the only file that uses paho. Every connection gets a fresh client,
called from one thread and nowhere else (paho's documented "external loop": loop_read, behind
our `read`, loop_write, loop_misc), so paho's locks, threads and reconnect logic play no part.
What the broker had not acknowledged is handed to the next connection. docs/decisions/0030 says
why.

A session goes through `_begin`, `_dial`, then `_prepare` and `_work` for as long as
`_goes_on`, and `_end`, which says how long to stay away (`attempts`). Only `_dial` blocks.
`paho_link` drives one session with a thread of its own, `poller` drives thousands with one.

Promises what `link.base` promises. Messages wait for their owner in a bounded queue: when
it is full we stop reading the socket, so the broker waits and nothing is lost. Does not
promise order across a reconnect, nor that a publish is seen once.

Idle cost. With nothing to say, MQTT sends PINGREQ and PINGRESP, 2 bytes each, once
per keep-alive: 4 × 86400 / 60 s = 5.8 kB a day at the default. TLS 1.3 wraps each in
22 bytes more, TCP and IPv4 take 52 bytes for each of three segments (ping, answer,
ACK): 204 bytes a ping, 294 kB a day on the wire. A connection that died without a
word is noticed within 2.5 keep-alives, or after 30 s when there was something to send.
"""

import logging
import ssl
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker_bridge.limits import LIMITS
from broker_bridge.link.attempts import Attempts
from broker_bridge.link.base import LinkLimits, Message
from broker_bridge.link.failures import (
    UNSUPPORTED_VERSION,
    Failure,
    explain,
    explain_goodbye,
    explain_hang_up,
    explain_refusal,
    explain_silence,
    explain_small_packets,
)
from broker_bridge.link.paho_client import RECEIVED_PACKET_BYTES_MAX, GatheringClient
from broker_bridge.link.queued_link import GOODBYE_S, QueuedLink, packet_bytes
from broker_bridge.link.session_settings import SessionSettings

__all__ = ["Connection", "PahoSession"]

log = logging.getLogger(__name__)

_FILTERS_PER_SUBSCRIBE = 8  # what AWS IoT Core takes in one packet
_READS_AT_ONCE = 32  # before the owner hears what came


@dataclass
class Connection:
    """One connection, from before it is dialled until it has ended."""

    client: GatheringClient
    farewell: list[Failure]
    connections_before: int
    carried_bytes_before: int
    began_s: float
    greeting_ends_s: float = 0.0
    shook_hands: bool = False  # TLS is up; in TLS 1.3 our certificate may yet be refused

    @property
    def socket(self) -> Any:
        """The socket to wait for; None when paho has closed it."""
        return self.client.socket()

    @property
    def has_unread(self) -> bool:
        """Whether there is something to read that waiting for the socket would not show."""
        return self.client.has_unread()


class PahoSession(QueuedLink):
    """See `link.base.Link`. Subclasses wait for sockets and for time to pass."""

    def __init__(self, settings: SessionSettings) -> None:
        self._attempts = Attempts(settings)
        super().__init__(
            protocol=self._attempts.protocol,
            receive_queue_bytes_max=settings.receive_queue_bytes_max,
            send_queue_bytes_max=settings.send_queue_bytes_max,
        )
        self._settings = settings
        self._failure: Failure | None = None
        self._final_failure: Failure | None = None  # stands, until a connection comes about
        self._next_publish_s = 0.0  # when `publishes_per_s` lets the next one go

    # ── One connection, step by step ────────────────────────────────────────────────────

    def _begin(self) -> Connection:
        """Prepare a connection; nothing is sent yet."""
        client = GatheringClient(self, self._settings, protocol=self._attempts.protocol)
        farewell: list[Failure] = []
        client.on_connect = partial(self._on_connect, farewell)
        client.on_disconnect = partial(_on_disconnect, farewell)
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return Connection(
            client,
            farewell,
            connections_before=self.connections,
            carried_bytes_before=self.bytes_sent + self.bytes_received,
            began_s=time.monotonic(),
        )

    def _dial(self, this: Connection) -> None:
        """Look the broker up, connect, shake hands, send CONNECT. Blocks; uses no lock."""
        try:
            this.client.dial()
            this.shook_hands = isinstance(this.socket, ssl.SSLSocket)
            this.client.flush()
        except OSError as error:
            self._broken(this, error)
        this.greeting_ends_s = time.monotonic() + self._settings.connect_timeout_s

    def _goes_on(self, this: Connection, now: float) -> bool:
        """Whether there is still something to wait for. While closing, says goodbye."""
        if this.socket is None or this.farewell:
            return False
        greeted = self._greeted(this)
        if not greeted and now > this.greeting_ends_s:
            this.farewell.append(explain_silence(where=self._settings.where))
            return False
        return not self._say_goodbye(this.client, greeted, now)

    def _greeted(self, this: Connection) -> bool:
        return self.connections > this.connections_before

    def _wait_s(self, this: Connection, now: float) -> float:
        """How long nothing may happen before `_work` is due all the same."""
        if self._closing_since is not None:
            return 0.05
        tick_s = min(self._settings.keepalive_s / 4, 15.0)
        if not self._greeted(this):
            return min(tick_s, this.greeting_ends_s - now + 0.01)
        has_room = len(self._inflight) < self._limits.inflight_max
        if self._outgoing and has_room and not this.client.want_write():
            # Held back by the pace; its turn may have come by now. Where the socket holds it
            # back, that will tell: to ask it without a pause keeps a processor busy.
            return min(tick_s, max(0.0, self._next_publish_s - now))
        return tick_s

    def _prepare(self, this: Connection) -> tuple[bool, bool]:
        """Hand over what is queued; say whether to wait for reading and for writing."""
        self._hand_over(this.client)
        this.client.flush()
        reading = not self._greeted(this) or self._reads_on()
        return reading, this.client.want_write()

    def _work(self, this: Connection, *, readable: bool, writable: bool) -> None:
        """Let paho do what the socket allows."""
        client = this.client
        if readable:
            try:
                # One read or one packet a call; what else is here is taken without another wait.
                for _ in range(_READS_AT_ONCE):
                    client.read()
                    if not self.may_take() or (client.is_drained and not client.has_unread()):
                        break
            finally:
                self._hand_in()
        if writable:
            client.loop_write()
            client.flush()
        client.loop_misc()

    def _broken(self, this: Connection, error: OSError) -> None:
        """The socket failed under us."""
        this.farewell.append(explain(error, host=self._settings.host, port=self._settings.port))

    def _end(self, this: Connection) -> float:
        """The connection is over: say so, and how many seconds to stay away."""
        if (sock := this.socket) is not None:
            sock.close()
        self._take_back()
        if self._closing_since is not None:
            return 0.0
        failure, delay_s = self._attempts.ended(
            this.farewell[0] if this.farewell else self._why_hung_up(this),
            greeted=self._greeted(this),
            lasted_s=time.monotonic() - this.began_s,
            carried_bytes=self.bytes_sent + self.bytes_received - this.carried_bytes_before,
        )
        if failure is not None:
            self._report(failure)
        return delay_s

    def _report(self, failure: Failure) -> None:
        with self._changed:
            if failure.final:
                self._final_failure = failure
            is_news = self._connected or failure != self._failure
            self._failure = failure
            if is_news:
                log.debug("not connected: %s", failure.reason)  # the owner hears it as an event
                self._down(failure.reason)
            self._changed.notify_all()

    def _why_hung_up(self, this: Connection) -> Failure:
        return explain_hang_up(
            this.client.last_error,
            where=self._settings.where,
            greeted=self._greeted(this),
            shook_hands=this.shook_hands,
        )

    # ── What goes out ───────────────────────────────────────────────────────────────────

    def _say_goodbye(self, client: GatheringClient, greeted: bool, now: float) -> bool:
        """While closing: wait for acknowledgements, give ours, disconnect. True: hang up."""
        if self._closing_since is None:
            return False
        if not greeted or now - self._closing_since > GOODBYE_S:
            client.disconnect()  # written at once if the socket takes it
            return True
        self._hand_over(client)
        with self._changed:
            if self._all_sent() and not client.want_write():
                # Once it is written, paho closes the socket, and that ends the loop.
                client.disconnect()
        return False

    def _hand_over(self, client: GatheringClient) -> None:
        """Give paho what the owner queued, no more publishes than the broker takes at once.

        Without the lock, as writing takes its time: a publish is in flight before it leaves the
        queue, so whoever counts meanwhile counts it twice, never not at all.
        """
        if not self._connected:
            return
        for taken in self._take_acks():
            client.acknowledge(taken)
        if self._to_unsubscribe or self._to_subscribe:
            self._ask_for_topics(client)
        if not self._outgoing:
            return
        handed_bytes = 0
        while self._outgoing and self._may_publish():
            message = self._outgoing[0]
            size = len(message.topic) + len(message.payload)
            if self._fits(message):
                packet_id = client.send(message.topic, message.payload, retained=message.retained)
                if packet_id is None:
                    break  # more than enough waits to be written
                self._inflight[packet_id] = message
                self.bytes_sent += size
                self._keep_pace()
            self._outgoing.popleft()
            handed_bytes += size
        with self._changed:
            self._outgoing_bytes -= handed_bytes
            if self._all_sent():  # the last was refused here; nobody waits for less
                self._changed.notify_all()

    def _ask_for_topics(self, client: mqtt.Client) -> None:
        with self._changed:
            for batch in _batches(self._to_unsubscribe):
                client.unsubscribe(batch)
            for batch in _batches(self._to_subscribe):
                _, subscription_id = client.subscribe([(each, 1) for each in batch])
                if subscription_id is not None:
                    self._subscribing[subscription_id] = batch
            self._to_unsubscribe.clear()
            self._to_subscribe.clear()

    def _may_publish(self) -> bool:
        """Whether window and pace let one more publish go."""
        return len(self._inflight) < self._limits.inflight_max and (
            not self._settings.publishes_per_s or time.monotonic() >= self._next_publish_s
        )

    def _keep_pace(self) -> None:
        """A publish went; the next one may go a little later."""
        if self._settings.publishes_per_s:
            self._next_publish_s = time.monotonic() + 1 / self._settings.publishes_per_s

    def _fits(self, message: Message) -> bool:
        """Whether the broker we have *now* takes the packet: another may have been smaller."""
        size = packet_bytes(message.topic, message.payload, protocol=self._limits.protocol)
        if size <= self._limits.packet_bytes_max:
            return True
        self._refuse(message.topic, f"{size} bytes exceed its new limit")
        return False

    # ── What comes in: paho calls these, on the network thread ──────────────────────────

    def _on_connect(
        self,
        farewell: list[Failure],
        _client: Any,
        _userdata: Any,
        flags: mqtt.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            farewell.append(self._why_refused(reason))
        elif (most := _packet_bytes_max(properties)) < LIMITS.packet_bytes_min:
            farewell.append(explain_small_packets(most, where=self._settings.where))
        else:
            self._welcome(flags.session_present, properties)

    def _why_refused(self, reason: ReasonCode) -> Failure:
        if reason.value in UNSUPPORTED_VERSION:
            self._attempts.version_refused()
        return explain_refusal(
            reason.value, str(reason), self._settings, protocol=self._attempts.protocol
        )

    def _welcome(self, resumed: bool, properties: Properties | None) -> None:
        packet = _packet_bytes_max(properties)
        inflight = getattr(properties, "ReceiveMaximum", LIMITS.inflight_max)
        packet = min(packet, self._settings.packet_bytes_max or packet)
        with self._changed:
            self._failure = self._final_failure = None
            inflight = min(inflight, self._settings.inflight_max)
            limits = LinkLimits(packet, inflight, self._attempts.protocol)
            self._up(limits, resumed=resumed)

    def _on_message(self, client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        if topic and len(message.payload) <= RECEIVED_PACKET_BYTES_MAX:
            self.take(
                topic,
                bytes(message.payload),
                retained=message.retain,
                packet_id=message.mid if message.qos else 0,
            )
        else:
            self.dropped_messages += 1
            client.ack(message.mid, message.qos)  # or the broker would send it for ever

    def _on_publish(
        self, _client: Any, _userdata: Any, packet_id: int, reason: ReasonCode, _properties: Any
    ) -> None:
        self.answered(packet_id, refusal=str(reason) if reason.is_failure else None)

    def _on_subscribe(
        self,
        _client: Any,
        _userdata: Any,
        packet_id: int,
        reasons: list[ReasonCode],
        _properties: Any,
    ) -> None:
        self._subscribed(packet_id, [str(each) if each.is_failure else None for each in reasons])


def _packet_bytes_max(properties: Properties | None) -> int:
    """The largest packet that the broker takes; MQTT 3.1.1 does not say."""
    return int(getattr(properties, "MaximumPacketSize", LIMITS.packet_bytes_max))


def _on_disconnect(
    farewell: list[Failure],
    _client: Any,
    _userdata: Any,
    flags: mqtt.DisconnectFlags,
    reason: ReasonCode,
    _properties: Any,
) -> None:
    if flags.is_disconnect_packet_from_server:
        farewell.append(explain_goodbye(str(reason)))


def _batches(filters: list[str]) -> list[list[str]]:
    step = _FILTERS_PER_SUBSCRIBE
    return [filters[i : i + step] for i in range(0, len(filters), step)]
