"""Count what goes over one device's wire: what is said, its TLS records, its TCP segments.

A relay on 127.0.0.1 that ends TLS on both sides with the certificates that the benchmark
made, so that plain MQTT or HTTP bytes are counted as they are. The kernel's own counters
of the connection to the device (TCP_INFO) give the bytes and segments below. Segments are
kept to those of an Ethernet (1,448 bytes of payload), which loopback would not do.
"""

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Count", "MqttPackets", "Packet", "Wiretap"]

_ETHERNET_SEGMENT_BYTES = 1448
_HEADERS_BYTES = 20 + 20 + 12  # IPv4, TCP, TCP's timestamps
_AGAIN = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass(frozen=True)
class Count:
    """Bytes from the device (up) and to it (down), on three levels, and TCP segments."""

    up_bytes: int = 0
    down_bytes: int = 0
    tcp_up_bytes: int = 0
    tcp_down_bytes: int = 0
    segments: int = 0

    @property
    def said_bytes(self) -> int:
        """MQTT or HTTP, both ways."""
        return self.up_bytes + self.down_bytes

    @property
    def tcp_bytes(self) -> int:
        """The same in its TLS records, both ways."""
        return self.tcp_up_bytes + self.tcp_down_bytes

    @property
    def ip_bytes(self) -> int:
        """The same in IPv4 packets, with the acknowledgements that carry nothing."""
        return self.tcp_bytes + self.segments * _HEADERS_BYTES

    def __add__(self, other: "Count") -> "Count":
        return Count(*(a + b for a, b in zip(self._all, other._all, strict=True)))

    def __sub__(self, other: "Count") -> "Count":
        return Count(*(a - b for a, b in zip(self._all, other._all, strict=True)))

    @property
    def _all(self) -> tuple[int, ...]:
        return (
            self.up_bytes, self.down_bytes, self.tcp_up_bytes, self.tcp_down_bytes, self.segments,
        )  # fmt: skip


@dataclass(frozen=True)
class Packet:
    """One MQTT packet: when it passed (monotonic), whose it is, its type and topic, its size."""

    at_s: float
    up: bool
    kind: str
    topic: str
    size_bytes: int


class MqttPackets:
    """Finds packets in the bytes of one direction."""

    _KINDS = ("", "CONNECT", "CONNACK", "PUBLISH", "PUBACK", "PUBREC", "PUBREL", "PUBCOMP",
              "SUBSCRIBE", "SUBACK", "UNSUBSCRIBE", "UNSUBACK", "PINGREQ", "PINGRESP",
              "DISCONNECT", "AUTH")  # fmt: skip

    def __init__(self, *, up: bool) -> None:
        self._up = up
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Packet]:
        """Yield the packets that `data` completes."""
        self._rest += data
        while (found := self._header()) is not None:
            start, size = found
            if len(self._rest) < size:
                return
            packet, self._rest = self._rest[:size], self._rest[size:]
            kind, topic = self._KINDS[packet[0] >> 4], ""
            if kind == "PUBLISH":
                (length,) = struct.unpack_from(">H", packet, start)
                topic = packet[start + 2 : start + 2 + length].decode()
            yield Packet(time.monotonic(), self._up, kind, topic, size)

    def _header(self) -> tuple[int, int] | None:
        """Where the present packet's body starts, and its whole size."""
        length = 0
        for place, byte in enumerate(self._rest[1:5]):
            length |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                return place + 2, place + 2 + length
        return None


class Wiretap:
    """Relays 127.0.0.1:`port` to 127.0.0.1:`target`. Use as a context manager.

    `certificate` and `key` are the server's own; `trust` is its CA; `client` is the device's
    certificate and key, for a server that asks for them.
    """

    def __init__(
        self,
        target: int,
        *,
        certificate: Path,
        key: Path,
        trust: Path,
        client: tuple[Path, Path] | None = None,
    ) -> None:
        self._as_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._as_server.load_cert_chain(certificate, key)
        self._as_client = ssl.create_default_context(cafile=str(trust))
        if client is not None:
            self._as_client.load_cert_chain(*client)
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _ETHERNET_SEGMENT_BYTES)
        self.port: int = self._listener.getsockname()[1]
        self.packets: list[Packet] = []
        self.connections = 0
        self._live: dict[socket.socket, list[int]] = {}
        self._ended = Count()
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def __enter__(self) -> "Wiretap":
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._listener.close()

    def count(self) -> Count:
        """Everything so far."""
        with self._lock:
            return sum((_kernel_count(s, said) for s, said in self._live.items()), self._ended)

    def bytes_by_topic(self, *, since_s: float, up: bool) -> Counter[str]:
        """Bytes of each kind of packet; publishes by the last level of their topic."""
        found: Counter[str] = Counter()
        for packet in list(self.packets):
            if packet.up == up and packet.at_s >= since_s:
                levels = packet.topic.split("/")
                name = levels[3] if levels[3:4] in (["model"], ["task"]) else levels[-1]
                found[f"{packet.kind} {name}".strip()] += packet.size_bytes
        return found

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[device], daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            device = stack.enter_context(self._as_server.wrap_socket(raw, server_side=True))
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", self._target)))
            server = stack.enter_context(
                self._as_client.wrap_socket(plain, server_hostname="127.0.0.1")
            )
            said = [0, 0]
            with self._lock:
                self._live[device] = said
                self.connections += 1
            try:
                self._relay(device, server, said)
            finally:
                with self._lock:
                    self._ended += _kernel_count(device, self._live.pop(device))

    def _relay(self, device: ssl.SSLSocket, server: ssl.SSLSocket, said: list[int]) -> None:
        parsers = (MqttPackets(up=True), MqttPackets(up=False))
        ways = ((device, server), (server, device))
        for each in (device, server):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not self._stopping.is_set():
            if not device.pending() and not server.pending():
                select.select([device, server], [], [], 0.2)
            for way, (source, sink) in enumerate(ways):
                try:
                    data = source.recv(65_536)
                except _AGAIN:
                    continue
                if not data:
                    return
                _send(sink, data)
                with self._lock:
                    said[way] += len(data)
                with contextlib.suppress(UnicodeDecodeError, struct.error):
                    self.packets.extend(parsers[way].feed(data))


def _send(sink: ssl.SSLSocket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sink.send(rest) :]
        except _AGAIN:
            select.select([sink], [sink], [], 0.2)


def _kernel_count(device: socket.socket, said: list[int]) -> Count:
    """What linux/tcp.h's struct tcp_info says of the connection with the device."""
    info = device.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (received,) = struct.unpack_from("=Q", info, 128)
    segments_out, segments_in = struct.unpack_from("=II", info, 136)
    (sent,) = struct.unpack_from("=Q", info, 200)
    return Count(said[0], said[1], received, sent, segments_out + segments_in)
