"""What is read without paho, and that nobody can tell: the same bytes, read in both ways."""

import fcntl
import select
import socket
import sys
import termios
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Connected, Message
from broker_bridge.link.paho_client import RECEIVED_PACKET_BYTES_MAX
from broker_bridge.link.plain_packet import (
    acknowledged_in,
    acknowledgement,
    extent_of,
    head_of,
    is_plain,
    message_in,
)
from broker_bridge.link.session_settings import SessionSettings
from tests.fuzz.answering import Driven, listener

CONNACK = {"5.0": "2003000000", "3.1.1": "20020000"}
VERSIONS = pytest.mark.parametrize("protocol", ["5.0", "3.1.1"])


def varint(number, *, at_least=1):
    """A remaining length (MQTT 5.0, 1.5.5); `at_least` bytes of it, though it needs fewer."""
    parts = []
    while number or len(parts) < at_least:
        parts.append(number % 128 | 0x80)
        number //= 128
    parts[-1] &= 0x7F
    return bytes(parts)


def packet(command, body, **length):
    return bytes([command]) + varint(len(body), **length) + body


def text(words):
    data = words if isinstance(words, bytes) else words.encode()
    return len(data).to_bytes(2, "big") + data


def publish(topic, payload, *, packet_id=9, command=0x32, properties=b"\0", protocol="5.0"):
    number = packet_id.to_bytes(2, "big") if command & 0x06 else b""
    about = properties if protocol == "5.0" else b""
    return packet(command, text(topic) + number + about + payload)


def read(data, *, v5=True):
    """What is read of a whole packet without paho; None if that is left to paho."""
    extent = extent_of(data, 0) if data and is_plain(data[0]) else None
    if extent is None or extent[1] > len(data):
        return None
    if data[0] == 0x40:
        return acknowledged_in(data, *extent)
    return message_in(data, *extent, v5=v5)


# ── The codec ───────────────────────────────────────────────────────────────────────────


@given(
    topic=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    payload=st.binary(max_size=300),
    packet_id=st.integers(0, 65_535),
    protocol=st.sampled_from(["5.0", "3.1.1"]),
)
def test_a_message_is_read_as_it_was_written(topic, payload, packet_id, protocol):
    data = publish(topic, payload, packet_id=packet_id, protocol=protocol)
    assert read(data, v5=protocol == "5.0") == (topic, packet_id, payload)


@given(
    topic=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    size=st.sampled_from([0, 1, 113, 114, 130, 16_370, 16_383, 65_000, 2_097_151, 2_097_152]),
    packet_id=st.integers(1, 65_535),
    retained=st.booleans(),
    v5=st.booleans(),
)
def test_a_message_is_written_as_it_is_read(topic, size, packet_id, retained, v5):
    name, payload = topic.encode(), bytes(size)
    data = head_of(name, packet_id, size, retained=retained, v5=v5) + payload
    protocol, command = "5.0" if v5 else "3.1.1", 0x32 | retained
    assert data == publish(topic, payload, packet_id=packet_id, command=command, protocol=protocol)


def test_frozen_packets_are_written():
    data = head_of(b"a/b", 9, 2, retained=False, v5=True) + b"ho"
    assert data == bytes.fromhex("320a0003612f62000900686f")
    data = head_of(b"a/b", 9, 2, retained=True, v5=False) + b"ho"
    assert data == bytes.fromhex("33090003612f620009686f")
    assert acknowledgement(0xABCD) == bytes.fromhex("4002abcd")


def test_frozen_packets_are_read():
    assert read(bytes.fromhex("320a0003612f62000900686f")) == ("a/b", 9, b"ho")
    assert read(bytes.fromhex("33090003612f620009686f"), v5=False) == ("a/b", 9, b"ho")
    assert read(bytes.fromhex("4002abcd")) == 0xABCD


