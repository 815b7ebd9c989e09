"""What clients said to a broker, packet by packet: a relay that reads MQTT as it goes by.

Knows just enough of MQTT 3.1.1 (section 3) and 5.0 (section 3) to say which limits a client
kept to. Reads plain connections only.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.broker_bridge.link.proxy import Proxy

CONNECT, PUBLISH, PUBACK, SUBSCRIBE = 1, 3, 4, 8


@dataclass
class Said:
    """What the clients of one tap have said so far."""

    versions: set[int] = field(default_factory=set)
    keepalives_s: set[int] = field(default_factory=set)
    client_ids: set[str] = field(default_factory=set)
    packet_types: set[int] = field(default_factory=set)
    topics: set[str] = field(default_factory=set)
    filters: set[str] = field(default_factory=set)
    qos: set[int] = field(default_factory=set)
    largest_packet_bytes: int = 0
    most_filters_in_a_packet: int = 0
    most_unacknowledged: int = 0


class Tap(Proxy):
    """A relay to `target` that fills in `said`."""

    def __init__(self, target: int) -> None:
        self.said = Said()
        self._streams: dict[Any, bytearray] = {}
        self._open: set[bytes] = set()
        self._v5 = False
        super().__init__(target)

    def _seen(self, source: Any, data: bytes) -> None:
        stream = self._streams.setdefault(source, bytearray())
        stream += data
        from_client = source.getsockname()[1] == self.port
        while (packet := _first_packet(stream)) is not None:
            head, body, size = packet
            del stream[:size]
            if from_client:
                self._from_client(head, body, size)
            elif head >> 4 == PUBACK:
                self._open.discard(body[:2])

    def _from_client(self, head: int, body: bytes, size: int) -> None:
        said = self.said
        said.packet_types.add(head >> 4)
        said.largest_packet_bytes = max(said.largest_packet_bytes, size)
        if head >> 4 == CONNECT:
            self._connect(body)
        elif head >> 4 == PUBLISH:
            self._publish(head, body)
        elif head >> 4 == SUBSCRIBE:
            self._subscribe(body)

    def _connect(self, body: bytes) -> None:
        self._open.clear()
        version, flags = body[6], body[7]
        self._v5 = version == 5
        rest = body[10:]
        if self._v5:
            rest = _after_properties(rest)
        self.said.versions.add(version)
        self.said.keepalives_s.add(int.from_bytes(body[8:10], "big"))
        self.said.client_ids.add(_text(rest)[0])
        if flags & 0x04:
            self.said.qos.add(flags >> 3 & 3)

    def _publish(self, head: int, body: bytes) -> None:
        topic, rest = _text(body)
        self.said.topics.add(topic)
        self.said.qos.add(head >> 1 & 3)
        if head >> 1 & 3:
            self._open.add(bytes(rest[:2]))
            self.said.most_unacknowledged = max(self.said.most_unacknowledged, len(self._open))

    def _subscribe(self, body: bytes) -> None:
        rest, count = body[2:], 0
        if self._v5:
            rest = _after_properties(rest)
        while rest:
            wanted, rest = _text(rest)
            self.said.filters.add(wanted)
            self.said.qos.add(rest[0] & 3)
            rest, count = rest[1:], count + 1
        self.said.most_filters_in_a_packet = max(self.said.most_filters_in_a_packet, count)


def _first_packet(stream: bytearray) -> tuple[int, bytes, int] | None:
    """The first whole packet: its first byte, its body, and the bytes it takes."""
    if len(stream) < 2:
        return None
    length, start = _number(bytes(stream[1:5]))
    size = 1 + start + length
    if start == 0 or len(stream) < size:
        return None
    return stream[0], bytes(stream[1 + start : size]), size


def _number(data: bytes) -> tuple[int, int]:
    """A variable byte integer (MQTT 5.0, 1.5.5), and how long it is; 0 if it is cut short."""
    value = 0
    for index, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, index + 1
    return 0, 0


def _after_properties(body: bytes) -> bytes:
    length, start = _number(body[:4])
    return body[start + length :]


def _text(body: bytes) -> tuple[str, bytes]:
    end = 2 + int.from_bytes(body[:2], "big")
    return body[2:end].decode(), body[end:]
