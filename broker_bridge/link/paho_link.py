"""A Link over MQTT: one session with one broker, kept up until it is closed.

The only file that uses paho. One thread of ours owns the paho client and calls
it from nowhere else (paho's documented "external loop": select, loop_read,
loop_write, loop_misc), so paho's locks, threads and reconnect logic play no part.
Every connection gets a fresh client; what the broker had not acknowledged is
handed to the next one. docs/decisions/0030 says why.

Promises what `link.base` promises. Messages wait for their owner in a bounded
queue: when it is full we stop reading the socket, so the broker waits and nothing
is lost. Does not promise order across a reconnect, nor that a publish is seen once.

Idle cost. With nothing to say, MQTT sends PINGREQ and PINGRESP, 2 bytes each, once
per keep-alive: 4 × 86400 / 60 s = 5.8 kB a day at the default. TLS 1.3 wraps each in
22 bytes more, TCP and IPv4 take 52 bytes for each of three segments (ping, answer,
ACK): 204 bytes a ping, 294 kB a day on the wire. A connection that died without a
word is noticed within 2.5 keep-alives, or after 30 s when there was something to send.
"""

import contextlib
import logging
import random as _random
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker_bridge.errors import LinkError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Connected, Disconnected, LinkEvent, LinkLimits, Message
from broker_bridge.link.tls import Failure, TlsFiles, client_context, explain, explain_tls

__all__ = ["PahoLink", "packet_bytes"]

log = logging.getLogger(__name__)

MIB = 1024 * 1024
_FILTERS_PER_SUBSCRIBE = 8          # what AWS IoT Core takes in one packet
_UNSENT_DATA_TIMEOUT_MS = 30_000    # TCP gives up on a peer that acknowledges nothing
_GOODBYE_S = 1.0                    # what close() waits for acknowledgements
_UNSUPPORTED_VERSION = (0x01, 0x84)                     # MQTT 3.1.1 and MQTT 5 spelling
_MAY_PASS = (0x03, 0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F)  # unavailable, busy, quota, moved, rate


def packet_bytes(topic: str, payload: bytes, *, protocol: str) -> int:
    """Return the size of a QoS 1 PUBLISH without properties (MQTT 5.0, section 3.3)."""
    body = 2 + len(topic.encode()) + 2 + (1 if protocol == "5.0" else 0) + len(payload)
    length_field = 1 + (body > 127) + (body > 16_383) + (body > 2_097_151)
    return 1 + length_field + body


@dataclass(frozen=True)
class _Settings:
    host: str
    port: int
    client_id: str
    tls: ssl.SSLContext | None
    username: str | None
    password: str | None
    will: Message | None
    will_delay_s: int
    keepalive_s: int
    session_s: int
    receive_max: int
    receive_queue_bytes_max: int
    send_queue_bytes_max: int
    connect_timeout_s: float
    backoff_first_s: float
    backoff_max_s: float
    protocol: Literal["auto", "5.0", "3.1.1"]
    random: Callable[[], float]