@pytest.mark.parametrize("whole", [publish("a/b", b"payload"), bytes.fromhex("40020009")])
def test_a_packet_cut_short_is_not_read_at_any_length(whole):
    for length in range(len(whole)):
        assert read(whole[:length]) is None


def test_a_message_whose_packet_ends_too_soon_is_not_read_at_any_length():
    body = publish("a/b", b"")[2:]
    for length in range(len(body)):
        assert read(packet(0x32, body[:length])) is None
    assert read(packet(0x32, body)) == ("a/b", 9, b"")


@pytest.mark.parametrize(
    "forged",
    [
        publish("", b"x"),
        publish(b"\xff\xfe", b"x"),
        publish("a", b"x", properties=bytes.fromhex("0501") + b"zzzz"),
        packet(0x32, b"\xff\xffa\0\x09\0"),  # a topic longer than its packet
        packet(0x32, b"\0\x01a\0\x09"),  # no room for properties
        packet(0x32, b""),
        packet(0x32, b"\0"),
        publish("a", b"x", command=0x30),
        publish("a", b"x", command=0x34),
        publish("a", b"x", command=0x36),
        packet(0x40, b"\0"),
        packet(0x40, b"\0\x09\x10"),
        packet(0x40, b"\0\x09\x87\0"),
        packet(0x42, b"\0\x09"),
        b"\x32\xff\xff\xff\x7f",
        b"\x32\xff\xff\xff\xff\x01",
    ],
)
def test_whatever_is_not_plain_is_left_to_paho(forged):
    assert read(forged) is None


# ── A session ───────────────────────────────────────────────────────────────────────────


