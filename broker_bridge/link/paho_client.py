"""paho's MQTT client, with bounds on what it takes in, and few system calls.

paho reads a packet in three or four pieces and writes each packet by itself: over TLS that
is a record, a segment and a wake-up of the broker for every acknowledgement of four bytes.
Here it reads from what one call brought, and what it writes gathers until `flush`.
docs/decisions/0131 has the figures.
"""

from typing import Any

import paho.mqtt.client as mqtt

from broker_bridge.link.queued_link import MIB

__all__ = ["RECEIVED_PACKET_BYTES_MAX", "TRESPASS", "GatheringClient"]

RECEIVED_PACKET_BYTES_MAX = 1 * MIB
TRESPASS = "it sent"  # begins what a broker did that no broker may
_READ_BYTES = 64 * 1024
_GATHERED_BYTES_MAX = 64 * 1024  # and one packet


class GatheringClient(mqtt.Client):
    """A client for an owner who calls `loop_read`, `loop_write`, `loop_misc` and `flush`.

    paho's own would take any packet, 256 MB long, and keep each one of QoS 2. CONNECT says
    that we take no more than `RECEIVED_PACKET_BYTES_MAX`, and every SUBSCRIBE asks for
    QoS 1: a broker that does otherwise is hung up on before it is given memory.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._unread = b""
        self._unread_at = 0
        self._gathered = bytearray()
        super().__init__(*arguments, **options)

    def has_unread(self) -> bool:
        """Whether bytes wait here that no `poll` would tell of."""
        if self._unread_at < len(self._unread):
            return True
        pending = getattr(self._sock, "pending", None)  # what TLS has decrypted already
        return pending is not None and pending() > 0

    def want_write(self) -> bool:
        """Whether there is something to write."""
        return bool(self._gathered) or super().want_write()

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

    # What follows paho calls.

    def _sock_recv(self, bufsize: int) -> bytes:
        if self._in_packet["remaining_length"] > RECEIVED_PACKET_BYTES_MAX:
            raise ConnectionAbortedError(
                f"{TRESPASS} a packet of more than {RECEIVED_PACKET_BYTES_MAX} bytes"
            )
        if self._in_packet["command"] & 0xF6 == 0x34:
            raise ConnectionAbortedError(f"{TRESPASS} a message of QoS 2")
        if self._unread_at == len(self._unread):
            self._unread, self._unread_at = super()._sock_recv(_READ_BYTES), 0
        start, self._unread_at = self._unread_at, min(self._unread_at + bufsize, len(self._unread))
        return self._unread[start : self._unread_at]

    def _sock_send(self, buf: bytes | bytearray) -> int:
        if len(self._gathered) >= _GATHERED_BYTES_MAX:
            self.flush()
            if len(self._gathered) >= _GATHERED_BYTES_MAX:
                raise BlockingIOError
        self._gathered += buf
        return len(buf)

    def _sock_close(self) -> None:
        self.flush()  # the goodbye
        super()._sock_close()
