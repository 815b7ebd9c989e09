"""paho's MQTT client, made for one connection, with bounds on what it takes in, and few system
calls.

paho reads a packet in three or four pieces and writes each packet by itself: over TLS that
is a record, a segment and a wake-up of the broker for every acknowledgement of four bytes.
Here it reads from what one call brought, and what it writes gathers until `flush`.
The two packets that come and go by the thousand (`plain_packet.py`) never reach paho, unless
it is not the paho that was tried. docs/decisions/0131 and 0134 have the figures.
"""

import logging
import socket
import ssl
import time
from typing import Any, Protocol

import paho.mqtt
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from broker_bridge.link.failures import TRESPASS
from broker_bridge.link.plain_packet import (
    acknowledged_in,
    acknowledgement,
    extent_of,
    head_of,
    is_plain,
    message_in,
)
from broker_bridge.link.queued_link import MIB
from broker_bridge.link.session_settings import SessionSettings

__all__ = ["RECEIVED_PACKET_BYTES_MAX", "GatheringClient", "Taker"]

RECEIVED_PACKET_BYTES_MAX = 1 * MIB
_READ_BYTES = 64 * 1024
_UNSENT_DATA_TIMEOUT_MS = 30_000  # TCP gives up on a peer that acknowledges nothing
_RECORD_BYTES = 16 * 1024  # of TLS (RFC 8446, 5.1), which gives one at a time
_GATHERED_BYTES_MAX = 64 * 1024  # and one packet
_TRIED = "2.2."  # of paho; another reads and writes every packet itself
# Stands among those paho waits for an answer for, if a refusal comes. Looks as if paho had sent it,
# for at a CONNACK, be it one that no broker may send, paho goes through them and sends the others.
_OURS = mqtt.MQTTMessage()
_OURS.qos, _OURS.state = 1, mqtt.mqtt_ms_wait_for_puback


class Taker(Protocol):
    """Who takes messages that paho does not see."""

    def may_take(self) -> bool:
        """Whether there is room for one more."""

    def take(self, topic: str, payload: bytes, *, retained: bool, packet_id: int) -> None:
        """A message of QoS 1 came."""

    def answered(self, packet_id: int, *, refusal: str | None) -> None:
        """The broker answered a publish."""