def waiting(sock):
    """How many bytes the kernel holds for the reader of a socket."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


class Peer:
    """A session under way whose broker is this test."""

    def __init__(self, *, protocol="5.0", plain=True, publishes=0, **options):
        self.link = Driven(SessionSettings(
            host="127.0.0.1", port=listener().getsockname()[1], client_id="a", protocol=protocol,
            keepalive_s=1000, **options,
        ))  # fmt: skip
        self.this = self.link._begin()
        self.this.client.takes_plain = plain and self.this.client.takes_plain
        self.link._dial(self.this)
        self.socket, _ = listener().accept()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.hear(bytes.fromhex(CONNACK[protocol]))
        for i in range(publishes):
            self.link.publish("mine", b"%d" % i)
        self.link._prepare(self.this)

    def hear(self, *pieces):
        """Send these, each for itself; the link reads each before the next."""
        for piece in pieces:
            for at in range(0, len(piece), 16_384):  # what the kernel holds is bounded
                self.socket.sendall(piece[at : at + 16_384])
                select.select([self.this.socket], [], [], 20.0)
                self.work()
                if self.this.socket is None:
                    return

    def work(self):
        """Let the link read until all is read, it may read no more, or it has hung up."""
        self.link._work(self.this, readable=True, writable=False)
        while self._can_go_on():
            self.link._work(self.this, readable=True, writable=False)

    def _can_go_on(self):
        if self.this.socket is None or not self.link._may_read():
            return False
        return self.this.has_unread or waiting(self.this.socket) > 0

    def end(self):
        """Everything that can be told from the outside."""
        self.link._prepare(self.this)
        lost = self.this.socket is None
        self.link._end(self.this)
        self.socket.close()
        told = []
        while (event := self.link.receive(0)) is not None:
            told.append(event)
        link = self.link
        return (
            told, lost, link.refused, link.last_refused, link.dropped_messages, link.bytes_sent,
            link.bytes_received, [each.payload for each in link._outgoing], link._answers,
        )  # fmt: skip

    def messages(self):
        return [(e.topic, e.payload) for e in self.end()[0] if isinstance(e, Message)]


def in_both_ways(pieces, *, protocol="5.0", publishes=3):
    """What a session makes of these bytes; the same, whether paho reads all or some."""
    outcomes = []
    for plain in (True, False):
        peer = Peer(protocol=protocol, plain=plain, publishes=publishes)
        peer.hear(*pieces)
        outcomes.append(peer.end())
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


def payloads(outcome):
    return [event.payload for event in outcome[0] if isinstance(event, Message)]


def kinds(protocol):
    """Packets of every kind that a broker may send, and some that it may not."""
    plain = [
        publish("a/b", bytes(size), packet_id=7 + size, protocol=protocol, command=command)
        for size, command in [(0, 0x32), (1, 0x33), (100, 0x3A), (113, 0x3B), (130, 0x32)]
    ]
    acks = [bytes([0x40, 2, 0, i]) for i in (1, 2, 3, 200)]
    others = [
        publish("q0", b"none", protocol=protocol, command=0x30),
        publish(b"\xc3\x28", b"topic", protocol=protocol),
        bytes.fromhex("d000"),
        bytes.fromhex(CONNACK[protocol]),
        bytes.fromhex("50020001"),
        bytes.fromhex("70020002"),
        packet(0x32, publish("long", b"x", protocol=protocol)[2:], at_least=3),
        packet(0x32, publish("longer", b"x", protocol=protocol)[2:], at_least=4),
    ]
    if protocol == "5.0":
        others += [
            publish("props", b"x", properties=bytes.fromhex("020101")),
            bytes.fromhex("4003000110"),  # no matching subscribers
            bytes.fromhex("400400038000"),
        ]
    wrong = [
        b"\x40\x01\x01", b"\x36\x05\0\x01a\0\x09", b"\xf0\x00", b"\x32\xff\xff\xff\xff\x01",
        b"\0" + plain[0], b"\0\0" + acks[0],
    ]  # fmt: skip
    return plain + acks, others, wrong


@VERSIONS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_stream_of_packets_is_read_otherwise_than_by_paho_alone(protocol, data):
    plain, others, wrong = kinds(protocol)
    some = data.draw(st.lists(st.sampled_from(plain + others), max_size=12))
    if data.draw(st.booleans()):
        some.append(data.draw(st.sampled_from(wrong)))
    stream = b"".join(some)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=5)))
    pieces = [stream[i:j] for i, j in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    in_both_ways([piece for piece in pieces if piece], protocol=protocol)


@VERSIONS
def test_a_packet_may_be_cut_anywhere(protocol):
    whole = publish("a/b", b"payload" * 30, protocol=protocol) + bytes.fromhex("40020001")
    for cut in range(1, len(whole)):
        outcome = in_both_ways([whole[:cut], whole[cut:]], protocol=protocol)
        assert payloads(outcome) == [b"payload" * 30]
        assert outcome[7] == [b"1", b"2"]  # the first is acknowledged, the others not


@pytest.mark.parametrize("size", [0, 100, 121, 122, 16_376, 16_377, 65_000, 65_524, 65_525, 66_000])
def test_a_packet_of_any_length_comes_whole(size):
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    stream = publish("a", payload) + publish("a", b"next", packet_id=10)
    assert payloads(in_both_ways([stream[:50], stream[50:]])) == [payload, b"next"]


def test_a_length_of_four_bytes_is_understood():
    payload = bytes(700_000)
    body = text("a") + b"\0\x09\0" + payload
    outcome = in_both_ways([packet(0x32, body, at_least=4), publish("a", b"next")])
    assert payloads(outcome) == [payload, b"next"]


def test_a_refusal_with_its_reason_is_counted():
    no = packet(0x40, b"\0\x02\x87\x05\x1f\0\x02no")
    outcome = in_both_ways([bytes.fromhex("40020001") + no + bytes.fromhex("40020003")])
    assert outcome[2:4] == (1, "mine")
    assert outcome[7] == []


@VERSIONS
def test_a_second_welcome_sends_nothing_again_and_ends_no_link(protocol):
    """No broker may send it, and one that did ended the process that had a publish under way."""
    welcome = bytes.fromhex(CONNACK[protocol])
    outcome = in_both_ways([welcome, welcome + bytes.fromhex("40020001")], protocol=protocol)
    assert outcome[7] == [b"1", b"2"]
    peer = Peer(protocol=protocol, publishes=3)
    peer.hear(welcome)
    peer.link._prepare(peer.this)
    peer.link._end(peer.this)
    with peer.socket, peer.socket.makefile("rb") as file:
        assert file.read().count(text("mine")) == 3


def test_a_message_with_properties_is_a_message():
    properties = b"\x09\x01\x01" + b"\x26\0\x01k\0\x01v"  # it is text; k is v
    assert payloads(in_both_ways([publish("a", b"x", properties=properties)])) == [b"x"]


@pytest.mark.parametrize("plain_before", [b"", publish("a", b"x")])
@pytest.mark.parametrize(
    "trespass",
    [b"\x32" + varint(RECEIVED_PACKET_BYTES_MAX + 1), b"\x34\x07\0\x01a\0\x09\0"],
    ids=["too-long", "qos-2"],
)
def test_a_broker_that_trespasses_is_hung_up_on_before_it_is_given_memory(trespass, plain_before):
    peer = Peer()
    peer.hear(plain_before + trespass, b"y" * 1000)
    assert peer.this.socket is None
    assert len(peer.this.client._in_packet["packet"]) == 0
    assert "it sent" in peer.this.client.last_error
    assert peer.messages() == [("a", b"x")] * bool(plain_before)


@VERSIONS
def test_a_packet_of_no_kind_ends_the_connection_and_nothing_after_it_is_read(protocol):
    """Kind 0 is forbidden (MQTT 5.0, 2.1.2). What came after it was read, and in one way only."""
    good = publish("a", b"x", protocol=protocol)
    for pieces in ([good + b"\0" + good], [good, b"\0", good]):
        outcome = in_both_ways(pieces, protocol=protocol)
        assert (payloads(outcome), outcome[1]) == ([b"x"], True)


def test_an_end_in_the_middle_of_a_packet_is_an_end():
    peer = Peer()
    peer.hear(publish("a", b"whole") + publish("a", b"cut short")[:-3])
    assert not peer.this.has_unread  # nobody is to go round and round over half a packet
    peer.socket.shutdown(socket.SHUT_WR)
    peer.work()
    assert peer.this.socket is None
    assert peer.messages() == [("a", b"whole")]


def test_a_read_of_many_small_messages_does_not_fill_the_queue_beyond_its_bound():
    bound = LIMITS.receive_queue_messages_max
    peer = Peer()
    assert isinstance(peer.link.receive(0), Connected)
    peer.hear(b"".join(publish("a", b"", packet_id=1 + i) for i in range(bound * 3)))
    for _ in range(3):
        assert len(peer.link._inbox) == bound
        for _ in range(bound):
            assert isinstance(peer.link.receive(0), Message)
        peer.work()
    assert peer.messages() == []


def test_a_read_of_large_messages_stops_where_the_queue_is_full():
    peer = Peer(receive_queue_bytes_max=5000)
    assert isinstance(peer.link.receive(0), Connected)
    peer.hear(b"".join(publish("a", bytes(2000), packet_id=1 + i) for i in range(12)))
    for _ in range(4):
        assert len(peer.link._inbox) == 3  # the third crosses the bound
        for _ in range(3):
            assert isinstance(peer.link.receive(0), Message)
        peer.work()
    assert peer.messages() == []


# ── What a session says ─────────────────────────────────────────────────────────────────


def written_by(*, plain, protocol, publishes):
    """Every byte that a session writes for these publishes and for what it acknowledges."""
    peer = Peer(protocol=protocol, plain=plain)
    peer.hear(publish("heard", b"x", packet_id=77, protocol=protocol))
    assert isinstance(peer.link.receive(0), Connected)
    peer.link.ack(peer.link.receive(0))
    for topic, payload, retain in publishes:
        peer.link.publish(topic, payload, retain=retain)
    peer.link._prepare(peer.this)
    peer.link._end(peer.this)
    with peer.socket, peer.socket.makefile("rb") as file:
        return file.read()


@VERSIONS
def test_nobody_can_tell_who_wrote_a_packet(protocol):
    publishes = [
        (topic, bytes(size), size % 2 == 0)
        for topic, size in [("a", 0), ("a/é", 1), ("a" * 100, 20), ("b", 200), ("c", 20_000)]
    ]
    ours, paho = (
        written_by(plain=plain, protocol=protocol, publishes=publishes) for plain in (True, False)
    )
    assert ours == paho
    assert acknowledgement(77) in ours
    assert ours.count(bytes(20_000)) == 1


@pytest.mark.parametrize("plain", [True, False])
def test_a_peer_that_reads_nothing_holds_up_what_is_said_and_loses_none_of_it(plain):
    payloads = [bytes([number]) * 60_000 for number in range(20)]
    peer = Peer(plain=plain)
    peer.this.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for each in payloads:
        peer.link.publish("a", each)
    read = bytearray()
    peer.socket.setblocking(False)
    while payloads[-1] not in read:
        peer.link._prepare(peer.this)
        assert len(peer.this.client._gathered) < 2 * 65_536
        peer.link._work(peer.this, readable=False, writable=True)
        try:
            read += peer.socket.recv(1 << 16)
        except BlockingIOError:
            select.select([peer.socket], [], [], 0.05)
    at = [read.find(each) for each in payloads]
    assert min(at) > 0
    assert at == sorted(at)


@pytest.mark.parametrize("plain", [True, False])
def test_on_a_slow_line_no_packet_overtakes_another(plain):
    """A question came before the SUBSCRIBE for its answer, an acknowledgement before another."""
    peer = Peer(plain=plain)
    peer.this.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    peer.hear(publish("heard", b"", packet_id=0xABC1), publish("heard", b"", packet_id=0xABC2))
    _, first, second = (peer.link.receive(0) for _ in range(3))
    for _ in range(4):
        peer.link.publish("a", bytes(60_000))
    for _ in range(20):
        peer.link._prepare(peer.this)
    peer.link.subscribe(["answers/#"])
    peer.link.ack(first)
    peer.link._prepare(peer.this)
    assert peer.this.client._out_packet  # they wait for the line
    peer.link.publish("ask", b"question")
    peer.link.ack(second)
    said = [acknowledgement(0xABC1), b"answers/#", acknowledgement(0xABC2), b"question"]
    read = bytearray()
    peer.socket.setblocking(False)
    while not all(each in read for each in said):
        try:
            read += peer.socket.recv(1 << 16)
        except BlockingIOError:
            select.select([peer.socket], [], [], 0.01)
        for _ in range(3):  # something else wakes it, too
            peer.link._prepare(peer.this)
        peer.link._work(peer.this, readable=False, writable=True)
    at = {each: read.find(each) for each in said}
    assert at[said[0]] < at[said[2]]
    assert at[said[1]] < at[said[3]]


def test_while_a_line_is_too_slow_for_what_waits_nobody_goes_round_and_round():
    """Of 55,000 turns a second, none could write a byte."""
    peer = Peer()
    peer.this.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for _ in range(20):
        peer.link.publish("a", bytes(60_000))
    _, writing = peer.link._prepare(peer.this)
    assert peer.link._outgoing
    assert len(peer.link._inflight) < peer.link.limits.inflight_max
    assert writing  # so the socket wakes it
    assert peer.link._wait_s(peer.this, time.monotonic()) > 10.0


def test_a_packet_id_that_is_still_waited_for_is_not_given_to_another():
    peer = Peer(publishes=1)
    (first,) = peer.link._inflight
    peer.this.client._last_mid = 65_535  # which comes before 1, the first
    peer.link.publish("mine", b"another")
    peer.link._prepare(peer.this)
    assert len(peer.link._inflight) == 2
    assert first in peer.link._inflight