class _LastError(logging.Logger):
    """Keeps what paho only logs: the TLS alert or socket error behind "connection lost"."""

    text = ""

    def handle(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


class PahoLink:
    """See `link.base.Link`. Made by `open`."""

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._protocol = "3.1.1" if settings.protocol == "3.1.1" else "5.0"
        self._limits = LinkLimits(LIMITS.packet_bytes_max, LIMITS.inflight_max, self._protocol)
        self.bytes_sent = 0             # topic and payload, repeats included
        self.bytes_received = 0
        self.dropped_messages = 0       # came in, but too large or with an impossible topic
        self.refused = 0                # publishes and subscriptions the broker would not have
        self.last_refused = ""          # the topic or filter of the last one
        self.connections = 0

        # One lock for all that both threads touch. paho is called by our network thread
        # alone, so holding it while calling paho cannot deadlock.
        self._changed = threading.Condition()
        self._outgoing: deque[Message] = deque()
        self._outgoing_bytes = 0
        self._inflight: dict[int, Message] = {}
        self._inbox: deque[Message] = deque()
        self._inbox_bytes = 0
        self._news: Connected | Disconnected | None = None
        self._news_lost_session = False
        self._acks: deque[int] = deque()
        self._filters: dict[str, bool] = {}         # filter -> confirmed by the broker
        self._to_subscribe: list[str] = []
        self._to_unsubscribe: list[str] = []
        self._subscribing: dict[int, list[str]] = {}
        self._connected = False
        self._woken = False
        self._closing_since: float | None = None
        self._failure: Failure | None = None
        self._crash: Exception | None = None

        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="midge-mqtt", daemon=True)

    @classmethod
    def open(
        cls,
        host: str,
        port: int,
        *,
        client_id: str,
        tls: TlsFiles | None = None,
        username: str | None = None,
        password: str | None = None,
        will: Message | None = None,
        will_delay_s: int = 0,
        keepalive_s: int = 60,
        session_s: int = 86_400,
        wait_s: float | None = 10.0,
        protocol: Literal["auto", "5.0", "3.1.1"] = "auto",
        receive_max: int = 64,
        receive_queue_bytes_max: int = 8 * MIB,
        send_queue_bytes_max: int = 64 * MIB,
        connect_timeout_s: float = 5.0,
        backoff_first_s: float = 1.0,
        backoff_max_s: float = 60.0,
        random: Callable[[], float] = _random.random,
    ) -> "PahoLink":
        """Connect, and stay connected until `close`.

        `session_s`: how long the broker keeps our subscriptions and queue while we are
        away; 0 for a client that leaves no trace (operators' commands). A `will` is
        published by the broker, `will_delay_s` later, when we vanish without `close`.

        `wait_s`: keep trying that long, then raise LinkError saying why; what no retry
        can mend (TLS, certificate, authorisation) is raised at once. None: return at
        once and report success or failure as events. Raises LocalError for bad files.
        """
        context = None if tls is None else client_context(tls)
        link = cls(_Settings(
            host=host, port=port, client_id=client_id, tls=context, username=username,
            password=password, will=will, will_delay_s=will_delay_s, keepalive_s=keepalive_s,
            session_s=session_s, receive_max=receive_max,
            receive_queue_bytes_max=receive_queue_bytes_max,
            send_queue_bytes_max=send_queue_bytes_max, connect_timeout_s=connect_timeout_s,
            backoff_first_s=backoff_first_s, backoff_max_s=backoff_max_s,
            protocol=protocol, random=random))
        link._thread.start()
        if wait_s is not None:
            link._wait_for_first_connection(wait_s)
        return link

    def _wait_for_first_connection(self, wait_s: float) -> None:
        def decided() -> bool:
            final = self._failure is not None and self._failure.final
            return self.connections > 0 or final or self._crash is not None

        with self._changed:
            self._changed.wait_for(decided, wait_s)
            if self.connections > 0:
                return
            failure, crash = self._failure, self._crash
        self.close()
        if crash is not None:
            raise crash
        where = f"{self._settings.host}:{self._settings.port}"
        raise LinkError(failure.reason if failure else f"no answer from {where} in {wait_s:g} s")

    # ------------------------------------------------------------- the owner's side

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
        _check_topic(topic)
        size = packet_bytes(topic, payload, protocol=self._limits.protocol)
        with self._changed:
            self._raise_crash()
            if self._closing_since is not None:
                raise LinkError(f"the link is closed; nothing was sent to {topic}")
            if size > self._limits.packet_bytes_max:
                raise LinkError(f"{size} bytes for {topic} are more than the broker's limit of "
                                f"{self._limits.packet_bytes_max}; send smaller chunks")
            full = len(self._outgoing) >= LIMITS.send_queue_messages_max
            if full or self._outgoing_bytes + size > self._settings.send_queue_bytes_max:
                raise LinkError(f"{len(self._outgoing)} publishes wait for the broker; "
                                "ask room() or flush() before sending more")
            self._outgoing.append(Message(topic, payload, retain))
            self._outgoing_bytes += len(topic) + len(payload)
        self._poke()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged every publish; say whether it did."""
        with self._changed:
            self._changed.wait_for(lambda: self._all_sent() or self._crash is not None, timeout_s)
            self._raise_crash()
            return self._all_sent()

    def subscribe(self, filters: Sequence[str]) -> None:
        """Ask for topics, now and after each reconnect; retained messages are sent again."""
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
        with self._changed:
            self._changed.wait_for(self._something_to_tell, timeout_s)
            self._raise_crash()
            if self._woken:
                self._woken = False
                return None
            if self._news is not None:
                return self._take_news()
            if not self._inbox:
                return None
            was_full = not self._may_read()
            message = self._inbox.popleft()
            self._inbox_bytes -= len(message.payload)
            if was_full and self._may_read():
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
        connection, packet_id = divmod(message.token, 1 << 16)
        if packet_id == 0:
            return                      # QoS 0: nothing to acknowledge
        with self._changed:
            if connection == self.connections and self._connected:
                self._acks.append(packet_id)
        self._poke()

    def close(self) -> None:
        """Send what is queued if the broker is there (a second at most), say goodbye, and stop."""
        with self._changed:
            if self._closing_since is None:
                self._closing_since = time.monotonic()
            self._changed.notify_all()
        self._poke()
        # A name look-up or a handshake cannot be interrupted; then the thread, a daemon,
        # finds the flag when it returns.
        self._thread.join(timeout=_GOODBYE_S + 1.0)

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

    def _may_read(self) -> bool:
        return (len(self._inbox) < LIMITS.receive_queue_messages_max
                and self._inbox_bytes < self._settings.receive_queue_bytes_max)

    def _raise_crash(self) -> None:
        if self._crash is not None:
            raise self._crash

    def _poke(self) -> None:
        # A full pipe wakes the thread just as well, and a closed one needs no waking.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_write.send(b"\0")

    # ----------------------------------------------------------- the network thread

    def _run(self) -> None:
        try:
            self._stay_connected()
        except Exception as error:      # a bug of ours: the owner must see it, not a dead thread
            with self._changed:
                self._crash = error
                self._changed.notify_all()
        finally:
            self._wake_read.close()
            self._wake_write.close()

    def _stay_connected(self) -> None:
        delay_s = self._settings.backoff_first_s
        while self._closing_since is None:
            started, before = time.monotonic(), self.connections
            failure = self._one_connection()
            if self._closing_since is not None:
                return
            if self.connections == before and self._choose_protocol(failure):
                continue
            self._report(failure)
            # A connection that outlived the wait before it was a success. One that did not
            # (two clients of one name throwing each other out) must not start again at once.
            if self.connections > before and time.monotonic() - started > delay_s:
                delay_s = self._settings.backoff_first_s
            self._sleep(delay_s * (0.5 + 0.5 * self._settings.random()))
            delay_s = min(delay_s * 2, self._settings.backoff_max_s)

    def _choose_protocol(self, failure: Failure) -> bool:
        """Change between MQTT 5 and 3.1.1 if that may help; say whether to try at once."""
        if self._settings.protocol != "auto" or not failure.try_older_mqtt:
            return False
        self._protocol = "3.1.1" if self._protocol == "5.0" else "5.0"
        return self._protocol == "3.1.1"

    def _report(self, failure: Failure) -> None:
        with self._changed:
            is_news = self._connected or failure != self._failure
            self._failure = failure
            if is_news:
                log.warning("not connected: %s", failure.reason)
                self._news = Disconnected(failure.reason)
            self._connected = False
            self._changed.notify_all()

    def _sleep(self, duration_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing_since is not None, duration_s)

    def _one_connection(self) -> Failure:
        """Connect, serve until the connection ends, and say why it ended."""
        errors = _LastError("paho", logging.ERROR)
        farewell: list[Failure] = []
        client = self._make_client(errors, farewell)
        settings = self._settings
        before = self.connections
        try:
            client.connect_async(settings.host, settings.port, settings.keepalive_s,
                                 **self._session_options())
            client.reconnect()
            self._serve(client, farewell)
        except OSError as error:
            farewell.append(explain(error, host=settings.host, port=settings.port))
        finally:
            if (sock := client.socket()) is not None:
                sock.close()
            self._take_back()
        if farewell:
            return farewell[0]
        return self._why_lost(errors.text, greeted=self.connections > before)

    def _why_lost(self, text: str, *, greeted: bool) -> Failure:
        where = f"{self._settings.host}:{self._settings.port}"
        if "SSL" in text:
            return explain_tls(text, where=where)
        if greeted:
            return Failure(f"the connection to {where} was lost")
        return Failure(f"{where} hung up without a word; is it an MQTT broker, and is TLS set "
                       "there as it is here?", try_older_mqtt=True)

    def _make_client(self, errors: logging.Logger, farewell: list[Failure]) -> mqtt.Client:
        settings = self._settings
        v5 = self._protocol == "5.0"
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            clean_session=None if v5 else settings.session_s == 0,
            protocol=mqtt.MQTTv5 if v5 else mqtt.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.enable_logger(errors)
        client.connect_timeout = settings.connect_timeout_s
        # We bound both ourselves, before paho sees a publish.
        client.max_inflight_messages_set(0)
        client.max_queued_messages_set(0)
        if settings.tls is not None:
            client.tls_set_context(settings.tls)
        if settings.username is not None:
            client.username_pw_set(settings.username, settings.password)
        if settings.will is not None:
            client.will_set(settings.will.topic, settings.will.payload, qos=1,
                            retain=settings.will.retained, properties=self._will_properties())
        client.on_connect = self._on_connect(farewell)
        client.on_disconnect = _on_disconnect(farewell)
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_socket_open = _tune_socket
        return client

    def _will_properties(self) -> Properties | None:
        if self._protocol != "5.0" or self._settings.will_delay_s == 0:
            return None
        properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
        properties.WillDelayInterval = self._settings.will_delay_s
        return properties

    def _session_options(self) -> dict[str, Any]:
        if self._protocol != "5.0":
            return {}
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._settings.session_s
        # Unacknowledged messages the broker may have on the way to us: with manual
        # acknowledgement this is what slows a sender down to our pace.
        properties.ReceiveMaximum = self._settings.receive_max
        properties.MaximumPacketSize = _RECEIVED_PACKET_BYTES_MAX
        return {"clean_start": self._settings.session_s == 0, "properties": properties}

    def _serve(self, client: mqtt.Client, farewell: list[Failure]) -> None:
        greeting_ends = time.monotonic() + self._settings.connect_timeout_s
        greeted_before = self.connections
        tick_s = min(self._settings.keepalive_s / 4, 15.0)
        while (sock := client.socket()) is not None and not farewell:
            greeted = self.connections > greeted_before
            now = time.monotonic()
            if not greeted and now > greeting_ends:
                farewell.append(Failure(
                    f"{self._settings.host}:{self._settings.port} accepted the connection but "
                    "did not answer; is it an MQTT broker?", try_older_mqtt=True))
                return
            if self._say_goodbye(client, greeted, now):
                return
            wait_s = tick_s if greeted else min(tick_s, greeting_ends - now + 0.01)
            if self._closing_since is not None:
                wait_s = 0.05
            self._exchange(client, sock, wait_s)

    def _say_goodbye(self, client: mqtt.Client, greeted: bool, now: float) -> bool:
        if self._closing_since is None:
            return False
        if greeted and not self._all_sent() and now - self._closing_since < _GOODBYE_S:
            return False
        client.disconnect()
        return True

    def _exchange(self, client: mqtt.Client, sock: Any, wait_s: float) -> None:
        """Hand over what is queued, wait for the socket or a poke, and let paho work."""
        with self._changed:
            reading = self._may_read()
            self._hand_over(client)
        if client.socket() is None:
            return                      # the write found the connection gone
        # Bytes that TLS has already decrypted are invisible to select.
        undelivered = reading and isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
        readable, writable, _ = select.select(
            [self._wake_read, sock] if reading else [self._wake_read],
            [sock] if client.want_write() else [], [], 0.0 if undelivered else wait_s)
        if self._wake_read in readable:
            self._wake_read.recv(4096)
        if sock in readable or undelivered:
            client.loop_read()
        if sock in writable:
            client.loop_write()
        client.loop_misc()

    def _hand_over(self, client: mqtt.Client) -> None:
        """Give paho what the owner queued, no more publishes than the broker takes at once."""
        if not self._connected:
            return
        while self._acks:
            client.ack(self._acks.popleft(), 1)
        for batch in _batches(self._to_unsubscribe):
            client.unsubscribe(batch)
        for batch in _batches(self._to_subscribe):
            _, packet_id = client.subscribe([(each, 1) for each in batch])
            if packet_id is not None:
                self._subscribing[packet_id] = batch
        self._to_unsubscribe.clear()
        self._to_subscribe.clear()
        while self._outgoing and len(self._inflight) < self._limits.inflight_max:
            message = self._outgoing.popleft()
            self._outgoing_bytes -= len(message.topic) + len(message.payload)
            if self._fits(message):
                sent = client.publish(message.topic, message.payload, 1, message.retained)
                self._inflight[sent.mid] = message
                self.bytes_sent += len(message.topic) + len(message.payload)
        self._changed.notify_all()

    def _fits(self, message: Message) -> bool:
        """Whether the broker we have *now* takes the packet: another may have been smaller."""
        size = packet_bytes(message.topic, message.payload, protocol=self._limits.protocol)
        if size <= self._limits.packet_bytes_max:
            return True
        self._refuse(message.topic, f"{size} bytes exceed its new limit")
        return False

    def _take_back(self) -> None:
        """After a connection: what was not acknowledged goes to the head of the queue."""
        with self._changed:
            for message in reversed(self._inflight.values()):
                self._outgoing.appendleft(message)
                self._outgoing_bytes += len(message.topic) + len(message.payload)
            self._inflight.clear()
            self._acks.clear()
            self._subscribing.clear()

    def _refuse(self, topic: str, why: str) -> None:
        self.refused += 1
        self.last_refused = topic
        log.warning("the broker refused %s: %s", topic, why)

    # ---------------------------- paho's callbacks, all on the network thread

    def _on_connect(self, farewell: list[Failure]) -> Callable[..., None]:
        def on_connect(_client: Any, _userdata: Any, flags: mqtt.ConnectFlags,
                       reason: ReasonCode, properties: Properties | None) -> None:
            if reason.is_failure:
                farewell.append(self._why_refused(reason))
            else:
                self._welcome(flags.session_present, properties)
        return on_connect

    def _why_refused(self, reason: ReasonCode) -> Failure:
        where = f"{self._settings.host}:{self._settings.port}"
        if reason.value in _UNSUPPORTED_VERSION:
            return Failure(f"the broker at {where} does not speak MQTT {self._protocol}",
                           try_older_mqtt=True)
        return Failure(f"the broker at {where} would not let {self._settings.client_id!r} in: "
                       f"{reason}", final=reason.value not in _MAY_PASS)

    def _welcome(self, resumed: bool, properties: Properties | None) -> None:
        packet = getattr(properties, "MaximumPacketSize", LIMITS.packet_bytes_max)
        inflight = getattr(properties, "ReceiveMaximum", LIMITS.inflight_max)
        with self._changed:
            self.connections += 1
            self._connected = True
            self._failure = None
            self._limits = LinkLimits(packet, min(inflight, LIMITS.inflight_max), self._protocol)
            if not resumed:
                self._news_lost_session = True
                self._filters = dict.fromkeys(self._filters, False)
            self._to_subscribe = [each for each, known in self._filters.items() if not known]
            self._news = Connected(self._limits, resumed)
            self._changed.notify_all()

    def _on_message(self, client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        with self._changed:
            try:
                topic = message.topic
            except UnicodeDecodeError:
                topic = ""
            self.bytes_received += len(topic) + len(message.payload)
            if not topic or len(message.payload) > _RECEIVED_PACKET_BYTES_MAX:
                self.dropped_messages += 1
                client.ack(message.mid, message.qos)
                return
            token = (self.connections << 16) + message.mid if message.qos else 0
            self._inbox.append(Message(topic, bytes(message.payload), message.retain, token))
            self._inbox_bytes += len(message.payload)
            self._changed.notify_all()

    def _on_publish(self, _client: Any, _userdata: Any, packet_id: int,
                    reason: ReasonCode, _properties: Any) -> None:
        with self._changed:
            message = self._inflight.pop(packet_id, None)
            if message is not None and reason.is_failure:
                self._refuse(message.topic, str(reason))
            self._changed.notify_all()

    def _on_subscribe(self, _client: Any, _userdata: Any, packet_id: int,
                      reasons: list[ReasonCode], _properties: Any) -> None:
        with self._changed:
            for each, reason in zip(self._subscribing.pop(packet_id, []), reasons, strict=False):
                if reason.is_failure:
                    self._refuse(each, str(reason))
                elif each in self._filters:
                    self._filters[each] = True


_RECEIVED_PACKET_BYTES_MAX = 1 * MIB


def _on_disconnect(farewell: list[Failure]) -> Callable[..., None]:
    def on_disconnect(_client: Any, _userdata: Any, flags: mqtt.DisconnectFlags,
                      reason: ReasonCode, _properties: Any) -> None:
        if flags.is_disconnect_packet_from_server:
            farewell.append(Failure(f"the broker ended the connection: {reason}"))
    return on_disconnect


def _tune_socket(_client: Any, _userdata: Any, sock: Any) -> None:
    # Acknowledgements are small; waiting to fill a segment would cost 40 ms each.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNSENT_DATA_TIMEOUT_MS)


def _check_topic(topic: str) -> None:
    """Raise ValueError for a topic no broker can take: that is the caller's bug."""
    if not topic or len(topic.encode()) > 65_535 or any(c in topic for c in "+#\0"):
        raise ValueError(f"{topic!r} is not a topic to publish on")


def _batches(filters: list[str]) -> list[list[str]]:
    step = _FILTERS_PER_SUBSCRIBE
    return [filters[i:i + step] for i in range(0, len(filters), step)]