class _LastError(logging.Logger):
    """Keeps what paho only logs: the TLS alert or socket error behind "connection lost"."""

    text = ""

    def handle(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


class GatheringClient(mqtt.Client):
    """A client for an owner who calls `dial`, `read`, `loop_write`, `loop_misc` and `flush`.

    paho's own would take any packet, 256 MB long, and keep each one of QoS 2. CONNECT says
    that we take no more than `RECEIVED_PACKET_BYTES_MAX`, and every SUBSCRIBE asks for
    QoS 1: a broker that does otherwise is hung up on before it is given memory.
    """

    def __init__(self, taker: Taker, settings: SessionSettings, *, protocol: str) -> None:
        self.takes_plain = paho.mqtt.__version__.startswith(_TRIED)
        self._taker = taker
        self._unread = b""
        self._unread_at = 0
        self.is_drained = False  # the last read left nothing in the socket
        self._is_cut = False  # the unread bytes are the beginning of one plain packet
        self._error: OSError | None = None  # of a read, for paho to find
        self._gathered = bytearray()
        v5 = protocol == "5.0"
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            clean_session=None if v5 else settings.session_s == 0,
            protocol=mqtt.MQTTv5 if v5 else mqtt.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self._settings = settings
        self._errors = _LastError("paho", logging.ERROR)
        self._configure()

    def _configure(self) -> None:
        settings, v5 = self._settings, self._protocol == mqtt.MQTTv5
        self.enable_logger(self._errors)
        self.connect_timeout = settings.connect_timeout_s
        # The session bounds both, before paho sees a publish.
        self.max_inflight_messages_set(0)
        self.max_queued_messages_set(0)
        if settings.tls is not None:
            self.tls_set_context(settings.tls)
        if settings.username is not None:
            self.username_pw_set(settings.username, settings.password)
        if (will := settings.will) is not None:
            properties = _will_properties(settings) if v5 else None
            self.will_set(
                will.topic, will.payload, qos=1, retain=will.retained, properties=properties
            )
        self.on_socket_open = _tune_socket

    def dial(self) -> None:
        """Look the broker up, connect, shake hands, send CONNECT. Blocks; raises OSError."""
        settings = self._settings
        options: dict[str, Any] = {}
        if self._protocol == mqtt.MQTTv5:
            properties = _connect_properties(settings)
            options = {"clean_start": settings.session_s == 0, "properties": properties}
        self.connect_async(settings.host, settings.port, settings.keepalive_s, **options)
        self.reconnect()

    @property
    def last_error(self) -> str:
        """What paho logged last, and says in no other way."""
        return self._errors.text

    def has_unread(self) -> bool:
        """Whether bytes wait here that no `poll` would tell of."""
        if self._unread_at < len(self._unread) and not self._is_cut:
            return True
        pending = getattr(self._sock, "pending", None)  # what TLS has decrypted already
        return pending is not None and pending() > 0

    def want_write(self) -> bool:
        """Whether there is something to write."""
        return bool(self._gathered) or super().want_write()

    def send(self, topic: str, payload: bytes, *, retained: bool) -> int | None:
        """Publish with QoS 1; return the packet id that will be answered for.

        None if too much waits to be written: nothing was sent, `want_write` is true.
        """
        if not self.takes_plain:
            return self.publish(topic, payload, 1, retained).mid
        if not self._may_gather():
            return None
        while (packet_id := self._mid_generate()) in self._out_messages:
            pass  # numbers come round again, and one answer may be long in coming
        name, v5 = topic.encode(), self._protocol == mqtt.MQTTv5
        self._gathered += head_of(name, packet_id, len(payload), retained=retained, v5=v5)
        self._gathered += payload
        self._out_messages[packet_id] = _OURS
        return packet_id

    def acknowledge(self, packet_id: int) -> None:
        """Tell the broker that this message of QoS 1 needs no redelivery."""
        if self.takes_plain and self._may_gather():
            self._gathered += acknowledgement(packet_id)
        else:  # paho keeps what does not go now
            self.ack(packet_id, 1)

    def flush(self) -> None:
        """Write what has gathered, as far as the socket takes it."""
        while self._gathered and self._sock is not None:
            try:
                sent = super()._sock_send(self._gathered)
            except BlockingIOError:
                return
            except OSError:
                # The connection is gone. Why, the next read says: it may find the broker's last
                # words, a write never does. In TLS 1.3 even a refused certificate is told so:
                # the handshake is over for us before the broker has seen it (RFC 8446, 2).
                self._gathered.clear()
                return
            del self._gathered[:sent]
            self._last_msg_out = time.monotonic()  # for paho's keep-alive

    def read(self) -> None:
        """Take what one read brings: the plain packets here, and paho takes whatever else it is."""
        if self._sock is None:
            return  # hung up on: what came after is not read
        if self.takes_plain and self._in_packet["command"] == 0:
            try:
                if self._read_more() and not self._leave_to_paho():
                    return
            except BlockingIOError:
                return
            except OSError as error:
                self._error = error
        self.loop_read()

    def _read_more(self) -> bool:
        """Read, unless there is something unread already; False at the end of the stream."""
        if self._unread_at < len(self._unread) and not self._is_cut:
            return True
        self.is_drained = True  # whatever else this read comes to
        is_tls = isinstance(self._sock, ssl.SSLSocket)
        more = super()._sock_recv(_RECORD_BYTES if is_tls else _READ_BYTES)
        if not more:
            return False
        self.is_drained = len(more) < _READ_BYTES and not is_tls
        self._unread, self._unread_at = self._unread[self._unread_at :] + more, 0
        self._last_bytes_received = time.monotonic()  # for paho's keep-alive
        return True

    # What follows paho calls.

    def _sock_recv(self, bufsize: int) -> bytes:
        if self._in_packet["remaining_length"] > RECEIVED_PACKET_BYTES_MAX:
            raise ConnectionAbortedError(
                f"{TRESPASS} a packet of more than {RECEIVED_PACKET_BYTES_MAX} bytes"
            )
        if self._in_packet["command"] & 0xF6 == 0x34:
            raise ConnectionAbortedError(f"{TRESPASS} a message of QoS 2")
        if self._error is not None:
            raise self._error
        if not self._read_more():
            return b""
        if self.takes_plain and self._in_packet["command"] == 0 and not self._leave_to_paho():
            raise BlockingIOError
        start, self._unread_at = self._unread_at, min(self._unread_at + bufsize, len(self._unread))
        if self._in_packet["command"] == self._unread[start] == 0:
            # To paho a 0 says that no packet has begun: what follows would be read out of step.
            raise ConnectionAbortedError(f"{TRESPASS} a packet of no kind")
        return self._unread[start : self._unread_at]

    def _leave_to_paho(self) -> bool:
        """Take the plain packets; say whether what comes next is for paho to read."""
        unread, self._is_cut = self._unread, False
        while self._unread_at < len(unread):
            command = unread[self._unread_at]
            extent = extent_of(unread, self._unread_at) if is_plain(command) else None
            if extent is None or extent[1] - self._unread_at > _READ_BYTES:
                return True
            if extent[1] > len(unread):
                self._is_cut = True
                return False
            if not self._taker.may_take():
                return False
            if not self._took(command, *extent):
                return True
            self._unread_at = extent[1]
        self._unread, self._unread_at = b"", 0
        return False

    def _took(self, command: int, begin: int, end: int) -> bool:
        """Take the packet with this body, unless it turns out not to be plain."""
        if command == mqtt.PUBACK:
            packet_id = acknowledged_in(self._unread, begin, end)
            if packet_id is None:
                return False
            if self._out_messages.pop(packet_id, None) is not None:
                self._taker.answered(packet_id, refusal=None)
            return True
        found = message_in(self._unread, begin, end, v5=self._protocol == mqtt.MQTTv5)
        if found is None:
            return False
        topic, packet_id, payload = found
        self._taker.take(topic, payload, retained=bool(command & 1), packet_id=packet_id)
        return True

    def _sock_send(self, buf: bytes | bytearray) -> int:
        if not self._has_room():
            raise BlockingIOError
        self._gathered += buf
        return len(buf)

    def _may_gather(self) -> bool:
        """Whether a packet that paho does not see may gather: not before those paho waits with.

        A question would overtake the SUBSCRIBE for its answer, and an acknowledgement an earlier
        one (MQTT 5.0, 4.6).
        """
        return not self._out_packet and self._has_room()

    def _has_room(self) -> bool:
        """Whether one more packet may gather; writes, if that helps."""
        if len(self._gathered) >= _GATHERED_BYTES_MAX:
            self.flush()
        return len(self._gathered) < _GATHERED_BYTES_MAX

    def _sock_close(self) -> None:
        self.flush()  # the goodbye
        super()._sock_close()


def _connect_properties(settings: SessionSettings) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = settings.session_s
    # Unacknowledged messages the broker may have on the way to us: with manual
    # acknowledgement this is what slows a sender down to our pace.
    properties.ReceiveMaximum = settings.receive_max
    properties.MaximumPacketSize = RECEIVED_PACKET_BYTES_MAX
    return properties


def _will_properties(settings: SessionSettings) -> Properties | None:
    if settings.will_delay_s == 0:
        return None
    properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
    properties.WillDelayInterval = settings.will_delay_s
    return properties


def _tune_socket(_client: Any, _userdata: Any, sock: Any) -> None:
    # Acknowledgements are small; waiting to fill a segment would cost 40 ms each.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNSENT_DATA_TIMEOUT_MS)
