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

import logging
import random as _random
import select
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker_bridge.errors import LinkError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import LinkLimits, Message
from broker_bridge.link.queued_link import GOODBYE_S, MIB, QueuedLink, packet_bytes
from broker_bridge.link.tls import Failure, TlsFiles, client_context, explain, explain_tls

__all__ = ["PahoLink"]

log = logging.getLogger(__name__)

_FILTERS_PER_SUBSCRIBE = 8          # what AWS IoT Core takes in one packet
_UNSENT_DATA_TIMEOUT_MS = 30_000    # TCP gives up on a peer that acknowledges nothing
_RECEIVED_PACKET_BYTES_MAX = 1 * MIB
_UNSUPPORTED_VERSION = (0x01, 0x84)                     # MQTT 3.1.1 and MQTT 5 spelling
_MAY_PASS = (0x03, 0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F)  # unavailable, busy, quota, moved, rate


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


class PahoLink(QueuedLink):
    """See `link.base.Link`. Made by `open`."""

    def __init__(self, settings: _Settings) -> None:
        self._protocol = "3.1.1" if settings.protocol == "3.1.1" else "5.0"
        super().__init__(protocol=self._protocol,
                         receive_queue_bytes_max=settings.receive_queue_bytes_max,
                         send_queue_bytes_max=settings.send_queue_bytes_max)
        self._settings = settings
        self._failure: Failure | None = None

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
            try:
                link._wait_for_first_connection(wait_s)
            except BaseException:       # Ctrl-C too: nobody else could close it
                link.close()
                raise
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
        if crash is not None:
            raise crash
        where = f"{self._settings.host}:{self._settings.port}"
        raise LinkError(failure.reason if failure else f"no answer from {where} in {wait_s:g} s")

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
                log.debug("not connected: %s", failure.reason)  # the owner hears it as an event
                self._down(failure.reason)
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
            self._exchange(client, sock, wait_s, greeted=greeted)

    def _say_goodbye(self, client: mqtt.Client, greeted: bool, now: float) -> bool:
        """While closing: wait for acknowledgements, give ours, disconnect. True: hang up."""
        if self._closing_since is None:
            return False
        if not greeted or now - self._closing_since > GOODBYE_S:
            client.disconnect()         # written at once if the socket takes it
            return True
        with self._changed:
            self._hand_over(client)
            if self._all_sent() and not client.want_write():
                # Once it is written, paho closes the socket, and that ends the loop.
                client.disconnect()
        return False

    def _exchange(
        self, client: mqtt.Client, sock: Any, wait_s: float, *, greeted: bool
    ) -> None:
        """Hand over what is queued, wait for the socket or a poke, and let paho work."""
        with self._changed:
            reading = not greeted or self._may_read()
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
        for packet_id in self._take_acks():
            client.ack(packet_id, 1)
        for batch in _batches(self._to_unsubscribe):
            client.unsubscribe(batch)
        for batch in _batches(self._to_subscribe):
            _, subscription_id = client.subscribe([(each, 1) for each in batch])
            if subscription_id is not None:
                self._subscribing[subscription_id] = batch
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

    # paho's callbacks follow; all run on the network thread.

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
            self._failure = None
            limits = LinkLimits(packet, min(inflight, LIMITS.inflight_max), self._protocol)
            self._up(limits, resumed=resumed)

    def _on_message(self, client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        if topic and len(message.payload) <= _RECEIVED_PACKET_BYTES_MAX:
            self._deliver(topic, bytes(message.payload), retained=message.retain,
                          packet_id=message.mid if message.qos else 0)
        else:
            self.dropped_messages += 1
            client.ack(message.mid, message.qos)        # or the broker would send it for ever

    def _on_publish(self, _client: Any, _userdata: Any, packet_id: int,
                    reason: ReasonCode, _properties: Any) -> None:
        self._acknowledged(packet_id, refusal=str(reason) if reason.is_failure else None)

    def _on_subscribe(self, _client: Any, _userdata: Any, packet_id: int,
                      reasons: list[ReasonCode], _properties: Any) -> None:
        self._subscribed(packet_id, [str(each) if each.is_failure else None for each in reasons])


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


def _batches(filters: list[str]) -> list[list[str]]:
    step = _FILTERS_PER_SUBSCRIBE
    return [filters[i:i + step] for i in range(0, len(filters), step)]
